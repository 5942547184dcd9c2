"""Two releases side by side over one migration: the code from before the newest one was written, and this code.

The older one is what git holds at the commit before the file of the newest migration came; it runs a stack of its own.
"""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import make_url

from cli.local.apps import App, answers, api_arguments, app_environment, worker_arguments
from cli.local.folder import PORTS, is_free
from shared import db
from shared.broker import GPU, IO, WEBHOOKS
from tests.acceptance.conftest import ENDED, make_recording, wait_until
from tests.receiver import Receiver

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"input_size": 768}
OLD, NEW = "old", "new"

OLD_STACK = """
import json, sys
from pathlib import Path
from cli.local.apps import App
from cli.local.stack import Stack

with Stack(Path(sys.argv[1]), durable=False) as stack:
    apps = {name: each.pid for name, each in stack.processes.items() if isinstance(each, App)}
    print(json.dumps({"url": stack.url, "api_key": stack.api_key, "webhook_secret": stack.webhook_secret,
                      "environment": stack.environment(), "pids": apps}), flush=True)
    for line in sys.stdin:
        stack.stop(line.strip())
        print("stopped", flush=True)
"""
"""Runs in the older tree; stops the processes that it is told, and everything when nobody is there to tell."""


@dataclass(frozen=True)
class OldStack:
    process: subprocess.Popen[str]
    home: Path
    url: str
    api_key: str
    webhook_secret: str
    environment: dict[str, str]
    pids: dict[str, int]
    """Of the application's processes, by name."""

    def stop(self, name: str) -> None:
        """By SIGTERM, and it is not started again; returns when it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(name, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "stopped\n"

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        url = make_url(self.environment["MASKLINE_DATABASE__URL"]).set(drivername="postgresql")
        with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
            return connection.execute(statement.encode()).fetchall()


@dataclass
class Client:
    """Submits to the API of either release, and remembers what it submitted where."""

    apis: dict[str, httpx2.Client]
    receiver: Receiver
    accepted: dict[str, str]
    """Which release took the job, by its id."""

    def submit(self, release: str, source: bytes, *, name: str, **options: Any) -> str:
        form = {"mode": "demo", "webhook_url": self.receiver.url, "options": json.dumps(options)}
        answer = self.apis[release].post("/v1/jobs", data=form, files={"file": (name, source)})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        self.accepted[job_id] = release
        return job_id

    def look(self, release: str, job_id: str) -> dict[str, Any]:
        seen: dict[str, Any] = self.apis[release].get(f"/v1/jobs/{job_id}").raise_for_status().json()
        return seen

    def wait_for(self, release: str, job_id: str) -> dict[str, Any]:
        wait_until(lambda: self.look(release, job_id)["state"] in ENDED, f"{job_id} did not end")
        return self.look(release, job_id)

    def wait_for_all(self, release: str) -> None:
        """Until that release says of every job, whoever took it, that it succeeded."""
        for job_id in self.accepted:
            seen = self.wait_for(release, job_id)
            assert seen["state"] == "succeeded", seen
            manifest = self.apis[release].get(f"/v1/jobs/{job_id}/result").raise_for_status().json()
            assert manifest["files"], manifest


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def old_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The older release, unpacked."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the release before is taken from git, and this is no clone")
    if git("rev-parse", "--is-shallow-repository").strip() == b"true":
        pytest.skip("the release before is taken from git, and this clone has no history: git fetch --unshallow")
    newest = ScriptDirectory.from_config(db.migration_config("")).get_revision("head")
    assert newest is not None
    # Along the first parents, or a file that came with a merge would not be found.
    along = ("--first-parent", "-m", "--no-renames", "--diff-filter=A", "--format=%H")
    came = git("log", *along, "--", newest.path).split()
    commit = f"{came[-1].decode()}^" if came else "HEAD"  # one that is not committed yet
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(old_tree: Path) -> Iterator[OldStack]:
    home = Path(tempfile.mkdtemp(prefix="maskline-"))  # not under pytest's folder, see tests/conftest.py
    try:
        with subprocess.Popen(
            [sys.executable, "-c", OLD_STACK, str(home)],
            cwd=old_tree, env=os.environ | {"PYTHONPATH": str(old_tree)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            told = process.stdout.readline()
            assert told, "the release before did not start"
            yield OldStack(process, home, **json.loads(told))
            process.communicate()  # its input ends, and so does all that it started
    finally:
        shutil.rmtree(home)


@pytest.fixture
def client(old: OldStack, receiver: Receiver) -> Iterator[Client]:
    with connect(old.url, old) as api:
        yield Client({OLD: api}, receiver, {})


def connect(url: str, old: OldStack) -> httpx2.Client:
    return httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {old.api_key}"}, timeout=30)


@contextmanager
def run_new(old: OldStack) -> Iterator[tuple[str, dict[str, int]]]:
    """This code's processes beside the older ones: the URL of its API, and the ids of its processes by name."""
    port = next(each for each in random.sample(PORTS, 200) if is_free(each))
    url = f"http://127.0.0.1:{port}"
    environment = app_environment(old.environment | {"PYTHONPATH": str(ROOT)})

    def worker(queue: str) -> tuple[str, ...]:
        return worker_arguments(queue, node=f"new-{queue}.{port}@%h", concurrency=1)

    programs = {queue: worker(queue) for queue in (GPU, IO, WEBHOOKS)}
    programs |= {"upkeep": ("-m", "worker.upkeep"), "api": api_arguments(port)}
    with ExitStack() as running:
        apps = [
            App(f"new-{name}", home=old.home, arguments=arguments, environment=environment)
            for name, arguments in programs.items()
        ]
        for app in apps:
            running.callback(app.stop)
            app.launch()
        wait_until(lambda: answers(url, "/readyz"), "the new API is not ready")
        yield url, {app.name: app.pid for app in apps if app.pid is not None}
        for app in apps:
            app.ask_to_stop()


def learn_workers(old: OldStack, new_pids: dict[str, int]) -> dict[Any, tuple[str, str]]:
    """Of every worker that lives: its release and its queue. A child's session is that of the process started."""
    releases = dict.fromkeys(old.pids.values(), OLD) | dict.fromkeys(new_pids.values(), NEW)
    found = {}
    for worker_id, pid, queue in old.query("SELECT id, pid, queue FROM workers"):
        try:
            found[worker_id] = (releases[os.getsid(pid)], queue)
        except ProcessLookupError:
            continue  # its row lingers
    return found


def test_two_releases_share_one_database_and_one_broker_while_one_takes_over(
    old: OldStack, client: Client, receiver: Receiver, scene: bytes, large_scene: bytes
) -> None:
    recording = make_recording(3)
    url = old.environment["MASKLINE_DATABASE__URL"]
    head = ScriptDirectory.from_config(db.migration_config(url)).get_current_head()

    # The schema changes under the old release, in the middle of its work, which goes on.
    for _ in range(2):
        client.submit(OLD, large_scene, name="scene.png", **SLOW)
    wait_until(lambda: old.query("SELECT 1 FROM steps WHERE state = 'running'"), "nothing was begun")
    assert old.query("SELECT version_num FROM alembic_version") != [(head,)]
    db.upgrade(url)
    assert old.query("SELECT version_num FROM alembic_version") == [(head,)]
    assert old.query("SELECT 1 FROM jobs WHERE finished_at IS NULL"), "it was over before the schema changed"
    client.submit(OLD, scene, name="scene.png")
    client.submit(OLD, recording, name="clip.mp4")
    client.wait_for_all(OLD)

    with run_new(old) as (new_url, new_pids), connect(new_url, old) as new_api:
        client.apis[NEW] = new_api
        # Both work, until each has done steps of both kinds that came by each API.
        wanted = {(of, by, queue) for of in (OLD, NEW) for by in (OLD, NEW) for queue in (GPU, IO)}
        workers: dict[Any, tuple[str, str]] = {}

        def shared_out() -> bool:
            for release in (OLD, NEW):
                client.submit(release, scene, name="scene.png")
                client.wait_for(NEW, client.submit(release, recording, name="clip.mp4"))
            workers.update(learn_workers(old, new_pids))
            done = old.query("SELECT job_id, worker_id FROM steps WHERE state = 'done'")
            return wanted <= {
                (client.accepted[str(job_id)], *workers[worker_id])
                for job_id, worker_id in done
                if worker_id in workers
            }

        wait_until(shared_out, "one release did all the work")

        # The old release is asked to stop in the middle of its work; the new one ends it.
        before = len(client.accepted)
        for _ in range(3):
            client.submit(OLD, large_scene, name="scene.png", **SLOW)
        client.submit(OLD, recording, name="clip.mp4")
        wait_until(lambda: old.query("SELECT 1 FROM steps WHERE state = 'running'"), "nothing was begun")
        for name in [*(each for each in old.pids if each != "api"), "api"]:
            old.stop(name)
        client.submit(NEW, scene, name="scene.png")
        client.wait_for_all(NEW)
        last = {str(job_id) for (job_id,) in old.query("SELECT id FROM jobs ORDER BY created_at")[before:]}
        made_by = [
            workers.get(worker_id, (NEW, ""))[0]
            for job_id, worker_id in old.query("SELECT job_id, worker_id FROM steps")
            if str(job_id) in last
        ]
        assert NEW in made_by, "the old release had done it all"

        for job_id in client.accepted:
            receiver.wait_for(job_id)
        ended = (
            "SELECT job_id, count(*) FROM job_events WHERE type = 'state' AND data->>'state' = 'succeeded' GROUP BY 1"
        )
        assert dict(old.query(ended)) == {job_id: 1 for (job_id,) in old.query("SELECT id FROM jobs")}
        assert old.query("SELECT 1 FROM steps WHERE lost > 0 OR failures > 0") == []
    assert {job_id: len(receiver.about(job_id)) for job_id in client.accepted} == dict.fromkeys(client.accepted, 1)
    for job_id in client.accepted:
        assert receiver.about(job_id)[0].verify(old.webhook_secret)["type"] == "job.succeeded"
