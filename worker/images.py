"""An image becomes a result: fetched, decoded, segmented, encoded, stored, and last of all its manifest."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from shared.contract import Options
from shared.errors import SourceTooLarge
from shared.inference import masks, media
from shared.inference.modes import MODES
from shared.lifecycle import ClaimedStep
from shared.models import Job
from worker.desk import Desk, timed
from worker.manifest import Result, describe_model, prefix_of, store, store_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared.inference.engine import Segmentation
    from shared.inference.recipe import Recipe


class Segmenter(Protocol):
    """The engine, or a round of steps that share it."""

    def segment(
        self, image: "NDArray[np.uint8]", mode: str, recipe: "Recipe", *, checkpoint: Callable[[], None]
    ) -> "Segmentation": ...


def make_result(claimed: ClaimedStep, desk: Desk, engine: Segmenter) -> Result:
    """Make and store everything but the publication.

    Keys belong to this attempt alone, so that a broken attempt leaves nothing another one could take for its own.
    Raises what storage, media and engine raise, and SourceTooLarge.
    """
    job, options = claimed.job, Options.model_validate(claimed.job.options)
    seconds: dict[str, float] = {}
    with timed(seconds, "download"):
        source = _fetch(job, desk)
    desk.checkpoint()
    with timed(seconds, "decode"):
        image = media.read_image(source, max_pixels=desk.settings.worker.image_pixels)
    desk.tell("segmenting")
    made = engine.segment(image, job.mode, options.recipe(), checkpoint=desk.checkpoint)
    desk.tell("storing")
    with timed(seconds, "encode"):
        files = list(_encode(image, made, job.mode, options))
    prefix = prefix_of(claimed)
    with timed(seconds, "upload"):
        stored = [store(desk, prefix, name, body, content_type="image/png") for name, body in files]
    return store_manifest(
        claimed, desk, model=describe_model(made), timing=_describe_timing(made, seconds),
        source={"width": image.shape[1], "height": image.shape[0]}, areas=masks.class_areas(made.mask),
        warnings=made.warnings, files=stored,
    )  # fmt: skip


def _fetch(job: Job, desk: Desk) -> bytes:
    limit = desk.settings.worker.source_bytes
    if job.source["size_bytes"] > limit:
        raise SourceTooLarge(f"an image file may have at most {limit} bytes")
    return desk.storage_of(job).read(job.source["key"], etag=job.source["etag"], limit_bytes=limit)


def _encode(
    image: "NDArray[np.uint8]", made: "Segmentation", mode: str, options: Options
) -> Iterator[tuple[str, bytes]]:
    if "mask" in options.outputs:
        yield "mask.png", masks.encode_mask(made.mask)
    if made.confidence is not None:
        yield "confidence.png", masks.encode_mask(made.confidence)
    if "overlay" in options.outputs:
        yield "overlay.png", masks.encode_png(masks.overlay(image, made.mask, MODES[mode].labels))


def _describe_timing(made: "Segmentation", seconds: dict[str, float]) -> dict[str, Any]:
    return {
        **{f"{stage}_seconds": round(spent, 6) for stage, spent in seconds.items()},
        "load_seconds": round(made.load_seconds, 6),
        "preprocess_seconds": round(made.preprocess_seconds, 6),
        "inference_seconds": round(made.inference_seconds, 6),
        "postprocess_seconds": round(made.postprocess_seconds, 6),
        "frames": 1,
        "peak_gpu_bytes": made.peak_gpu_bytes,
        "device": made.model.device,
    }
