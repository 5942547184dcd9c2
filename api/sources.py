"""What a submission names as its source, looked at as far as that costs no more than a moment.

A file is stored, an upload must be complete; what lies elsewhere is for a worker to fetch, and only whether it may be
is checked here. Nothing of this is a job yet: that is `api/acceptance.py`.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi.exceptions import RequestValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.deps import Resources
from api.errors import InvalidRequest
from api.routes.uploads import complete
from api.schemas import BATCH_ITEMS, JobSettings, NewBatchItem, NewSource
from api.submissions import SentFile
from shared.contract import JobKind
from shared.errors import (
    KindMismatch,
    NotFound,
    SourceChanged,
    SourceForbidden,
    SourceMissing,
    UploadIncomplete,
)
from shared.inference.signatures import HEAD_BYTES
from shared.kinds import tell_kind
from shared.models import Upload
from shared.sources import Place, check_kind, check_may_read, describe_remote
from shared.storage import source_key
from shared.tenants import Caller

LOOKERS = 8  # uploads of a batch that are looked at together; fewer than either pool has connections
TROUBLE = (NotFound, UploadIncomplete, SourceMissing, SourceChanged, SourceForbidden, KindMismatch, InvalidRequest)
"""What keeps one item of a batch from becoming a job, rather than all of them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    kind: JobKind | None
    """None for what has to be fetched first."""
    upload_id: uuid.UUID | None = None
    place: dict[str, Any]
    """As the job's row keeps it."""


Item = TypeVar("Item", NewSource, Upload, Source)


def store_file(resources: Resources, tenant: Caller, job_id: uuid.UUID, file: SentFile, wanted: JobSettings) -> Source:
    """Nothing is stored if it is not what was expected, or the options do not suit it."""
    head = file.body.read(HEAD_BYTES)
    file.body.seek(0)
    kind = tell_kind(head, filename=file.name, content_type=file.content_type)
    check_kind(kind, wanted.options, filename=file.name, expect=wanted.expect)
    key = source_key(tenant.id, job_id)
    stored = resources.storage.put(key, file.body, content_type=file.content_type)
    place = {"key": key, "etag": stored.etag, "size_bytes": stored.size_bytes, "filename": file.name}
    return Source(kind=kind, place=place)


def look_at(
    resources: Resources,
    session: Session,
    tenant: Caller,
    source: NewSource,
    wanted: JobSettings,
    upload: Upload | None,
) -> Source:
    """`upload` is the one that `source` names, if it names one and there is such a one.

    Raises what is TROUBLE, and StorageUnavailable.
    """
    if source.upload_id is None:
        return _look_elsewhere(resources, tenant, source, wanted)
    if upload is None:
        raise NotFound("there is no such upload")
    if upload.kind is None:
        session.commit()  # no connection is held while the storage is asked
        upload = complete(resources, tenant, upload)
    return _describe_upload(upload, wanted)


def look_at_items(
    resources: Resources, tenant: Caller, items: Sequence[NewBatchItem], wanted: JobSettings
) -> list[Source]:
    """Raises RequestValidationError that names the items which are wrong.

    The rows of all before the bytes of any: what the database knows to be wrong costs no call to the storage.
    """
    named = [item.source for item in items]
    uploads = _find_uploads(resources, tenant, [each.upload_id for each in named if each.upload_id is not None])
    firsts: dict[NewSource, int] = {}
    found: list[NewSource | Upload | Wrong] = []
    for number, source in enumerate(named):
        first = firsts.setdefault(source, number)
        if first != number:
            found.append(Wrong(rule="duplicate", detail=f"item {first} has the same source"))
        elif source.upload_id is None:
            found.append(source)
        else:
            found.append(uploads.get(source.upload_id) or Wrong(rule=NotFound.code, detail="there is no such upload"))
    _refuse_wrong(found, named)
    with ThreadPoolExecutor(LOOKERS, thread_name_prefix="look") as pool:
        looked = list(pool.map(partial(_look_at_item, resources, tenant, wanted), found))
    _refuse_wrong(looked, named)
    return [each for each in looked if isinstance(each, Source)]


def list_prefix(resources: Resources, tenant: Caller, prefix: str, wanted: JobSettings) -> list[Source]:
    """One source for every object that has bytes, by key. Raises SourceForbidden, SourceMissing, InvalidRequest."""
    place = Place.parse(prefix)
    check_may_read(place, tenant.name, readable=resources.settings.storage.sources)
    found: list[Source] = []
    for each in resources.storage.other(place.bucket).list_objects(place.key):
        if each.size_bytes == 0:  # consoles make such objects for folders
            continue
        if len(found) == BATCH_ITEMS:
            raise InvalidRequest(f"there are more than {BATCH_ITEMS} objects under {place}: use longer prefixes")
        object_place = Place(place.bucket, each.key)
        found.append(Source(kind=None, place=describe_remote(object_place, expect=wanted.expect)))
    if not found:
        raise InvalidRequest(f"there is nothing under {place}")
    return found


def _describe_upload(upload: Upload, wanted: JobSettings) -> Source:
    kind: JobKind = "recording" if upload.kind == "recording" else "image"
    check_kind(kind, wanted.options, filename=upload.filename, expect=wanted.expect)
    place = {"key": upload.storage_key, "etag": upload.etag, "size_bytes": upload.size_bytes}
    return Source(kind=kind, upload_id=upload.id, place={**place, "filename": upload.filename})


def _look_elsewhere(resources: Resources, tenant: Caller, source: NewSource, wanted: JobSettings) -> Source:
    if source.s3 is not None:
        place = Place.parse(source.s3)
        check_may_read(place, tenant.name, readable=resources.settings.storage.sources)
        return Source(kind=None, place=describe_remote(place, expect=wanted.expect))
    url = source.url or ""
    if urlsplit(url).scheme != "https" and not resources.settings.fetch.allow_private_addresses:
        raise SourceForbidden("only https:// is fetched")
    return Source(kind=None, place=describe_remote(url, expect=wanted.expect))


# --- the items of a batch ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """What keeps one item from becoming a job."""

    rule: str
    detail: str


def _find_uploads(resources: Resources, tenant: Caller, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Upload]:
    with resources.sessions() as session:
        mine = select(Upload).where(Upload.id.in_(ids), Upload.tenant_id == tenant.id, Upload.expires_at > func.now())
        return {upload.id: upload for upload in session.scalars(mine)}


def _look_at_item(
    resources: Resources, tenant: Caller, wanted: JobSettings, item: NewSource | Upload | Wrong
) -> Source | Wrong:
    try:
        if isinstance(item, Upload):
            upload = item if item.kind is not None else complete(resources, tenant, item)
            return _describe_upload(upload, wanted)
        return item if isinstance(item, Wrong) else _look_elsewhere(resources, tenant, item, wanted)
    except TROUBLE as error:
        return Wrong(rule=error.code, detail=str(error))


def _refuse_wrong(items: Sequence[object], named: Sequence[NewSource]) -> None:
    """Raises RequestValidationError that names the items which are wrong."""
    wrong = [
        {
            "loc": ("body", "items", number, "source", *named[number].model_fields_set),
            "msg": item.detail,
            "type": item.rule,
        }
        for number, item in enumerate(items)
        if isinstance(item, Wrong)
    ]
    if wrong:
        raise RequestValidationError(wrong)
