"""`maskline doctor`: is everything here that is needed, and what to do where it is not. It changes nothing.

✓ is well, ✗ is broken and makes the command fail, – is worth knowing: not set up here, or slower than it could be.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cli import access, gpu

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from shared.config import Settings

Mark = Literal["✓", "✗", "–"]

LEAST_BYTES = 2**30
COMFORTABLE_BYTES = 10 * 2**30
CPU_ADVICE = "inference runs on the CPU: right, but slow; `fast` and `demo` are the modes for it"


@dataclass(frozen=True, kw_only=True)
class Finding:
    mark: Mark
    subject: str
    says: str


def examine(settings: "Settings", *, url: str | None, api_key: str | None) -> Iterator[Finding]:
    """Every finding, in the order in which one would look, as it is made."""
    stack = access.find_stack(Path.cwd())
    yield from examine_gpus(own_sessions=stack.pids if stack else frozenset())
    yield from examine_weights()
    if access.names_servers():
        yield examine_database(settings)
        yield examine_redis(settings)
        yield from examine_storage(settings)
    else:
        for subject in ("database", "Redis", "S3"):
            yield Finding(mark="–", subject=subject, says="none is named here; `maskline up` starts a local stack")
    yield from examine_disk([Path.cwd(), *([settings.models.cache_folder] if settings.models.cache_folder else [])])
    yield from examine_service(url=url, api_key=api_key)


# --- the device ----------------------------------------------------------------------------------------------------


def examine_gpus(
    *,
    own_sessions: frozenset[int],
    read_report: Callable[[], gpu.GpuReport | None] = gpu.read_report,
) -> Iterator[Finding]:
    """Also names what makes a GPU slow: an old driver, heat, and other programs on it."""
    cuda = find_torch_cuda()
    try:
        report = read_report()
    except gpu.GpuUnreadable as error:
        yield Finding(mark="✗", subject="GPU", says=f"{error}; reinstall the NVIDIA driver, or restart after an update")
        return
    if report is None or not report.gpus:
        yield Finding(mark="–", subject="GPU", says=f"no NVIDIA GPU was found; {CPU_ADVICE}")
        yield _examine_torch(cuda)
        return
    for each in report.gpus:
        yield Finding(mark="✓", subject="GPU", says=f"{each.name}, {each.memory_used} of {each.memory_total} in use")
    yield _examine_driver(report, cuda)
    yield _examine_torch(cuda)
    if cuda is not None:
        yield _examine_use()
    for each in report.gpus:
        yield from _examine_speed(each, own_sessions)


def find_torch_cuda() -> str | None:
    """The CUDA that torch was built for; None without torch, "" for a build without CUDA. Imports no torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text()
    built = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return built[1] if built else ""


def _examine_torch(cuda: str | None) -> Finding:
    if cuda is None:
        return Finding(
            mark="–", subject="torch", says="not installed; a worker needs it: pip install 'maskline[worker]'"
        )
    built = f"built for CUDA {cuda}" if cuda else "built for the CPU alone"
    return Finding(mark="✓", subject="torch", says=f"{importlib.metadata.version('torch')}, {built}")


def _examine_driver(report: gpu.GpuReport, cuda: str | None) -> Finding:
    says = f"{report.driver}, runs up to CUDA {report.cuda}"
    if cuda and gpu.is_too_old(driver_cuda=report.cuda, torch_cuda=cuda):
        return Finding(mark="✗", subject="driver", says=f"{says}; torch needs CUDA {cuda}: install a newer driver")
    return Finding(mark="✓", subject="driver", says=says)


def _examine_use() -> Finding:
    """Whether torch itself can use the GPU that the driver shows."""
    from shared.inference.device import choose_device, describe_device

    device = choose_device()
    if device.type == "cuda":
        name, memory = describe_device(device)
        return Finding(mark="✓", subject="CUDA", says=f"torch computes on {name} ({memory / 2**30:.0f} GiB)")
    return Finding(
        mark="✗",
        subject="CUDA",
        says=f"torch does not see the GPU, so {CPU_ADVICE}. Look at the driver's line, at CUDA_VISIBLE_DEVICES, and "
        "for a build of torch that has CUDA",
    )


def _examine_speed(each: gpu.Gpu, own_sessions: frozenset[int]) -> Iterator[Finding]:
    if each.held_back_by:
        causes = " and ".join(each.held_back_by)
        yield Finding(
            mark="–",
            subject="speed",
            says=f"{each.name} is slowed down by {causes} at {each.temperature}: see to its cooling and power",
        )
    others = [process for process in each.processes if _session_of(process.pid) not in own_sessions]
    if others:
        named = ", ".join(f"{process.name} (process {process.pid}, {process.memory})" for process in others)
        yield Finding(
            mark="–", subject="speed", says=f"other programs use {each.name}: {named}; a worker wants it alone"
        )


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


# --- weights, servers, disk, service -------------------------------------------------------------------------------


def examine_weights() -> Iterator[Finding]:
    from cli import models
    from cli.failures import Failure
    from shared.inference.modes import MODES

    for mode in MODES.values():
        subject = f"weights {mode.name}"
        try:
            row = models.describe(mode)
        except Failure as error:
            yield Finding(mark="–", subject="weights", says=str(error))
            return
        if row["path"]:
            yield Finding(mark="✓", subject=subject, says=row["path"])
        else:
            # The others are a choice; this one ships with Maskline.
            mark: Mark = "✗" if mode.origin == "packaged" and row["source"] == mode.source else "–"
            yield Finding(mark=mark, subject=subject, says=f"not on this machine ({row['source']}); {row['advice']}")


def examine_database(settings: "Settings") -> Finding:
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    from shared import db

    advice = "see to the server and to MASKLINE_DATABASE__URL"
    try:
        engine = db.create_database_engine(settings.database)
        try:
            with engine.connect() as connection:
                gap = _find_schema_gap(connection, settings.database.url)
        finally:
            engine.dispose()
    except ArgumentError as error:
        return Finding(
            mark="✗", subject="database", says=f"MASKLINE_DATABASE__URL is no address of a database: {error}"
        )
    except SQLAlchemyError as error:
        why = _first_line(getattr(error, "orig", None) or error)
        return Finding(mark="✗", subject="database", says=f"cannot be used: {why}; {advice}")
    if gap:
        return Finding(mark="✗", subject="database", says=gap)
    return Finding(mark="✓", subject="database", says="answers, and its schema is up to date")


def _find_schema_gap(connection: "Connection", url: str) -> str | None:
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from shared import db

    scripts = ScriptDirectory.from_config(db.migration_config(url))
    has, needs = set(MigrationContext.configure(connection).get_current_heads()), set(scripts.get_heads())
    if has == needs:
        return None
    if not has:
        return "has no tables of Maskline yet; run: maskline migrate"
    if has - {script.revision for script in scripts.walk_revisions()}:
        return f"its schema ({', '.join(sorted(has))}) is newer than this program; update the program"
    return f"its schema ({', '.join(sorted(has))}) is older than this program; run: maskline migrate"


def examine_redis(settings: "Settings") -> Finding:
    from shared.broker import Hints

    hints = Hints(settings.broker)
    try:
        trouble = hints.check()
    finally:
        hints.close()
    if trouble:
        says = f"{trouble}; see to the server and to MASKLINE_BROKER__URL. Jobs still run, seconds later"
        return Finding(mark="✗", subject="Redis", says=says)
    return Finding(mark="✓", subject="Redis", says="answers")


def examine_storage(settings: "Settings") -> Iterator[Finding]:
    """The bucket of the results, and each from which sources are read."""
    from shared.errors import MasklineError
    from shared.storage import Storage

    sources = {each.partition("/")[0]: "MASKLINE_STORAGE__SOURCES" for each in settings.storage.sources}
    for bucket, named_by in {settings.storage.bucket: "MASKLINE_STORAGE__…", **sources}.items():
        try:
            Storage.from_settings(settings.storage).other(bucket).check()
        except (MasklineError, ValueError) as error:  # ValueError: an endpoint that is no URL
            yield Finding(mark="✗", subject="S3", says=f"{error}; see to the bucket {bucket!r} and to {named_by}")
        else:
            yield Finding(mark="✓", subject="S3", says=f"the bucket {bucket} answers")


def examine_disk(
    folders: Sequence[Path], *, free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
) -> Iterator[Finding]:
    for folder in folders:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = free_bytes(there)
        says = f"{free / 2**30:.1f} GiB free in {folder}"
        if free < LEAST_BYTES:
            yield Finding(mark="✗", subject="disk", says=f"{says}: too little to work with; make room")
        elif free < COMFORTABLE_BYTES:
            yield Finding(mark="–", subject="disk", says=f"{says}: weights and results may soon not fit")
        else:
            yield Finding(mark="✓", subject="disk", says=says)


def examine_service(*, url: str | None, api_key: str | None) -> Iterator[Finding]:
    from cli.client import Client
    from cli.failures import Failure

    try:
        where = access.find_access(url=url, api_key=api_key)
    except access.NoService as error:
        yield Finding(mark="–", subject="service", says=str(error))
        return
    try:
        with Client(where.url, where.api_key) as client:
            ready = client.readiness()
            workers = client.workers()
    except Failure as error:
        yield Finding(mark="✗", subject="service", says=str(error))
        return
    if ready["status"] != "ready":
        trouble = ", ".join(f"{name} {says}" for name, says in ready["checks"].items() if says != "ok")
        yield Finding(mark="✗", subject="service", says=f"{where.url} is {ready['status']}: {trouble}")
    else:
        yield Finding(mark="✓", subject="service", says=f"{where.url} is ready")
    running = [worker for worker in workers if worker["queue"] == "gpu"]
    if not running:
        says = "none that computes is alive: jobs stay queued until one is; its log says why"
        yield Finding(mark="✗", subject="workers", says=says)
    for worker in running:
        modes = ", ".join(worker["modes"])
        yield Finding(mark="✓", subject="worker", says=f"{worker['host']} on {worker['device']}, serves {modes}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
