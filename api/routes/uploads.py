"""Uploads: bytes that go from the client straight to the storage, by a signed link."""

import uuid
from datetime import timedelta

from fastapi import APIRouter, Response
from sqlalchemy import func, select, update

from api.deps import Built, CurrentTenant, Resources
from api.errors import InvalidRequest, TooLarge, describe_problems
from api.schemas import CompletedUpload, NewUpload, Upload
from shared.errors import NotFound, SourceMissing, UploadIncomplete
from shared.models import Tenant, create_id
from shared.models import Upload as UploadRow
from shared.storage import upload_key

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


@router.post("", status_code=201, responses=describe_problems(401, 413, 422, 503))
def create_upload(wanted: NewUpload, response: Response, resources: Built, tenant: CurrentTenant) -> Upload:
    """Announce a file; PUT its bytes to `url` with `headers`, then complete the upload or submit a job with it."""
    limits = resources.settings.api
    if wanted.size > limits.direct_upload_bytes:
        raise TooLarge(f"a single upload may have at most {limits.direct_upload_bytes} bytes")
    upload_id = create_id()
    row = UploadRow(
        id=upload_id, tenant_id=tenant.id, filename=wanted.filename, content_type=wanted.content_type,
        size_bytes=wanted.size, storage_key=upload_key(tenant.id, upload_id),
    )  # fmt: skip
    with resources.sessions.begin() as session:
        row.expires_at = func.now() + timedelta(seconds=limits.upload_seconds)
        session.add(row)
        session.flush()
        session.refresh(row)
    response.headers["Location"] = f"/v1/uploads/{upload_id}"
    return _describe(resources, row)


@router.get("/{upload_id}", responses=describe_problems(401, 404, 422, 503))
def get_upload(upload_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Upload:
    return _describe(resources, _find(resources, tenant, upload_id))


@router.post("/{upload_id}/complete", responses=describe_problems(401, 404, 409, 422, 503))
def complete_upload(
    upload_id: uuid.UUID, resources: Built, tenant: CurrentTenant, sent: CompletedUpload | None = None
) -> Upload:
    """Check that the bytes arrived, all of them; completing twice is the same as once."""
    if sent is not None and sent.parts:
        raise InvalidRequest("this upload was one PUT; it has no parts")
    return _describe(resources, find_complete_upload(resources, tenant, upload_id))


@router.delete("/{upload_id}", status_code=204, responses=describe_problems(401, 404, 409, 422, 503))
def delete_upload(upload_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> None:
    """Give the upload up; upkeep removes its bytes once no unfinished job reads them."""
    row = _find(resources, tenant, upload_id)
    with resources.sessions.begin() as session:
        session.execute(update(UploadRow).where(UploadRow.id == row.id).values(expires_at=func.now()))


def find_complete_upload(resources: Resources, tenant: Tenant, upload_id: uuid.UUID) -> UploadRow:
    """The upload with its ETag, checked against the storage once. Raises NotFound or UploadIncomplete."""
    row = _find(resources, tenant, upload_id)
    if row.etag is not None:
        return row
    try:
        stored = resources.storage.head(row.storage_key)
    except SourceMissing as error:
        raise UploadIncomplete("the bytes of this upload have not arrived yet") from error
    if stored.size_bytes != row.size_bytes:
        raise UploadIncomplete(f"{stored.size_bytes} bytes arrived where {row.size_bytes} were announced")
    with resources.sessions.begin() as session:
        return session.scalars(
            update(UploadRow)
            .where(UploadRow.id == row.id)
            .values(
                etag=func.coalesce(UploadRow.etag, stored.etag),
                completed_at=func.coalesce(UploadRow.completed_at, func.now()),
                expires_at=func.now() + timedelta(seconds=resources.settings.jobs.keep_seconds),
            )
            .returning(UploadRow)
        ).one()


def _find(resources: Resources, tenant: Tenant, upload_id: uuid.UUID) -> UploadRow:
    with resources.sessions() as session:
        row = session.scalar(
            select(UploadRow).where(
                UploadRow.id == upload_id, UploadRow.tenant_id == tenant.id, UploadRow.expires_at > func.now()
            )
        )
    if row is None:
        raise NotFound("there is no such upload")
    return row


def _describe(resources: Resources, row: UploadRow) -> Upload:
    link = None
    if row.etag is None:
        link = resources.storage.upload_link(
            row.storage_key, size_bytes=row.size_bytes, content_type=row.content_type,
            seconds=resources.settings.api.upload_seconds,
        )  # fmt: skip
    return Upload(
        id=row.id, filename=row.filename, content_type=row.content_type, size=row.size_bytes,
        completed=row.etag is not None, url=link, headers={"Content-Type": row.content_type} if link else {},
        created_at=row.created_at, expires_at=row.expires_at,
    )  # fmt: skip
