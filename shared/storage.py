"""Object storage behind one bucket, any S3. Keys are made by the server and lie under their tenant's prefix."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from shared import config
from shared.errors import SourceChanged, SourceMissing, StorageUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    size_bytes: int
    etag: str


def job_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    return f"tenants/{tenant_id}/jobs/{job_id}/"


def source_key(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    return f"{job_prefix(tenant_id, job_id)}source"


def attempt_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID, *, ordinal: int, attempt: int) -> str:
    """Where one attempt of one step writes; no other attempt ever writes there."""
    return f"{job_prefix(tenant_id, job_id)}steps/{ordinal:05d}/attempts/{attempt}/"


def upload_key(tenant_id: uuid.UUID, upload_id: uuid.UUID) -> str:
    return f"tenants/{tenant_id}/uploads/{upload_id}"


class Storage:
    """Every call is bounded in time and raises StorageUnavailable when the storage cannot be had."""

    def __init__(self, client: "S3Client", public_client: "S3Client", *, bucket: str, link_seconds: int) -> None:
        self._client = client
        self._public_client = public_client
        self._bucket = bucket
        self._link_seconds = link_seconds

    @classmethod
    def from_settings(cls, settings: config.Storage) -> Self:
        """Opens no connection."""
        client = _create_client(settings, settings.endpoint_url)
        public_url = settings.public_endpoint_url
        public_client = _create_client(settings, public_url) if public_url else client
        return cls(client, public_client, bucket=settings.bucket, link_seconds=settings.link_seconds)

    def ensure_bucket(self) -> None:
        """Create the bucket of a local stack; a deployed one has been given its bucket."""
        with _translated():
            try:
                self._client.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                if _status(error) != 404:
                    raise
                self._client.create_bucket(Bucket=self._bucket)

    def check(self) -> None:
        """Raises StorageUnavailable unless the bucket answers."""
        with _translated():
            self._client.head_bucket(Bucket=self._bucket)

    def put(self, key: str, body: bytes | BinaryIO, *, content_type: str) -> StoredObject:
        with _translated():
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=content_type)
        return self.head(key)

    def head(self, key: str) -> StoredObject:
        """Raises SourceMissing when there is no such object."""
        with _translated():
            found = self._client.head_object(Bucket=self._bucket, Key=key)
        return StoredObject(size_bytes=found["ContentLength"], etag=found["ETag"].strip('"'))

    def read(self, key: str, *, etag: str | None = None, limit_bytes: int) -> bytes:
        """The object, at most `limit_bytes` of it. Raises SourceMissing, or SourceChanged unless it has `etag`."""
        with _translated():
            condition = {"IfMatch": etag} if etag else {}
            found = self._client.get_object(Bucket=self._bucket, Key=key, **condition)  # type: ignore[arg-type]
            with found["Body"] as body:
                if etag and found["ETag"].strip('"') != etag:  # for storages that ignore the condition
                    raise SourceChanged("the source was replaced after the job was submitted")
                return body.read(limit_bytes)

    def delete_prefix(self, prefix: str) -> int:
        """Delete everything under `prefix`; returns how many objects. Running it again finishes a broken run."""
        deleted = 0
        with _translated():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                for found in page.get("Contents", []):
                    self._client.delete_object(Bucket=self._bucket, Key=found["Key"])
                    deleted += 1
        return deleted

    def list_keys(self, prefix: str) -> list[str]:
        with _translated():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            return [found["Key"] for page in pages for found in page.get("Contents", [])]

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


def _create_client(settings: config.Storage, endpoint_url: str | None) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key.get_secret_value() if settings.secret_key else None,
        config=Config(
            signature_version="s3v4",  # the default signer leaves the length of an upload unsigned
            connect_timeout=3,
            read_timeout=20,
            retries={"mode": "standard", "max_attempts": 3},
            max_pool_connections=16,
            request_checksum_calculation="when_required",  # other providers refuse the newer trailers
            response_checksum_validation="when_required",
        ),
    )


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _status(error) == 404:
            raise SourceMissing("the object is not in the storage") from error
        if _status(error) == 412:
            raise SourceChanged("the source was replaced after the job was submitted") from error
        raise StorageUnavailable(f"the storage answered {error.response.get('Error', {}).get('Code')}") from error
    except BotoCoreError as error:
        raise StorageUnavailable(f"the storage cannot be reached: {type(error).__name__}") from error
