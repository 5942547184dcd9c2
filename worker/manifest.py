"""The manifest of a result: written last, it names every file of it and says what made them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import faults
from shared.contract import Model
from shared.inference.modes import MODES
from shared.lifecycle import ClaimedStep
from shared.storage import attempt_prefix
from worker.desk import Desk

if TYPE_CHECKING:
    from shared.inference.engine import Segmentation

MANIFEST_SCHEMA = 1
HIDDEN = ("key", "bucket")
"""What a source's description has for us alone."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is published: where the manifest lies, what made the masks, and the seconds of each stage.

    There is no model where no frame of a recording could be decoded.
    """

    manifest_key: str
    model: dict[str, Any] | None
    timing: dict[str, Any]


def prefix_of(claimed: ClaimedStep) -> str:
    """Where the files of this attempt go."""
    job = claimed.job
    return attempt_prefix(job.tenant_id, job.id, ordinal=claimed.ordinal, attempt=claimed.lease.attempt)


def store(desk: Desk, prefix: str, name: str, content: bytes | Path, *, content_type: str) -> dict[str, Any]:
    """Put one file of a result in its place, and describe it as manifests do."""
    desk.checkpoint()
    key = f"{prefix}{name}"
    if isinstance(content, Path):
        with content.open("rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), content.stat().st_size
        desk.storage.put_file(key, content, content_type=content_type)
    else:
        digest, size = hashlib.sha256(content).hexdigest(), len(content)
        desk.storage.put(key, content, content_type=content_type)
    return {"name": name, "key": key, "size": size, "sha256": digest, "content_type": content_type}


def describe_model(made: "Segmentation") -> dict[str, Any]:
    info = made.model
    model = Model(name=info.name, revision=info.revision, dtype=info.dtype, input_size=info.input_size)
    return model.model_dump(mode="json")


def store_manifest(
    claimed: ClaimedStep,
    desk: Desk,
    *,
    model: dict[str, Any] | None,
    timing: dict[str, Any],
    source: Mapping[str, Any],
    areas: Mapping[int, int],
    warnings: Sequence[str],
    files: Sequence[dict[str, Any]],
    **more: Any,
) -> Result:
    """Write it, with what it says of `source` added to the job's own, and `areas` the pixels of each class id."""
    job, labels = claimed.job, MODES[claimed.job.mode].labels
    labeled = sum(areas.values())
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "job_id": str(job.id),
        "attempt": claimed.lease.attempt,
        "created_at": datetime.now(UTC).isoformat(),
        "mode": job.mode,
        "model": model,
        "options": job.options,
        "source": {**{name: value for name, value in job.source.items() if name not in HIDDEN}, **source},
        "label_space": labels.name,
        "classes": [
            {"id": number, "name": labels.classes[number], "pixels": pixels, "fraction": pixels / labeled}
            for number, pixels in sorted(areas.items())
        ],
        "warnings": list(warnings),
        "timing": timing,
        **more,
        "files": list(files),
    }
    manifest_key = f"{prefix_of(claimed)}manifest.json"
    desk.checkpoint()
    faults.reach("manifest-unwritten")
    desk.storage.put(manifest_key, json.dumps(manifest, indent=1).encode(), content_type="application/json")
    return Result(manifest_key=manifest_key, model=model, timing=timing)
