"""The command's manners: help at once, a mistake answered in one line, and the exit status that help promises."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Maskline

JOB = "019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b11"
NOWHERE = ("--url", "http://127.0.0.1:1", "--api-key", "mk_test")
COMMANDS = (
    (), ("up",), ("demo",), ("migrate",), ("doctor",), ("submit",), ("jobs",), ("status",), ("result",), ("cancel",),
    ("keys", "create"), ("models", "list"), ("models", "pull"), ("segment",), ("evaluate",), ("batches",),
    ("batch",), ("archive",),
)  # fmt: skip


def test_help_waits_for_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'PIL', 'sqlalchemy', 'celery', 'boto3', 'pydantic_settings', 'httpx2'}"
    code = (
        "import sys\nsys.argv = ['maskline', '--help']\nimport cli.main\n"
        f"try:\n    cli.main.run()\nfinally:\n    print('heavy:', sorted({heavy} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage: maskline" in done.stdout
    assert done.stdout.rstrip().endswith("heavy: []")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_how_it_is_typed(maskline: Maskline, command: tuple[str, ...]) -> None:
    done = maskline(*command, "--help")
    assert done.status == 0
    assert f"Example: {' '.join(('maskline', *command))}" in " ".join(done.out.split())


def test_alone_it_shows_its_help_and_what_its_exit_status_means(maskline: Maskline) -> None:
    done = maskline()
    assert done.status == 0
    text = " ".join(done.out.split())
    assert "0 ok · 1 failed · 2 misused · 3 the service cannot be reached · 4 the service refused · 130" in text


def test_it_says_its_version(maskline: Maskline) -> None:
    assert maskline("--version").out.startswith("maskline 0.")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("juggle",), "No such command 'juggle'"),
        (("keys",), "Missing command"),
        (("jobs", "--colour"), "No such option: --colour"),
        (("jobs", "--limit", "none"), "Invalid value for '--limit'"),
        (("status", "my-job"), "Invalid value for 'JOB'"),
        (("submit",), "Missing argument 'FILE'"),
        (("submit", "missing.jpg", "--mode", "demo"), "missing.jpg' does not exist"),
        (("submit", "photo.jpg"), "Missing option '--mode'"),
        (("submit", "photo.jpg", "-m", "demo", "--option", "size", *NOWHERE), "--option size is not NAME=VALUE"),
        (("up", "--port", "99999"), "Invalid value for '--port'"),
        (("models", "pull", "best"), "there is no mode best; the modes are fast, balanced"),
        (("jobs", "--url", "here", "--api-key", "k"), "here is not the address of a service"),
        (("jobs", "--url", "http://127.0.0.1:1"), "http://127.0.0.1:1 needs an API key"),
        (("jobs", "--url", "http://127.0.0.1:1", "--api-key", "mk_\n"), "an API key is made of letters"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    maskline: Maskline, folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    (folder / "photo.jpg").write_bytes(b"light")
    done = maskline(*arguments)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("maskline: ")
    assert says in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [("jobs",), ("status", JOB), ("cancel", JOB), ("result", JOB, "--out", "masks"), ("batches",), ("batch", JOB)],
)
def test_a_service_that_is_not_there_has_a_status_of_its_own(maskline: Maskline, command: tuple[str, ...]) -> None:
    for where, says in (((), "no service is known"), (NOWHERE, "http://127.0.0.1:1 cannot be reached")):
        done = maskline(*command, *where)
        assert done.status == 3
        assert says in done.err
        assert done.err.count("\n") == 1


def test_a_misspelt_setting_is_named(maskline: Maskline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_DATABSE__URL", "postgresql://somewhere")
    done = maskline("migrate")
    assert done.status == 2
    assert done.err == "maskline: MASKLINE_DATABSE__URL names no setting of Maskline\n"


@pytest.mark.parametrize("command", [("migrate",), ("keys", "create", "laptop")])
def test_a_database_that_is_not_there_is_told_in_one_line(
    maskline: Maskline, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MASKLINE_DATABASE__URL", "postgresql+psycopg://maskline@127.0.0.1:1/maskline")
    done = maskline(*command)
    assert done.status == 1
    assert done.err.startswith("maskline: the database cannot be used: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_data_folder_that_is_a_file_is_told_in_one_line(maskline: Maskline, folder: Path, command: str) -> None:
    (folder / "data").write_text("of somebody else")
    done = maskline(command, "--data", "data")
    assert done.status == 2
    assert "Invalid value for '--data'" in done.err


def test_a_folder_that_cannot_be_written_is_told_in_one_line(maskline: Maskline, folder: Path) -> None:
    (folder / "blocked").write_text("")
    done = maskline("demo", "--out", "blocked/below")
    assert done.status == 1
    assert done.err.startswith("maskline: blocked/below")
    assert done.err.endswith(": Not a directory\n")


def test_a_pipe_that_closes_is_no_error(folder: Path) -> None:
    """`maskline … --help | head -1` and the like."""
    program = os.path.join(os.path.dirname(sys.executable), "maskline")
    piped = f"set -o pipefail; {shlex.quote(program)} --help | head -1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "Usage: maskline [OPTIONS] COMMAND [ARGS]...\n"
    assert done.stderr == ""
