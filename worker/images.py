"""An image becomes a result: fetched, decoded, segmented, encoded, stored, and last of all its manifest."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from shared.contract import Model, Options
from shared.errors import SourceTooLarge
from shared.inference import masks, media
from shared.inference.modes import MODES
from shared.lifecycle import ClaimedStep
from shared.models import Job
from shared.storage import attempt_prefix
from worker.desk import Desk, Result

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared.inference.engine import Segmentation
    from shared.inference.recipe import Recipe

MANIFEST_SCHEMA = 1


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
    with _timed(seconds, "download"):
        source = _fetch(job, desk)
    desk.checkpoint()
    with _timed(seconds, "decode"):
        image = media.read_image(source, max_pixels=desk.settings.worker.image_pixels)
    desk.tell("segmenting")
    made = engine.segment(image, job.mode, options.recipe(), checkpoint=desk.checkpoint)
    desk.tell("storing")
    with _timed(seconds, "encode"):
        files = list(_encode(image, made, job.mode, options))
    prefix = attempt_prefix(job.tenant_id, job.id, ordinal=claimed.ordinal, attempt=claimed.lease.attempt)
    with _timed(seconds, "upload"):
        stored = [_store(desk, prefix, name, body) for name, body in files]
    model = _describe_model(made)
    timing = _describe_timing(made, seconds)
    manifest = _write_manifest(claimed, image, made, stored, model=model, timing=timing)
    manifest_key = f"{prefix}manifest.json"
    desk.checkpoint()
    desk.storage.put(manifest_key, manifest, content_type="application/json")
    return Result(manifest_key=manifest_key, model=model, timing=timing)


def _fetch(job: Job, desk: Desk) -> bytes:
    limit = desk.settings.worker.source_bytes
    if job.source["size_bytes"] > limit:
        raise SourceTooLarge(f"an image file may have at most {limit} bytes")
    return desk.storage.read(job.source["key"], etag=job.source["etag"], limit_bytes=limit)


def _encode(
    image: "NDArray[np.uint8]", made: "Segmentation", mode: str, options: Options
) -> Iterator[tuple[str, bytes]]:
    if "mask" in options.outputs:
        yield "mask.png", masks.encode_mask(made.mask)
    if made.confidence is not None:
        yield "confidence.png", masks.encode_mask(made.confidence)
    if "overlay" in options.outputs:
        yield "overlay.png", masks.encode_png(masks.overlay(image, made.mask, MODES[mode].labels))


def _store(desk: Desk, prefix: str, name: str, body: bytes) -> dict[str, Any]:
    desk.checkpoint()
    key = f"{prefix}{name}"
    desk.storage.put(key, body, content_type="image/png")
    digest = hashlib.sha256(body).hexdigest()
    return {"name": name, "key": key, "size": len(body), "sha256": digest, "content_type": "image/png"}


def _describe_model(made: "Segmentation") -> dict[str, Any]:
    info = made.model
    model = Model(name=info.name, revision=info.revision, dtype=info.dtype, input_size=info.input_size)
    return model.model_dump(mode="json")


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


def _write_manifest(
    claimed: ClaimedStep,
    image: "NDArray[np.uint8]",
    made: "Segmentation",
    files: list[dict[str, Any]],
    *,
    model: dict[str, Any],
    timing: dict[str, Any],
) -> bytes:
    job = claimed.job
    labels = MODES[job.mode].labels
    classes = [
        {"id": number, "name": labels.classes[number], "pixels": pixels, "fraction": pixels / made.mask.size}
        for number, pixels in masks.class_areas(made.mask).items()
    ]
    source = {name: value for name, value in job.source.items() if name != "key"}
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "job_id": str(job.id),
        "attempt": claimed.lease.attempt,
        "created_at": datetime.now(UTC).isoformat(),
        "mode": job.mode,
        "model": model,
        "options": job.options,
        "source": {**source, "width": image.shape[1], "height": image.shape[0]},
        "label_space": labels.name,
        "classes": classes,
        "warnings": list(made.warnings),
        "timing": timing,
        "files": files,
    }
    return json.dumps(manifest, indent=1).encode()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
