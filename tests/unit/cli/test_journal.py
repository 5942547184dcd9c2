"""The journal of an archive: what it keeps, through the death of whoever writes it, and whom it lets in."""

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.failures import Failure, Misuse
from cli.journal import Entry, Journal, open_journal

ENTRY = Entry(name="day.mp4", size_bytes=10, mtime_ns=1, upload_id="u1")


def open_it(
    out: Path, *, source: str = "/recordings", mode: str = "demo", overlay: bool = False
) -> AbstractContextManager[Journal]:
    options = {"outputs": ["mask", "overlay"]} if overlay else {}
    return open_journal(out, source=source, mode=mode, options=options)


def test_what_is_written_is_there_for_the_next(tmp_path: Path) -> None:
    odd = replace(ENTRY, name=os.fsdecode(b"caf\xe9/" + b"long" * 200))
    with open_it(tmp_path) as journal:
        journal.write(ENTRY)
        journal.write(odd)
        journal.write(replace(ENTRY, job_id="j1"))
    with open_it(tmp_path) as journal:
        assert journal.read("day.mp4") == replace(ENTRY, job_id="j1")
        assert journal.read("night.mp4") is None
        assert journal.entries() == [odd, replace(ENTRY, job_id="j1")]


def test_a_job_is_known_by_its_upload_and_how_often_that_was_submitted() -> None:
    keys = {each.idempotency_key for each in (ENTRY, replace(ENTRY, submission=1), replace(ENTRY, upload_id="u2"))}
    assert len(keys) == 3
    assert replace(ENTRY, job_id="j1").idempotency_key == ENTRY.idempotency_key


def test_nobody_else_has_it_open(tmp_path: Path) -> None:
    with open_it(tmp_path), pytest.raises(Failure, match="is at work on"), open_it(tmp_path):
        pass


def test_whoever_dies_lets_go_of_it(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from cli.journal import open_journal\n"
        "held = open_journal(Path(sys.argv[1]), source='/recordings', mode='demo', options={})\n"
        "held.__enter__(); os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert died.returncode == -9
    with open_it(tmp_path) as journal:
        assert journal.entries() == []


def test_what_a_killed_write_left_is_swept_away(tmp_path: Path) -> None:
    with open_it(tmp_path) as journal:
        journal.write(ENTRY)
    [path] = (tmp_path / ".archive" / "recordings").iterdir()
    half = path.with_name(f".{path.name}.{'0' * 32}")
    half.write_text('{"name": "da')
    with open_it(tmp_path) as journal:
        assert journal.entries() == [ENTRY]
    assert not half.exists()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"source": "/elsewhere"}, 'source "/recordings", not "/elsewhere"'),
        ({"mode": "fast"}, 'mode "demo", not "fast"'),
        ({"overlay": True}, 'options {}, not {"outputs": ["mask", "overlay"]}'),
    ],
)
def test_results_of_another_kind_do_not_go_into_the_same_folder(
    tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    with open_it(tmp_path) as journal:
        journal.write(ENTRY)
    with pytest.raises(Misuse) as caught, open_it(tmp_path, **other):
        pass
    assert says in str(caught.value)


def test_a_mistake_of_which_nothing_came_does_not_bind(tmp_path: Path) -> None:
    with open_it(tmp_path, source="s3://bucket/tpyo/"):
        pass
    with open_it(tmp_path, source="s3://bucket/typo/") as journal:
        assert journal.common.source == "s3://bucket/typo/"


def test_the_same_command_again_has_the_same_batch_key(tmp_path: Path) -> None:
    with open_it(tmp_path) as journal:
        first = journal.common.batch_key
    with open_it(tmp_path) as journal:
        assert journal.common.batch_key == first


def test_an_entry_that_is_no_entry_is_told_with_its_place(tmp_path: Path) -> None:
    with open_it(tmp_path) as journal:
        journal.write(ENTRY)
        [path] = (tmp_path / ".archive" / "recordings").iterdir()
        path.write_text("[]")
        with pytest.raises(Failure, match=rf"{path} cannot be understood; delete it"):
            journal.entries()
