"""Where the service is: what was typed, then the environment, then the nearest stack that is alive."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.access import Access, NoService, find_access, find_stack, load_service_settings, read_stack
from cli.failures import Failure, Misuse


def describe_stack(folder: Path, *, pid: int | None = None, port: int = 8000) -> Path:
    data = folder / ".maskline"
    data.mkdir(parents=True)
    description = {
        "url": f"http://127.0.0.1:{port}",
        "api_key": "mk_local",
        "webhook_secret": "whsec_x",
        "pid": os.getpid() if pid is None else pid,
        "pids": {"api": 12, "gpu0": 13},
        "environment": {"MASKLINE_DATABASE__URL": "postgresql+psycopg://maskline@127.0.0.1:1/local"},
    }
    (data / "stack.json").write_text(json.dumps(description))
    return data


def find_ended_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_the_nearest_stack_above_is_the_one(folder: Path) -> None:
    describe_stack(folder, port=8001)
    describe_stack(folder / "project", port=8002)
    (folder / "project" / "photos").mkdir()
    found = find_access(url=None, api_key=None, folder=folder / "project" / "photos")
    assert found == Access(url="http://127.0.0.1:8002", api_key="mk_local")


def test_a_stack_whose_owner_was_killed_is_none(folder: Path) -> None:
    data = describe_stack(folder, pid=find_ended_process())
    assert read_stack(data) is None
    with pytest.raises(NoService, match="maskline up"):
        find_access(url=None, api_key=None, folder=folder)


def test_what_was_typed_needs_no_stack(folder: Path) -> None:
    (folder / ".maskline").mkdir()
    (folder / ".maskline" / "stack.json").write_text("damaged")
    found = find_access(url="http://127.0.0.1:9", api_key="mk_typed", folder=folder)
    assert found == Access(url="http://127.0.0.1:9", api_key="mk_typed")


def test_the_local_key_is_given_to_no_other_service(folder: Path) -> None:
    describe_stack(folder)
    assert find_access(url="http://127.0.0.1:8000/", api_key=None, folder=folder).api_key == "mk_local"
    with pytest.raises(Misuse, match="needs an API key"):
        find_access(url="http://127.0.0.1:8001", api_key=None, folder=folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"url": 1}', '{"pids": [], "url": "", "api_key": "", "environment": 1}']
)
def test_a_damaged_description_is_told_in_a_sentence(folder: Path, text: str) -> None:
    (folder / ".maskline").mkdir()
    (folder / ".maskline" / "stack.json").write_text(text)
    with pytest.raises(Failure, match=r"stack\.json cannot be understood"):
        find_stack(folder)


def test_settings_are_the_stacks_unless_the_environment_names_servers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe_stack(folder)
    monkeypatch.setenv("MASKLINE_DATABASE__URL", "postgresql+psycopg://maskline@127.0.0.1:1/mine")
    assert load_service_settings(folder=folder).database.url.endswith("/mine")
    monkeypatch.delenv("MASKLINE_DATABASE__URL")
    assert load_service_settings(folder=folder).database.url.endswith("/local")
