"""The rules of the house, executed: who may import whom, what stays out of which process, where state changes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from tests.integration.workbench import Made, MadeBy

ROOT = Path(__file__).resolve().parents[2]
OURS = {"api", "worker", "shared", "cli", "bench", "tests", "migrations"}
PRODUCTION = ("api", "worker", "shared", "cli", "migrations")
MODEL_LIBRARIES = {"torch", "torchvision", "transformers", "av"}
LIFECYCLE = ROOT / "shared" / "lifecycle.py"
CONFIG = ROOT / "shared" / "config.py"


@dataclass(frozen=True)
class Module:
    path: Path
    tree: ast.Module

    @property
    def imports(self) -> set[str]:
        """Full names of what is imported, at the top, inside functions, and for the type checker alike."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{each.name}" for each in node.names}
        return found

    @property
    def packages(self) -> set[str]:
        return {name.split(".")[0] for name in self.imports}

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))


def modules(*packages: str) -> list[Module]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found, "there is nothing to look at"
    return [Module(path, ast.parse(path.read_text(), filename=str(path))) for path in found]


# --- who may import whom -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("shared", {"shared"}),
        ("api", {"api", "shared"}),
        ("worker", {"worker", "shared"}),
        ("cli", {"cli", "shared"}),
        ("migrations", {"shared"}),
    ],
)
def test_imports_go_one_way(package: str, allowed: set[str]) -> None:
    """So that each part runs and is deployed without the others, and no cycle can grow between them."""
    for module in modules(package):
        assert module.packages & OURS <= allowed, module


def test_the_inference_core_stands_alone() -> None:
    """It is also used without the service: no settings, no database, no contract."""
    for module in modules("shared/inference"):
        of_ours = {name for name in module.imports if name.split(".")[0] in OURS}
        assert all(name.startswith("shared.inference") for name in of_ours), module
        assert not module.packages & {"pydantic", "sqlalchemy", "fastapi", "celery", "boto3", "structlog"}, module


def test_model_libraries_stay_in_the_inference_core() -> None:
    """The API installs without them, and a parent that had loaded CUDA could not fork children that use it."""
    for module in modules(*PRODUCTION):
        if not module.path.is_relative_to(ROOT / "shared" / "inference"):
            assert not module.packages & MODEL_LIBRARIES, module


def test_tables_stay_in_the_worker() -> None:
    """They are written and joined there; the others install without a library of that size."""
    for module in modules("api", "shared", "cli", "migrations"):
        assert "pyarrow" not in module.packages, module


def test_the_web_framework_stays_in_the_api() -> None:
    """A worker installs without it, and an error that knows HTTP could not be raised in one."""
    for module in modules("worker", "shared", "cli", "migrations"):
        assert not module.packages & {"fastapi", "starlette", "uvicorn"}, module


# --- what stays out of which process -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("api.main", MODEL_LIBRARIES | {"numpy", "PIL", "worker", "cli"}),
        ("worker.app", MODEL_LIBRARIES | {"pyarrow", "fastapi", "api", "cli"}),
        ("worker.upkeep", MODEL_LIBRARIES | {"pyarrow", "fastapi", "api", "cli"}),
        ("cli.main", MODEL_LIBRARIES | {"sqlalchemy", "celery", "boto3", "api", "worker"}),
    ],
)
def test_a_process_does_not_load_what_is_not_its_own(module: str, unwanted: set[str]) -> None:
    """Imported for real, since what an import brings along is not to be seen in the source."""
    program = f"import sys, {module}; print(*({unwanted!r} & {{name.split('.')[0] for name in sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.stdout.strip(), ran.stderr) == ("", "")


# --- where state changes -------------------------------------------------------------------------------------------


def state_changes(tree: ast.AST) -> Iterator[int]:
    """Lines that change the state of a job or step, or might: by attribute, by UPDATE, in SQL."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(each, ast.Attribute) and each.attr == "state" for each in targets):
            yield node.lineno  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("update", "insert"):
            names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            if names & {"Job", "JobRow", "Step", "StepRow"}:
                yield node.lineno
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            updated = re.findall(
                r"\bupdate\s+(?:jobs|steps)\s+set\b(.*?)(?:\bwhere\b|\bfrom\b|$)", node.value, re.I | re.S
            )
            if any(re.search(r"\bstate\s*=", each, re.I) for each in updated):
                yield node.lineno


def test_state_changes_behind_one_door() -> None:
    """A move made elsewhere would miss its guard, its event or its webhook."""
    for module in modules(*PRODUCTION):
        if module.path != LIFECYCLE:
            assert not list(state_changes(module.tree)), module
    assert list(state_changes(ast.parse(LIFECYCLE.read_text())))


@pytest.mark.parametrize(
    "source",
    [
        "job.state = JobState.RUNNING",
        "job.state: JobState = JobState.RUNNING",
        "(other, step.state) == (1, 2)\nstep.state = x",
        "session.execute(update(Job).values(attempts=1))",
        "session.execute(insert(Step).values(row))",
        "text('UPDATE steps SET state = 1 WHERE id = 2')",
    ],
)
def test_the_door_is_watched(source: str) -> None:
    """The rule above sees what would break it."""
    assert list(state_changes(ast.parse(source)))


# --- what happens at import ----------------------------------------------------------------------------------------


def environment_reads(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            yield node
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (each for each in node.names if each.name in ("environ", "getenv"))


def inside_functions(tree: ast.AST) -> set[int]:
    """The nodes that only run when somebody calls; defaults and decorators run at import."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {id(inner) for body in bodies for statement in body for inner in ast.walk(statement)}


def test_nothing_reads_the_environment_at_import() -> None:
    """Settings read at import cannot be given by a test, nor told apart from a typo."""
    for module in modules(*PRODUCTION):
        called = inside_functions(module.tree)
        assert all(id(read) in called for read in environment_reads(module.tree)), module


def test_the_service_reads_its_environment_in_one_place() -> None:
    """One place knows every setting and refuses the ones that do not exist; the libraries read their own."""
    for module in modules("api", "worker", "shared"):
        if module.path != CONFIG:
            assert not list(environment_reads(module.tree)), module


# --- what time it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "shared/lifecycle.py",
        "shared/lateness.py",
        "shared/queue.py",
        "shared/locks.py",
        "worker/heart.py",
        "worker/runner.py",
        "worker/relief.py",
    ],
)
def test_leases_do_not_know_what_time_a_machine_thinks_it_is(name: str) -> None:
    """They go by the database's clock, and in a worker by one that nobody sets: clocks that jump change nothing."""
    tree = ast.parse((ROOT / name).read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not read & {"time", "time_ns", "utcnow", "today"}
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [each for each in calls if each.endswith("datetime.now")]


# --- what the documents promise ------------------------------------------------------------------------------------


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "faults.md").read_text()))
    written = {
        node.name
        for module in modules("tests")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert named
    assert named <= written


# --- the one fake --------------------------------------------------------------------------------------------------


def test_the_fake_engine_answers_as_the_real_one() -> None:
    """Read from the source, since importing the real one takes longer than all of these tests."""
    engine = ast.parse((ROOT / "shared" / "inference" / "engine.py").read_text())
    real = {
        node.name: [ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)]
        for node in engine.body
        if isinstance(node, ast.ClassDef)
    }
    assert real["Segmentation"] == [each.name for each in fields(Made)]
    assert real["ModelInfo"] == [each.name for each in fields(MadeBy)]
