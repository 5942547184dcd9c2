"""Reading `POST /v1/jobs`: a multipart form with a file, or JSON naming a source. Both become one Submission."""

import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from api.errors import DiskFull, InvalidRequest, TooLarge
from api.schemas import JobSettings, NewJob, NewSource
from shared.config import Api
from shared.errors import NO_ROOM
from shared.sources import clean_name

JSON, FORM = "application/json", "multipart/form-data"
FORM_FIELDS = frozenset({"mode", "options", "webhook_url", "metadata", "priority", "expect"})
JSON_FIELDS = frozenset({"options", "metadata", "priority"})
FIELD_BYTES = 64_000
HASH_BLOCK_BYTES = 2**20

Wanted = TypeVar("Wanted", bound=JobSettings)


@dataclass(frozen=True, kw_only=True)
class SentFile:
    """A file inside the request, already received in full."""

    name: str
    content_type: str
    size_bytes: int
    body: BinaryIO


@dataclass(frozen=True, kw_only=True)
class Submission:
    wanted: JobSettings
    source: SentFile | NewSource

    @property
    def upload_id(self) -> uuid.UUID | None:
        return None if isinstance(self.source, SentFile) else self.source.upload_id

    def digest(self) -> bytes:
        """Of all that was asked for, the file included: what an Idempotency-Key stands for."""
        if isinstance(self.source, SentFile):
            return digest(self.wanted, self.source.name.encode(), _hash_file(self.source.body))
        return digest(self.wanted)


def read_kind(request: Request) -> str:
    """Of its body, without parameters."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def read_json_body(request: Request, limits: Api) -> bytes:
    """Raises TooLarge as soon as it is: nobody knows yet who sends it."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.json_body_bytes:
            raise TooLarge(f"a JSON body may have at most {limits.json_body_bytes} bytes")
    return bytes(body)


def parse_json(body: bytes) -> Submission:
    """Raises RequestValidationError."""
    wanted = _validate(NewJob, body)
    return Submission(wanted=wanted, source=wanted.source)


@asynccontextmanager
async def read_form(request: Request, limits: Api) -> AsyncIterator[Submission]:
    """Its file is open for the block. Raises InvalidRequest, TooLarge, DiskFull, RequestValidationError."""
    if read_kind(request) != FORM:
        raise InvalidRequest("send multipart/form-data with a file, or application/json with a source")
    try:
        form = await request.form(max_files=1, max_fields=len(FORM_FIELDS), max_part_size=FIELD_BYTES)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DiskFull("there is no room for the file here now; nothing was kept, try again") from error
    try:
        yield await run_in_threadpool(_parse_form, form, limits)
    finally:
        await form.close()


def _parse_form(form: FormData, limits: Api) -> Submission:
    keys = [key for key, _ in form.multi_items()]
    unknown = sorted(set(keys) - FORM_FIELDS - {"file"})
    if unknown or len(keys) != len(set(keys)):
        raise InvalidRequest(f"unknown or repeated form fields: {', '.join(unknown) or 'repeated'}")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("the form has no file part named `file`")
    fields: dict[str, Any] = {}
    for key in FORM_FIELDS & set(keys):
        value = form[key]
        if not isinstance(value, str):
            raise InvalidRequest(f"the form field {key} must be text")
        fields[key] = _parse_json_field(key, value) if key in JSON_FIELDS else value
    wanted = _validate(JobSettings, json.dumps(fields).encode())
    source = SentFile(
        name=clean_name(file.filename),
        content_type=file.content_type or "application/octet-stream",
        size_bytes=file.size or 0,
        body=file.file,
    )
    if source.size_bytes == 0:
        raise InvalidRequest("the file is empty")
    if source.size_bytes > limits.upload_body_bytes:
        raise TooLarge(f"a file in a form may have at most {limits.upload_body_bytes} bytes; announce an upload for it")
    return Submission(wanted=wanted, source=source)


def _validate(model: type[Wanted], document: bytes) -> Wanted:
    try:
        return model.model_validate_json(document)
    except ValidationError as error:  # told apart from a row of ours that does not validate, which is not the client's
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(found) from error


def _parse_json_field(name: str, value: str) -> Any:
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the form field {name} is not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _hash_file(body: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while block := body.read(HASH_BLOCK_BYTES):
        digest.update(block)
    body.seek(0)
    return digest.digest()


def digest(wanted: JobSettings, *rest: bytes) -> bytes:
    """What an Idempotency-Key stands for: all that was asked, in whatever order."""
    asked = hashlib.sha256(json.dumps(wanted.model_dump(mode="json"), sort_keys=True).encode())
    for each in rest:
        asked.update(hashlib.sha256(each).digest())
    return asked.digest()
