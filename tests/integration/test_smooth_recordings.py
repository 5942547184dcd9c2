"""Recordings smoothed in chunks: the same bits as in one piece, and nothing of a chunk's neighbours in its files."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from sqlalchemy import select
from starlette.testclient import TestClient

from shared.broker import IO
from shared.config import Recordings, Settings
from shared.contract import SMOOTH_WINDOW
from shared.db import SessionFactory
from shared.inference.mask_video import read_masks
from shared.inference.smoothing import Smoother
from shared.models import Step, StepKind
from tests.integration.conftest import Submit, problem
from tests.integration.workbench import Workbench
from tests.recordings import FRAMES, encode, packet_places, read_number

Mask = NDArray[np.uint8]
LOST = (9, 21)
"""Frames that are destroyed: just before a chunk of ten begins, and just after one did."""


def flicker(image: Mask) -> Mask:
    """A mask that is another in every frame, and the same for a frame whenever it is looked at."""
    return np.random.default_rng(read_number(image)).integers(1, 4, image.shape[:2], dtype=np.uint8)


@pytest.fixture(scope="module")
def recording() -> bytes:
    """Every frame by itself, so that chunks begin at any and a destroyed one takes no other with it."""
    buffer = io.BytesIO()
    encode(buffer, "mjpeg", container="avi", pixel_format="yuvj420p")
    return buffer.getvalue()


@pytest.fixture
def make(
    submit: Submit, workbench: Workbench, settings: Settings, sessions: SessionFactory, api: TestClient
) -> Callable[..., "Made"]:
    """Make a recording in chunks of so many frames."""

    def run(file: bytes, *, chunk_frames: int, batch_images: int = 1, **options: Any) -> Made:
        answer = submit(file=file, options={"outputs": ["mask", "confidence"], **options})
        assert answer.status_code == 202, answer.text
        planned = settings.model_copy(
            update={"recordings": Recordings(chunk_seconds=chunk_frames / 2)}
        )  # half a second per frame is assumed, until a job has been made
        workers = replace(workbench, settings=planned, label=flicker, batch_images=batch_images)
        workers.run(queue_name=IO)
        engine = workers.run()
        workers.run(queue_name=IO)
        return Made(answer.json()["id"], sessions, api, segmented=len(engine.asked))

    return run


class Made:
    """What a job has become; `segmented` is how many frames the model was shown."""

    def __init__(self, job_id: str, sessions: SessionFactory, api: TestClient, *, segmented: int) -> None:
        self.segmented = segmented
        self.job = api.get(f"/v1/jobs/{job_id}").json()
        assert self.job["state"] == "succeeded", self.job["error"]
        self.manifest = api.get(f"/v1/jobs/{job_id}/result").json()
        with sessions() as session:
            steps = select(Step).where(Step.job_id == job_id, Step.kind == StepKind.INFER)
            self.chunks = len(session.scalars(steps).all())

    def masks(self) -> list[Mask]:
        return [mask for _, mask in read_masks(io.BytesIO(self.fetch("masks.mkv")))]

    def areas(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(io.BytesIO(self.fetch("areas.parquet"))).to_pylist()
        return rows

    def fetch(self, name: str) -> bytes:
        [file] = [each for each in self.manifest["files"] if each["name"] == name]
        return httpx2.get(file["url"]).raise_for_status().content


Make = Callable[..., Made]


def smooth(masks: list[Mask | None], window: int) -> list[Mask]:
    """The filter over a whole recording, as files have it: 0 everywhere for a frame that is lost."""
    smoother = Smoother(window)
    made = [smoother.smooth(mask) for mask in masks]
    return [np.zeros((64, 96), np.uint8) if mask is None else mask for mask in made]


def expected(numbers: range, *, lost: tuple[int, ...] = ()) -> list[Mask | None]:
    def see(number: int) -> Mask:
        return np.random.default_rng(number).integers(1, 4, (64, 96), dtype=np.uint8)

    return [None if number in lost else see(number) for number in numbers]


@pytest.mark.parametrize(
    ("options", "window", "numbers"),
    [
        ({"smooth": True}, SMOOTH_WINDOW, range(FRAMES)),
        ({"smooth": 15}, 15, range(FRAMES)),
        ({"smooth": 3, "frames": {"every": 3, "from_seconds": 0.12}}, 3, range(3, FRAMES, 3)),
    ],
    ids=["by the default", "over more than a chunk", "of a selection"],
)
def test_chunks_are_smoothed_as_the_whole_is(
    make: Make, recording: bytes, options: Any, window: int, numbers: range
) -> None:
    whole = make(recording, chunk_frames=1000, **options)
    chunks = make(recording, chunk_frames=len(numbers) // 4, batch_images=3, **options)
    assert (whole.chunks, whole.segmented) == (1, len(numbers))
    assert chunks.chunks > 2
    assert chunks.segmented <= len(numbers) + (chunks.chunks - 1) * (window - 1)
    assert chunks.job["progress"]["done"] == chunks.job["timing"]["frames"] == len(numbers)
    np.testing.assert_array_equal(chunks.masks(), whole.masks())
    np.testing.assert_array_equal(chunks.masks(), smooth(expected(numbers), window))
    assert chunks.areas() == whole.areas()
    assert chunks.manifest["classes"] == whole.manifest["classes"]
    assert sum(row["pixels"] for row in chunks.areas()) == len(numbers) * 64 * 96


def test_a_lost_frame_has_no_say_on_either_side_of_a_border(make: Make, recording: bytes, tmp_path: Any) -> None:
    path = tmp_path / "whole.avi"
    path.write_bytes(recording)
    damaged = bytearray(recording)
    for number in LOST:
        place, size = packet_places(path)[number]
        damaged[place : place + size] = b"\xff" * size
    options = {"smooth": 4, "max_bad_frames": 0.5}
    whole = make(bytes(damaged), chunk_frames=1000, **options)
    chunks = make(bytes(damaged), chunk_frames=10, **options)
    assert whole.manifest["frames"]["bad"] == chunks.manifest["frames"]["bad"] == list(LOST)
    np.testing.assert_array_equal(chunks.masks(), smooth(expected(range(FRAMES), lost=LOST), 4))
    np.testing.assert_array_equal(chunks.masks(), whole.masks())


def test_without_the_option_every_mask_is_the_models_own(make: Make, recording: bytes) -> None:
    made = make(recording, chunk_frames=10)
    assert made.segmented == FRAMES
    np.testing.assert_array_equal(made.masks(), expected(range(FRAMES)))


@pytest.mark.parametrize("smooth", [True, 5])
def test_an_image_cannot_be_smoothed(submit: Submit, smooth: bool | int) -> None:
    assert "smooth" in problem(submit(options={"smooth": smooth}), 422, "kind_mismatch")["detail"]
