"""What `maskline archive` finds in a folder, whatever else lies there."""

import os
from pathlib import Path

import pytest

from cli.folder import search
from cli.journal import open_journal

RECORDING = b"FLV\x01" + bytes(100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.flv", "a/z.flv", "a/b/no-ending", "C.MP4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(RECORDING)
    return tmp_path


def test_recordings_are_found_at_any_depth_and_in_order(folder: Path) -> None:
    assert search(folder).recordings == ["C.MP4", "a/b/no-ending", "a/z.flv", "b.flv"]


def test_what_only_looks_like_a_recording_is_something_else(folder: Path) -> None:
    (folder / "empty.mp4").touch()
    (folder / "letter.mp4").write_text("Dear reader")
    os.mkfifo(folder / "pipe.mp4")  # to open it would be to wait
    assert search(folder).others == ["empty.mp4", "letter.mp4", "pipe.mp4"]


def test_hidden_files_and_folders_are_left_out(folder: Path) -> None:
    (folder / ".b.flv").write_bytes(RECORDING)
    (folder / ".trash").mkdir()
    (folder / ".trash" / "b.flv").write_bytes(RECORDING)
    assert len(search(folder).recordings) == 4


def test_a_link_to_a_file_is_the_file_and_one_to_a_folder_is_not_followed(folder: Path) -> None:
    (folder / "linked.flv").symlink_to("b.flv")
    (folder / "a" / "round").symlink_to(folder)
    found = search(folder)
    assert "linked.flv" in found.recordings
    assert len(found.recordings) == 5


def test_masks_of_an_archive_inside_are_no_recordings_of_it(folder: Path) -> None:
    out = folder / "masks"
    with open_journal(out, source="a source", mode="demo", options={}):
        (out / "b.flv").mkdir()
        (out / "b.flv" / "masks.mkv").write_bytes(RECORDING)
        assert len(search(folder).recordings) == 4


def test_what_cannot_be_read_is_told_with_its_reason_and_keeps_nothing_back(folder: Path) -> None:
    (folder / "dangling.mp4").symlink_to("nowhere")
    found = search(folder)
    assert found.unreadable == {"dangling.mp4": "No such file or directory"}
    assert len(found.recordings) == 4


def test_a_name_that_is_no_text_is_a_name(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.flv")
    (folder / name).write_bytes(RECORDING)
    assert name in search(folder).recordings
