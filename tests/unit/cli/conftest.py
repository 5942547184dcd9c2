"""The command as it is typed, run in this process, in an empty folder and with nothing of ours in the environment."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from cli import main


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


Maskline: TypeAlias = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in [name for name in os.environ if name.startswith("MASKLINE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def maskline(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Maskline:
    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["maskline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.run()
        written = capsys.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return Done(status, written.out, written.err)

    return run
