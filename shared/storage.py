"""Object storage behind one bucket, any S3. Keys are made by the server and lie under their tenant's prefix."""

import io
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

from shared import config
from shared.errors import SourceChanged
from shared.multipart import MultipartUploads, choose_part_bytes
from shared.remote_file import RemoteFile
from shared.s3 import create_client, status, tell_time, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

READER_BYTES = 64 * 2**10
COPIED_BYTES = 2**20
BODY_ATTEMPTS = 3
"""Hours of media are thousands of requests; the client library repeats those that fail, but no answer cut short."""
TRANSFER = TransferConfig(multipart_threshold=32 * 2**20, multipart_chunksize=16 * 2**20, max_concurrency=4)


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    size_bytes: int
    etag: str


@dataclass(frozen=True, kw_only=True)
class ListedObject(StoredObject):
    key: str
    age_seconds: float
    """By the storage's own clock; none at all where it does not tell the time."""


def tenant_prefix(tenant_id: uuid.UUID) -> str:
    return f"tenants/{tenant_id}/"


def job_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    return f"{tenant_prefix(tenant_id)}jobs/{job_id}/"


def source_key(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    return f"{job_prefix(tenant_id, job_id)}source"


def step_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID, *, ordinal: int) -> str:
    return f"{job_prefix(tenant_id, job_id)}steps/{ordinal:05d}/"


def attempt_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID, *, ordinal: int, attempt: int) -> str:
    """Where one attempt of one step writes; no other attempt ever writes there."""
    return f"{step_prefix(tenant_id, job_id, ordinal=ordinal)}attempts/{attempt}/"


def upload_key(tenant_id: uuid.UUID, upload_id: uuid.UUID) -> str:
    return f"{uploads_prefix(tenant_id)}{upload_id}"


def uploads_prefix(tenant_id: uuid.UUID) -> str:
    return f"{tenant_prefix(tenant_id)}uploads/"


class Storage:
    """Every call is bounded in time and raises StorageUnavailable when the storage cannot be had."""

    def __init__(self, client: "S3Client", public_client: "S3Client", *, bucket: str, link_seconds: int) -> None:
        self._client = client
        self._public_client = public_client
        self._bucket = bucket
        self._link_seconds = link_seconds
        self.multipart = MultipartUploads(client, public_client, bucket=bucket)

    @classmethod
    def from_settings(cls, settings: config.Storage) -> Self:
        """Opens no connection."""
        client = create_client(settings, settings.endpoint_url)
        public_url = settings.public_endpoint_url
        public_client = create_client(settings, public_url) if public_url else client
        return cls(client, public_client, bucket=settings.bucket, link_seconds=settings.link_seconds)

    def other(self, bucket: str) -> Self:
        """Another bucket behind the same clients; of sources that are not ours, so to be read alone."""
        return type(self)(self._client, self._public_client, bucket=bucket, link_seconds=self._link_seconds)

    def ensure_bucket(self) -> None:
        """Create the bucket of a local stack; a deployed one has been given its bucket."""
        with translated():
            try:
                self._client.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                if status(error) != 404:
                    raise
                self._client.create_bucket(Bucket=self._bucket)

    def check(self) -> None:
        """Raises StorageUnavailable unless the bucket answers."""
        with translated():
            self._client.head_bucket(Bucket=self._bucket)

    def put(self, key: str, body: bytes | BinaryIO, *, content_type: str) -> StoredObject:
        size = len(body) if isinstance(body, bytes) else body.seek(0, io.SEEK_END)
        if not isinstance(body, bytes):
            body.seek(0)
        with translated():
            put = self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=content_type)
        return StoredObject(size_bytes=size, etag=put["ETag"].strip('"'))

    def put_file(self, key: str, path: Path, *, content_type: str) -> None:
        """A file of any size, in parts where it is large, a few in memory at a time."""
        with translated():
            self._client.upload_file(
                str(path), self._bucket, key, ExtraArgs={"ContentType": content_type}, Config=TRANSFER
            )

    def put_stream(self, key: str, body: BinaryIO, *, limit_bytes: int, content_type: str) -> StoredObject:
        """Of a length that shows at its end, `limit_bytes` at most: in parts, of which one or two are in memory.

        What reading `body` raises comes through, and leaves no parts behind.
        """
        part_bytes = choose_part_bytes(limit_bytes, smallest=TRANSFER.multipart_chunksize)
        in_turn = TransferConfig(multipart_threshold=part_bytes, multipart_chunksize=part_bytes, use_threads=False)
        with translated():
            self._client.upload_fileobj(
                body, self._bucket, key, ExtraArgs={"ContentType": content_type}, Config=in_turn
            )
        return self.head(key)

    def head(self, key: str) -> StoredObject:
        """Raises SourceMissing when there is no such object."""
        with translated():
            found = self._client.head_object(Bucket=self._bucket, Key=key)
        return StoredObject(size_bytes=found["ContentLength"], etag=found["ETag"].strip('"'))

    def read(self, key: str, *, etag: str | None = None, limit_bytes: int) -> bytes:
        """The object, at most `limit_bytes` of it. Raises SourceMissing, or SourceChanged unless it has `etag`."""
        return self.read_range(key, 0, limit_bytes, etag=etag)

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """`length` bytes from `start` on, fewer only where the object ends. Raises as `read` does."""
        if length == 0:
            return b""
        wanted = {"Range": f"bytes={start}-{start + length - 1}", **({"IfMatch": etag} if etag else {})}
        with translated():
            for attempts_left in reversed(range(BODY_ATTEMPTS)):
                try:
                    found = self._client.get_object(Bucket=self._bucket, Key=key, **wanted)  # type: ignore[arg-type]
                    with closing(found["Body"]) as body:  # its own context is the bare stream, with other errors
                        _check_etag(found["ETag"], etag)
                        return body.read()
                except ClientError as error:
                    if status(error) == 416:  # it begins behind the end
                        return b""
                    raise
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if not attempts_left:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def open(self, key: str, *, etag: str | None, size_bytes: int) -> BinaryIO:
        """The object as a file, for media libraries. Nothing is asked for before the first byte is read; reading
        raises SourceChanged once the object is no longer the one with `etag`, or ends before its size."""
        raw = RemoteFile(partial(self.read_range, key, etag=etag), size_bytes=size_bytes)
        return io.BufferedReader(raw, READER_BYTES)

    def download(self, key: str, path: Path, *, size_bytes: int, etag: str | None = None) -> None:
        """The object, which has so many bytes, in a file; or no file. Raises as `read` does."""
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("wb") as file, self.open(key, etag=etag, size_bytes=size_bytes) as remote:
                shutil.copyfileobj(remote, file, COPIED_BYTES)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def delete_prefix(self, prefix: str) -> int:
        """Delete everything under `prefix`; returns how many objects. Running it again finishes a broken run.

        What is only begun goes first, so that none of it can become an object behind our back.
        """
        self.multipart.abort(prefix)
        deleted = 0
        for found in self.list_objects(prefix):
            self.delete(found.key)
            deleted += 1
        return deleted

    def delete(self, key: str) -> None:
        """What is not there is deleted already."""
        with translated():
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def list_keys(self, prefix: str) -> list[str]:
        return [each.key for each in self.list_objects(prefix)]

    def list_objects(self, prefix: str) -> Iterator[ListedObject]:
        """By key. Raises SourceMissing when there is no such bucket."""
        for page in self.list_pages(prefix):
            yield from page

    def list_pages(self, prefix: str, *, after: str = "") -> Iterator[Sequence[ListedObject]]:
        """By key, those behind `after`, as many at a time as the storage tells at once."""
        paginator = self._client.get_paginator("list_objects_v2")
        with translated():
            for page in paginator.paginate(Bucket=self._bucket, Prefix=prefix, StartAfter=after):
                now = tell_time(page)
                yield [
                    ListedObject(
                        key=found["Key"], size_bytes=found["Size"], etag=found["ETag"].strip('"'),
                        age_seconds=(now - found["LastModified"]).total_seconds() if now else 0.0,
                    )
                    for found in page.get("Contents", [])
                ]  # fmt: skip

    def link(self, key: str, *, filename: str | None = None) -> str:
        """A signed link to read the object, made fresh at every call and never stored."""
        attachment = {"ResponseContentDisposition": f'inline; filename="{filename}"'} if filename else {}
        return self._public_client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key, **attachment}, ExpiresIn=self._link_seconds
        )

    def upload_link(self, key: str, *, size_bytes: int, content_type: str, seconds: int) -> str:
        """A signed link to PUT exactly `size_bytes`: the length is part of what is signed."""
        wanted = {"Bucket": self._bucket, "Key": key, "ContentLength": size_bytes, "ContentType": content_type}
        return self._public_client.generate_presigned_url("put_object", Params=wanted, ExpiresIn=seconds)


def _check_etag(found: str, wanted: str | None) -> None:
    """For storages that ignore the condition, as rclone does."""
    if wanted and found.strip('"') != wanted:
        raise SourceChanged("the source was replaced after the job was submitted")
