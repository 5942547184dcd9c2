"""Large objects: read in ranges, as files, moved to and from disk, on the real S3 server."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import av
import numpy as np
import pytest
from pydantic import SecretStr

from shared import config
from shared.errors import SourceChanged, SourceMissing, StorageUnavailable
from shared.s3 import tell_time
from shared.storage import Storage
from tests.integration.scripted import Answer, ScriptedService, hang_up, run_scripted, say

FRAMES = 50
KEY = "a/key"
LARGE_BYTES = 40 * 2**20 + 1


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    noise = np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(FRAMES):
            picture = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


@pytest.fixture
def flaky() -> Iterator[tuple[Storage, ScriptedService]]:
    """A storage that answers what a test tells it to."""
    with run_scripted() as service:
        secret = SecretStr("secret")
        settings = config.Storage(endpoint_url=service.url, access_key="key", secret_key=secret)
        yield Storage.from_settings(settings), service


def say_half(content: bytes, *, of: int) -> Answer:
    """The line breaks after these bytes."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        say(206, content, etag='"e"', **{"content-length": str(of)})(handler)
        hang_up(handler)

    return answer


def test_a_range_is_a_part_of_the_object(storage: Storage) -> None:
    etag = storage.put(KEY, b"0123456789", content_type="a/b").etag
    assert storage.read_range(KEY, 2, 3) == b"234"
    assert storage.read_range(KEY, 2, 3, etag=etag) == b"234"
    assert storage.read_range(KEY, 8, 5) == b"89"
    assert storage.read_range(KEY, 10, 5) == b""
    assert storage.read_range(KEY, 3, 0) == b""


def test_a_range_of_nothing_that_is_there_is_missing(storage: Storage) -> None:
    with pytest.raises(SourceMissing):
        storage.read_range(KEY, 0, 1)


def test_a_range_of_a_replaced_object_is_not_given(storage: Storage) -> None:
    etag = storage.put(KEY, b"before", content_type="a/b").etag
    storage.put(KEY, b"after!", content_type="a/b")
    with pytest.raises(SourceChanged):
        storage.read_range(KEY, 0, 1, etag=etag)


def test_an_answer_cut_short_is_asked_for_again(flaky: tuple[Storage, ScriptedService]) -> None:
    storage, service = flaky
    service.script(say_half(b"012", of=5), say(206, b"01234", etag='"e"'))
    assert storage.read_range(KEY, 0, 5, etag="e") == b"01234"


def test_answers_always_cut_short_are_an_outage(flaky: tuple[Storage, ScriptedService]) -> None:
    storage, service = flaky
    service.always[f"/maskline/{KEY}"] = say_half(b"012", of=5)
    with pytest.raises(StorageUnavailable):
        storage.read_range(KEY, 0, 5, etag="e")
    assert len(service.asked) == 3
    with pytest.raises(StorageUnavailable):
        storage.read(KEY, etag="e", limit_bytes=100)


def test_a_video_is_decoded_from_the_storage(storage: Storage, video: Path) -> None:
    storage.put_file(KEY, video, content_type="video/mp4")
    stored = storage.head(KEY)
    with (
        storage.open(KEY, etag=stored.etag, size_bytes=stored.size_bytes) as file,
        av.open(file, "r") as container,
        av.open(video, "r") as local,
    ):
        from_storage = [frame.to_ndarray() for frame in container.decode(video=0)]
        from_disk = [frame.to_ndarray() for frame in local.decode(video=0)]
        assert len(from_storage) == FRAMES
        np.testing.assert_array_equal(from_storage, from_disk)
        container.seek(0)
        assert next(container.decode(video=0)).pts == 0


def test_a_video_replaced_meanwhile_is_not_read_on(storage: Storage, video: Path) -> None:
    """The media library passes our own error on."""
    storage.put_file(KEY, video, content_type="video/mp4")
    stored = storage.head(KEY)
    with storage.open(KEY, etag=stored.etag, size_bytes=stored.size_bytes) as file:
        storage.put(KEY, video.read_bytes()[:-1], content_type="video/mp4")
        with pytest.raises(SourceChanged):
            av.open(file)


def test_a_large_file_comes_back_as_it_was(storage: Storage, tmp_path: Path) -> None:
    """Large: it goes in parts."""
    path, back = tmp_path / "large", tmp_path / "back"
    path.write_bytes(np.random.default_rng(0).bytes(LARGE_BYTES))
    storage.put_file(KEY, path, content_type="video/mp4")
    stored = storage.head(KEY)
    assert stored.size_bytes == LARGE_BYTES
    storage.download(KEY, back, etag=stored.etag, size_bytes=stored.size_bytes)
    assert back.read_bytes() == path.read_bytes()


def test_a_file_that_cannot_be_stored_is_an_outage(closed_port: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    settings = config.Storage(
        endpoint_url=f"http://127.0.0.1:{closed_port}", access_key="key", secret_key=SecretStr("secret")
    )
    with pytest.raises(StorageUnavailable):
        Storage.from_settings(settings).put_file(KEY, path, content_type="a/b")


def test_a_large_file_that_the_storage_refuses_is_an_outage(
    flaky: tuple[Storage, ScriptedService], tmp_path: Path
) -> None:
    storage, service = flaky
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES)
    service.always[f"/maskline/{KEY}"] = say(403, b"")
    with pytest.raises(StorageUnavailable):
        storage.put_file(KEY, path, content_type="a/b")


def test_a_download_that_fails_leaves_no_file(storage: Storage, tmp_path: Path) -> None:
    etag = storage.put(KEY, b"before", content_type="a/b").etag
    storage.put(KEY, b"after!", content_type="a/b")
    with pytest.raises(SourceChanged):
        storage.download(KEY, tmp_path / "file", etag=etag, size_bytes=6)
    with pytest.raises(SourceChanged):
        storage.download(KEY, tmp_path / "file", size_bytes=7)
    with pytest.raises(SourceMissing):
        storage.download("another/key", tmp_path / "file", size_bytes=6)
    assert list(tmp_path.iterdir()) == []


# --- incomplete uploads --------------------------------------------------------------------------------------------


def test_a_storage_that_does_not_list_incomplete_uploads_is_done_without_that(
    flaky: tuple[Storage, ScriptedService], caplog: pytest.LogCaptureFixture
) -> None:
    storage, service = flaky
    refused = say(501, "<Error><Code>NotImplemented</Code></Error>")
    service.script(refused, refused, say(200, "<ListBucketResult></ListBucketResult>"))
    assert list(storage.multipart.list_begun("tenants/")) == []
    assert storage.delete_prefix("tenants/") == 0
    assert len([each for each in caplog.records if "incomplete uploads" in each.getMessage()]) == 1


def test_a_storage_that_cannot_be_had_is_not_taken_for_one_that_has_no_incomplete_uploads(
    flaky: tuple[Storage, ScriptedService],
) -> None:
    storage, service = flaky
    service.script(say(403, "<Error><Code>AccessDenied</Code></Error>"))
    with pytest.raises(StorageUnavailable):
        list(storage.multipart.list_begun("tenants/"))


@pytest.mark.parametrize("told", [{}, {"date": "soon"}, {"date": "Mon, 23 Nov 2026 19:00:00 -0000"}])
def test_a_storage_that_does_not_tell_the_time_has_nothing_old(told: dict[str, str]) -> None:
    assert tell_time({"ResponseMetadata": {"HTTPHeaders": told}}) is None
