"""The client sends large files in parts, to the real API and storage, over lines that break."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from cli import uploads
from cli.exchange import ATTEMPTS, ApiError, ServiceUnreachable, refusal
from cli.failures import Failure
from cli.uploads import Json
from shared.config import Api, Settings
from shared.db import SessionFactory
from shared.models import Upload
from shared.multipart import MEBIBYTE, SMALLEST_PART_BYTES
from shared.storage import Storage
from tests.integration.conftest import read_only, serve

Resume: TypeAlias = Callable[..., str]

SIZE_BYTES = 11 * MEBIBYTE + 1
PARTS = 3


class Line(httpx2.HTTPTransport):
    """To the storage. `trouble` is told the number of each part, and may answer in its place or raise."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, str]] = []
        self.trouble: Callable[[int, int], httpx2.Response | None] = lambda _number, _attempt: None
        self._lock = threading.Lock()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        number = int(request.url.params.get("partNumber", 0))
        with self._lock:
            self.sent.append((number, str(request.url)))
            attempt = self.numbers().count(number)
        return self.trouble(number, attempt) or super().handle_request(request)

    def numbers(self) -> list[int]:
        return [number for number, _ in self.sent]


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def api(settings: Settings, storage: Storage, api_key: str) -> Iterator[TestClient]:
    limits = Api(single_upload_bytes=MEBIBYTE, part_bytes=SMALLEST_PART_BYTES)
    with serve(settings.model_copy(update={"api": limits}), key=api_key) as client:
        yield client


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def resume(api: TestClient, line: Line) -> Iterator[Resume]:
    def ask(method: str, path: str, body: Json | None) -> Json:
        answer = api.request(method, path, json=body)
        if not answer.is_success:
            raise refusal(answer)
        said: Json = answer.json()
        return said

    def ignore(_: object) -> None:
        pass

    def go_on(
        path: Path, begun: str | None, announce: Callable[[str], None] = ignore, count: Callable[[int], None] = ignore
    ) -> str:
        return uploads.send(path, ask=ask, storage=http, begun=begun, on_announced=announce, on_bytes=count)

    with httpx2.Client(transport=line) as http:
        yield go_on


@pytest.fixture
def send(resume: Resume) -> Callable[[Path], str]:
    return lambda path: resume(path, None)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE_BYTES))
    return path


def arrived(storage: Storage, sessions: SessionFactory) -> bytes:
    row = read_only(sessions, Upload)
    assert row.etag
    return storage.read(row.storage_key, etag=row.etag, limit_bytes=2 * SIZE_BYTES)


def test_a_large_file_arrives_in_parts(
    send: Callable[[Path], str], line: Line, recording: Path, storage: Storage, sessions: SessionFactory
) -> None:
    assert send(recording) == str(read_only(sessions, Upload).id)
    assert sorted(line.numbers()) == [1, 2, 3]
    assert arrived(storage, sessions) == recording.read_bytes()


def test_a_small_file_is_one_put(
    send: Callable[[Path], str], line: Line, tmp_path: Path, storage: Storage, api: TestClient
) -> None:
    path = tmp_path / "small.png"
    path.write_bytes(b"x" * MEBIBYTE)
    upload_id = send(path)
    assert line.numbers() == [0]
    assert api.post(f"/v1/uploads/{upload_id}/complete").json()["completed"] is True


def test_parts_that_were_not_taken_are_sent_again_and_no_others(
    send: Callable[[Path], str], line: Line, recording: Path, storage: Storage, sessions: SessionFactory
) -> None:
    def trouble(number: int, attempt: int) -> httpx2.Response | None:
        if (number, attempt) == (2, 1):
            raise httpx2.WriteError("the line broke")
        return httpx2.Response(503) if number == 3 and attempt < 3 else None

    line.trouble = trouble
    send(recording)
    assert sorted(line.numbers()) == [1, 2, 2, 3, 3, 3]
    assert arrived(storage, sessions) == recording.read_bytes()


def test_an_upload_that_was_cut_off_continues_with_the_missing_parts(
    resume: Resume, line: Line, recording: Path, storage: Storage, sessions: SessionFactory
) -> None:
    announced: list[str] = []
    line.trouble = lambda number, _attempt: httpx2.Response(403) if number == 2 else None
    with pytest.raises(ApiError):
        resume(recording, None, announced.append)
    line.trouble, line.sent = (lambda _number, _attempt: None), []
    counted: list[int] = []

    assert resume(recording, announced[0], announced.append, counted.append) == announced[0]

    assert line.numbers() == [2]
    assert sum(counted) == SIZE_BYTES
    assert len(announced) == 1
    assert arrived(storage, sessions) == recording.read_bytes()


def test_an_upload_that_is_complete_is_not_sent_again(resume: Resume, line: Line, recording: Path) -> None:
    upload_id = resume(recording, None)
    line.sent.clear()
    assert resume(recording, upload_id) == upload_id
    assert line.sent == []


def test_an_upload_that_the_service_forgot_begins_anew(
    resume: Resume, line: Line, recording: Path, api: TestClient
) -> None:
    forgotten = resume(recording, None)
    api.delete(f"/v1/uploads/{forgotten}").raise_for_status()
    line.sent.clear()
    assert resume(recording, forgotten) != forgotten
    assert sorted(line.numbers()) == [1, 2, 3]


def test_whoever_counts_the_bytes_can_give_the_upload_up(resume: Resume, line: Line, recording: Path) -> None:
    class Enough(Exception):
        pass

    def count(_count: int) -> None:
        if line.sent:
            raise Enough

    with pytest.raises(Enough):
        resume(recording, None, lambda _upload_id: None, count)
    assert len(line.sent) <= PARTS


def test_bytes_of_a_part_that_was_not_taken_do_not_count(resume: Resume, line: Line, recording: Path) -> None:
    def trouble(number: int, attempt: int) -> httpx2.Response | None:
        return httpx2.Response(503) if (number, attempt) == (1, 1) else None

    counted: list[int] = []
    line.trouble = trouble
    resume(recording, None, lambda _upload_id: None, counted.append)
    assert sum(counted) == SIZE_BYTES


def test_a_part_is_sent_again_by_a_fresh_link(
    send: Callable[[Path], str], line: Line, recording: Path, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one may have run out."""
    monkeypatch.setattr(uploads, "PAUSE_SECONDS", 1.1)  # links differ by the second in which they are made
    line.trouble = lambda number, attempt: httpx2.Response(403) if (number, attempt) == (2, 1) else None
    send(recording)
    first, second = [url for number, url in line.sent if number == 2]
    assert first != second


def test_a_storage_that_stays_away_ends_the_upload(send: Callable[[Path], str], line: Line, recording: Path) -> None:
    def trouble(_number: int, _attempt: int) -> httpx2.Response | None:
        raise httpx2.ConnectError("nobody there")

    line.trouble = trouble
    with pytest.raises(ServiceUnreachable, match="nobody there"):
        send(recording)
    assert len(line.sent) == ATTEMPTS * PARTS


def test_a_storage_that_refuses_one_part_for_good_ends_the_upload(
    send: Callable[[Path], str], line: Line, recording: Path, sessions: SessionFactory
) -> None:
    line.trouble = lambda number, _attempt: httpx2.Response(403) if number == 2 else None
    with pytest.raises(ApiError, match="did not take"):
        send(recording)
    assert line.numbers().count(1) == 1
    assert read_only(sessions, Upload).etag is None


def test_a_file_that_changes_meanwhile_is_not_submitted(
    send: Callable[[Path], str], line: Line, recording: Path
) -> None:
    def trouble(_number: int, _attempt: int) -> None:
        recording.touch()

    line.trouble = trouble
    with pytest.raises(Failure, match="written to"):
        send(recording)


def test_a_file_cut_short_meanwhile_is_not_submitted(send: Callable[[Path], str], line: Line, recording: Path) -> None:
    def trouble(_number: int, _attempt: int) -> None:
        recording.write_bytes(b"short")

    line.trouble = trouble
    with pytest.raises(Failure, match="became shorter"):
        send(recording)
