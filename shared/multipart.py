"""Files that reach the storage in parts, by links of their own. Which parts a file has is the caller's to say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from botocore.exceptions import ClientError

from shared.errors import SourceMissing, UploadIncomplete
from shared.s3 import status, tell_time, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = structlog.get_logger(__name__)

SMALLEST_PART_BYTES = 5 * 2**20  # S3's own limits; the last part may be smaller
LARGEST_PART_BYTES = 5 * 2**30
MOST_PARTS = 10_000
MEBIBYTE = 2**20
NOT_IMPLEMENTED = 501


@dataclass(frozen=True, kw_only=True)
class Part:
    number: int
    etag: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An upload in parts that is neither complete nor given up."""

    key: str
    multipart_id: str
    age_seconds: float
    """By the storage's own clock; none at all where it does not tell the time."""


def choose_part_bytes(size_bytes: int, *, smallest: int) -> int:
    """Whole mebibytes, and as many as it takes for MOST_PARTS to be enough."""
    needed = -(-size_bytes // MOST_PARTS)
    return max(smallest, -(-needed // MEBIBYTE) * MEBIBYTE)


def divide(size_bytes: int, part_bytes: int) -> Sequence[int]:
    """The sizes of the parts: all the same, but for the last."""
    whole, rest = divmod(size_bytes, part_bytes)
    return [part_bytes] * whole + ([rest] if rest else [])


class MultipartUploads:
    """Every call but `link` raises StorageUnavailable when the storage cannot be had, and SourceMissing when it knows
    no such upload: it was completed or aborted, or never begun."""

    def __init__(self, client: "S3Client", public_client: "S3Client", *, bucket: str) -> None:
        self._client = client
        self._public_client = public_client
        self._bucket = bucket
        self._told = False

    def begin(self, key: str, *, content_type: str) -> str:
        with translated():
            begun = self._client.create_multipart_upload(Bucket=self._bucket, Key=key, ContentType=content_type)
        return begun["UploadId"]

    def link(self, key: str, multipart_id: str, number: int, *, size_bytes: int, seconds: int) -> str:
        """A signed link to PUT exactly `size_bytes`: the length is part of what is signed."""
        wanted = {
            "Bucket": self._bucket, "Key": key, "UploadId": multipart_id, "PartNumber": number,
            "ContentLength": size_bytes,
        }  # fmt: skip
        return self._public_client.generate_presigned_url("upload_part", Params=wanted, ExpiresIn=seconds)

    def list_parts(self, key: str, multipart_id: str) -> Sequence[Part]:
        """What has arrived, by number."""
        found: dict[int, Part] = {}
        more = True
        with translated():
            while more:
                # The next page begins behind the last number seen, as S3 has it. The page's own marker is not used:
                # rclone's names the first part of the next page, which others would leave out.
                page = self._client.list_parts(
                    Bucket=self._bucket, Key=key, UploadId=multipart_id, PartNumberMarker=max(found, default=0)
                )
                new = {
                    each["PartNumber"]: Part(
                        number=each["PartNumber"], etag=each["ETag"].strip('"'), size_bytes=each["Size"]
                    )
                    for each in page.get("Parts", [])
                }
                more = page.get("IsTruncated", False) and not new.keys() <= found.keys()
                found |= new
        return [found[number] for number in sorted(found)]

    def complete(self, key: str, multipart_id: str, parts: Sequence[Part]) -> None:
        """Raises UploadIncomplete when a part is not as listed any more. Some storages forget an upload that they
        could not complete, so the caller compares first."""
        wanted = [{"PartNumber": part.number, "ETag": part.etag} for part in parts]
        with translated():
            try:
                self._client.complete_multipart_upload(
                    Bucket=self._bucket, Key=key, UploadId=multipart_id,
                    MultipartUpload={"Parts": wanted},  # type: ignore[typeddict-item]
                )  # fmt: skip
            except ClientError as error:
                if status(error) == 400:
                    code = error.response.get("Error", {}).get("Code")
                    raise UploadIncomplete(f"the storage could not join the parts: {code}") from error
                raise

    def abort(self, prefix: str) -> None:
        """Give up whatever was begun under `prefix`, known to us by its id or not."""
        for page in self.list_begun(prefix):
            for begun in page:
                self.abort_one(begun)

    def abort_one(self, begun: Begun) -> None:
        try:
            with translated():
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=begun.key, UploadId=begun.multipart_id)
        except SourceMissing:  # it ended by itself meanwhile
            pass

    def list_begun(self, prefix: str) -> Iterator[Sequence[Begun]]:
        """What was begun under `prefix` and neither completed nor aborted, as many at a time as the storage tells.

        Of a storage that cannot tell, nothing; a rule of its own should then end what is incomplete for days.
        """
        paginator = self._client.get_paginator("list_multipart_uploads")
        try:
            with translated():
                try:
                    for page in paginator.paginate(Bucket=self._bucket, Prefix=prefix):
                        now = tell_time(page)
                        yield [
                            Begun(
                                key=each["Key"], multipart_id=each["UploadId"],
                                age_seconds=(now - each["Initiated"]).total_seconds() if now else 0.0,
                            )
                            for each in page.get("Uploads", [])
                        ]  # fmt: skip
                except ClientError as error:
                    if status(error) != NOT_IMPLEMENTED:
                        raise
                    self._tell_once()
        except SourceMissing:  # how rclone says that this bucket never had any
            return

    def _tell_once(self) -> None:
        if not self._told:
            self._told = True
            log.warning("the storage does not list incomplete uploads; let a rule of the bucket end them")
