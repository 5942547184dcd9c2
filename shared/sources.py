"""Where the file of a job comes from. What is not in the storage yet is fetched first, by a step of its own.

A job's `source` is {"url" or "bucket" and "key", "location", "filename", "expect"} until then, and afterwards
{"key", "etag", "size_bytes", "filename"}, with "bucket" and "location" for what lies elsewhere or came from there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from sqlalchemy.orm import Session

from shared import lifecycle
from shared.broker import GPU, IO
from shared.contract import Frames, JobKind, Options
from shared.errors import KindMismatch, SourceForbidden
from shared.locks import Lease
from shared.models import Step, StepKind

FIRST_STEPS: dict[JobKind | None, tuple[StepKind, str]] = {
    None: (StepKind.FETCH, IO),
    "image": (StepKind.INFER, GPU),
    "recording": (StepKind.PROBE, IO),
}
FILENAME_LENGTH = 255
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
TENANT = "{tenant}"
_S3_URL = re.compile(rf"s3://({BUCKET})/(.*)", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """An object in S3, or where the keys of several begin."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises ValueError for what is not `s3://bucket/key`."""
        found = _S3_URL.fullmatch(url)
        if found is None:
            raise ValueError("is not like s3://bucket/key")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def check_may_read(place: Place, tenant_name: str, *, readable: Iterable[str]) -> None:
    """Raises SourceForbidden unless one of `readable`, each `bucket` or `bucket/prefix/`, lets the tenant in.

    `{tenant}` in a prefix stands for the tenant's name.
    """
    for each in readable:
        bucket, _, prefix = each.partition("/")
        if TENANT in prefix and "/" in tenant_name:  # it would be let into another's
            continue
        if place.bucket == bucket and place.key.startswith(prefix.replace(TENANT, tenant_name)):
            return
    raise SourceForbidden(f"this service does not read {place} for you")


def check_kind(kind: JobKind, options: Options, *, filename: str, expect: JobKind | None = None) -> None:
    """Raises KindMismatch when something else was expected, or the options are not for a file of this kind."""
    if expect is not None and kind != expect:
        article = "an" if expect == "image" else "a"
        raise KindMismatch(f"{filename} is not {article} {expect}")
    if kind == "image" and options.frames != Frames():
        raise KindMismatch("an image has no frames to choose from: leave options.frames out")
    if kind == "image" and options.smooth:
        raise KindMismatch("an image has no frames before it to smooth it with: leave options.smooth out")


def describe_remote(place: Place | str, *, expect: JobKind | None) -> dict[str, Any]:
    """The `source` of a job whose file is in S3, or at a URL, and has to be fetched."""
    if isinstance(place, Place):
        name = clean_name(place.key)
        return {
            "bucket": place.bucket, "key": place.key, "location": str(place), "filename": name, "expect": expect,
        }  # fmt: skip
    parts = urlsplit(place)
    shown = parts._replace(query="", fragment="")  # what follows may be a signature
    name = clean_name(unquote(parts.path))
    return {"url": place, "location": shown.geturl(), "filename": name, "expect": expect}


def clean_name(path: str | None) -> str:
    """The last part of a path of whatever system, fit to be shown."""
    last = PureWindowsPath(PurePosixPath(path or "").name).name
    printable = "".join(character for character in last if character.isprintable())
    return printable[:FILENAME_LENGTH] or "file"


def finish_fetch(session: Session, lease: Lease, *, kind: JobKind, source: dict[str, Any]) -> Step:
    """End the fetch: the job has its source and kind, and the step that its kind begins with, which is returned.

    Raises LeaseLost; InvalidTransition when a cancel came first.
    """
    step, job = lifecycle.finish_step(session, lease)
    job.kind, job.source = kind, source
    next_kind, queue_name = FIRST_STEPS[kind]
    following = lifecycle.new_step(job, step.ordinal + 1, next_kind, queue_name)
    session.add(following)
    lifecycle.add_progress(session, step, job, stage="fetched", done=0)
    session.flush()
    return following
