"""Uploads: bytes that go from the client straight to the storage by signed links, in one PUT or in parts."""

import uuid
from collections.abc import Sequence
from datetime import timedelta

from fastapi import APIRouter, Response
from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from api.deps import Built, CurrentTenant, Resources
from api.errors import InvalidRequest, TooLarge, describe_problems
from api.schemas import ArrivedPart, CompletedPart, CompletedUpload, NewUpload, PartLink, PartLinks, Upload, WantedParts
from shared import retention
from shared.errors import InvalidTransition, NotFound, SourceMissing, UploadIncomplete, UploadLost
from shared.inference.signatures import HEAD_BYTES
from shared.kinds import tell_kind
from shared.models import Upload as UploadRow
from shared.models import create_id
from shared.multipart import Part, choose_part_bytes, divide
from shared.storage import upload_key
from shared.tenants import Caller

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

NUMBERS_SHOWN = 10


@router.post("", status_code=201, responses=describe_problems(401, 413, 422, 503))
def create_upload(wanted: NewUpload, response: Response, resources: Built, tenant: CurrentTenant) -> Upload:
    """Announce a file. With a `url`, PUT its bytes there with `headers`; with a `part_size`, ask for the links of its
    parts. Then complete the upload, or submit a job with it."""
    limits = resources.settings.api
    if wanted.size > limits.source_bytes:
        raise TooLarge(f"a file may have at most {limits.source_bytes} bytes")
    upload_id = create_id()
    row = UploadRow(
        id=upload_id, tenant_id=tenant.id, filename=wanted.filename, content_type=wanted.content_type,
        size_bytes=wanted.size, storage_key=upload_key(tenant.id, upload_id),
    )  # fmt: skip
    if wanted.size > limits.single_upload_bytes:
        row.part_bytes = choose_part_bytes(wanted.size, smallest=limits.part_bytes)
    with resources.sessions.begin() as session:
        row.expires_at = func.now() + timedelta(seconds=limits.upload_seconds)
        session.add(row)
        session.flush()
        session.refresh(row)
    if row.part_bytes is not None:
        row = _begin_parts(resources, row)
    response.headers["Location"] = f"/v1/uploads/{upload_id}"
    return _describe(resources, row)


@router.get("/{upload_id}", responses=describe_problems(401, 404, 409, 422, 503))
def get_upload(upload_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Upload:
    """Whether it is complete, and if not, which parts have arrived: so it is resumed."""
    row = _find(resources, tenant, upload_id)
    if row.etag is not None or row.part_bytes is None:
        return _describe(resources, row)
    try:
        return _describe(resources, row, parts=_list_parts(resources, row))
    except SourceMissing:
        return _describe(resources, _pin(resources, tenant, row))


@router.post("/{upload_id}/parts", responses=describe_problems(401, 404, 409, 422, 503))
def sign_parts(upload_id: uuid.UUID, wanted: WantedParts, resources: Built, tenant: CurrentTenant) -> PartLinks:
    """Links to PUT these parts by, each good for its exact size. Each call keeps the upload open for longer."""
    row = _find(resources, tenant, upload_id)
    if row.part_bytes is None:
        raise InvalidRequest("this upload is one PUT; it has no parts")
    if row.etag is not None:
        raise InvalidTransition("this upload is complete")
    if row.multipart_id is None:
        raise _lost()
    sizes = divide(row.size_bytes, row.part_bytes)
    if beyond := [number for number in wanted.numbers if number > len(sizes)]:
        raise InvalidRequest(f"this upload has {len(sizes)} parts; there is no part {beyond[0]}")
    seconds = resources.settings.api.upload_seconds
    with resources.sessions.begin() as session:
        until = func.greatest(UploadRow.expires_at, func.now() + timedelta(seconds=seconds))
        if session.scalars(_change(row).values(expires_at=until)).one_or_none() is None:
            raise NotFound("there is no such upload")
    links = [
        PartLink(
            number=number,
            size=sizes[number - 1],
            url=resources.storage.multipart.link(
                row.storage_key, row.multipart_id, number, size_bytes=sizes[number - 1], seconds=seconds
            ),
        )
        for number in dict.fromkeys(wanted.numbers)
    ]
    return PartLinks(parts=links, links_expire_in_seconds=seconds)


@router.post("/{upload_id}/complete", responses=describe_problems(401, 404, 409, 422, 503))
def complete_upload(
    upload_id: uuid.UUID, resources: Built, tenant: CurrentTenant, sent: CompletedUpload | None = None
) -> Upload:
    """Check that the bytes arrived, all of them, and as `parts` says if it is given; twice is the same as once."""
    row = _find(resources, tenant, upload_id)
    return _describe(resources, complete(resources, tenant, row, named=sent.parts if sent is not None else ()))


@router.delete("/{upload_id}", status_code=204, responses=describe_problems(401, 404, 409, 422, 503))
def delete_upload(upload_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> None:
    """Give the upload up; upkeep removes its bytes and parts once no unfinished job reads them."""
    row = _find(resources, tenant, upload_id)
    with resources.sessions.begin() as session:
        gone = {"expires_at": func.now(), "deleted_at": func.now()}
        session.execute(update(UploadRow).where(UploadRow.id == row.id).values(gone))


def find_upload(session: Session, tenant: Caller, upload_id: uuid.UUID) -> UploadRow:
    """Raises NotFound."""
    row = session.scalar(_CURRENT, {"upload_id": upload_id, "tenant_id": tenant.id})
    if row is None:
        raise NotFound("there is no such upload")
    return row


def complete(resources: Resources, tenant: Caller, row: UploadRow, *, named: Sequence[CompletedPart] = ()) -> UploadRow:
    """The upload with its ETag and kind, looked up in the storage once. Raises NotFound, UploadIncomplete, UploadLost
    or SourceChanged."""
    if named and row.part_bytes is None:
        raise InvalidRequest("this upload was one PUT; it has no parts")
    if row.kind is not None:
        return row
    if row.etag is None and row.part_bytes is not None:
        _join_parts(resources, row, named)
    return _pin(resources, tenant, row)


def _begin_parts(resources: Resources, row: UploadRow) -> UploadRow:
    """The row is committed before the storage begins anything, so that upkeep finds what a death in between leaves."""
    multipart_id = resources.storage.multipart.begin(row.storage_key, content_type=row.content_type)
    with resources.sessions.begin() as session:
        begun = session.scalars(_change(row).values(multipart_id=multipart_id)).one_or_none()
    if begun is None:  # it took so long that upkeep has been here
        resources.storage.multipart.abort(row.storage_key)
        raise NotFound("there is no such upload")
    return begun


def _list_parts(resources: Resources, row: UploadRow) -> Sequence[Part]:
    """Raises SourceMissing when the storage has no such upload, be it because it is complete there."""
    if row.multipart_id is None:
        raise SourceMissing("the upload was never begun")
    return resources.storage.multipart.list_parts(row.storage_key, row.multipart_id)


def _join_parts(resources: Resources, row: UploadRow, named: Sequence[CompletedPart]) -> None:
    """Nothing is asked of the storage before all is right: some forget an upload that they could not complete."""
    try:
        arrived = _list_parts(resources, row)
        _check_parts(row, arrived, named)
        resources.storage.multipart.complete(row.storage_key, row.multipart_id or "", arrived)
    except SourceMissing:
        return  # completed before, by a request that died or is not done yet: its object is looked at next


def _check_parts(row: UploadRow, arrived: Sequence[Part], named: Sequence[CompletedPart]) -> None:
    wanted = dict(enumerate(divide(row.size_bytes, row.part_bytes or row.size_bytes), start=1))
    found = {part.number: part.size_bytes for part in arrived}
    if missing := [number for number in wanted if number not in found]:
        raise UploadIncomplete(f"of {len(wanted)} parts {len(missing)} have not arrived: {_show(missing)}")
    if wrong := [number for number in found if found[number] != wanted.get(number)]:
        raise UploadIncomplete(f"parts of another size than was announced: {_show(wrong)}")
    if named:
        told = sorted((part.number, part.etag.strip('"')) for part in named)
        stored = [(part.number, part.etag) for part in arrived]
        if told != stored:
            differing = sorted({number for number, _ in set(told) ^ set(stored)})
            raise UploadIncomplete(f"parts that are not named once and as they arrived: {_show(differing)}")


def _pin(resources: Resources, tenant: Caller, row: UploadRow) -> UploadRow:
    """From now on the upload is the object that the storage has now, kept for as long as it would be after a job, and
    long enough for one to name it."""
    try:
        stored = resources.storage.head(row.storage_key)
    except SourceMissing as error:
        if row.part_bytes is not None:
            raise _lost() from error
        raise UploadIncomplete("the bytes of this upload have not arrived yet") from error
    if stored.size_bytes != row.size_bytes:
        raise UploadIncomplete(f"{stored.size_bytes} bytes arrived where {row.size_bytes} were announced")
    etag = row.etag or stored.etag
    head = resources.storage.read(row.storage_key, etag=etag, limit_bytes=HEAD_BYTES)
    kind = tell_kind(head, filename=row.filename, content_type=row.content_type)
    settings = resources.settings
    kept_seconds = max(retention.read_policy(tenant, settings.jobs).upload_seconds, settings.api.upload_seconds)
    with resources.sessions.begin() as session:
        pinned = session.scalars(
            _change(row).values(
                etag=func.coalesce(UploadRow.etag, etag),
                kind=func.coalesce(UploadRow.kind, kind),
                completed_at=func.coalesce(UploadRow.completed_at, func.now()),
                expires_at=func.now() + timedelta(seconds=kept_seconds),
            )
        ).one_or_none()
    if pinned is None:
        raise NotFound("there is no such upload")
    return pinned


_CURRENT = select(UploadRow).where(
    UploadRow.id == bindparam("upload_id"),
    UploadRow.tenant_id == bindparam("tenant_id"),
    UploadRow.expires_at > func.now(),
    UploadRow.deleted_at.is_(None),
)


def _find(resources: Resources, tenant: Caller, upload_id: uuid.UUID) -> UploadRow:
    with resources.sessions.autocommit() as session:
        return find_upload(session, tenant, upload_id)


def _change(row: UploadRow) -> ReturningUpdate[tuple[UploadRow]]:
    """Of an upload that was not given up meanwhile."""
    return update(UploadRow).where(UploadRow.id == row.id, UploadRow.expires_at > func.now()).returning(UploadRow)


def _lost() -> UploadLost:
    return UploadLost("the storage does not know this upload any more; announce the file again")


def _show(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NUMBERS_SHOWN])) + (", …" if len(numbers) > NUMBERS_SHOWN else "")


def _describe(resources: Resources, row: UploadRow, *, parts: Sequence[Part] = ()) -> Upload:
    link = None
    if row.etag is None and row.part_bytes is None:
        link = resources.storage.upload_link(
            row.storage_key, size_bytes=row.size_bytes, content_type=row.content_type,
            seconds=resources.settings.api.upload_seconds,
        )  # fmt: skip
    return Upload(
        id=row.id, filename=row.filename, content_type=row.content_type, size=row.size_bytes,
        completed=row.etag is not None, url=link, headers={"Content-Type": row.content_type} if link else {},
        part_size=row.part_bytes, part_count=len(divide(row.size_bytes, row.part_bytes)) if row.part_bytes else None,
        parts=[ArrivedPart(number=part.number, size=part.size_bytes, etag=part.etag) for part in parts],
        created_at=row.created_at, expires_at=row.expires_at,
    )  # fmt: skip
