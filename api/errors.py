"""Every refusal as RFC 9457 problem+json with a stable `code`. The one place that knows HTTP status of our errors."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import errors
from shared.errors import MasklineError

log = structlog.get_logger(__name__)

PROBLEM_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
SHOWN_ERRORS = 50  # a body of ten thousand items can be wrong as often


class Unauthorized(MasklineError):
    code = "unauthorized"


class InvalidRequest(MasklineError):
    code = "invalid_request"


class TooLarge(MasklineError):
    code = "too_large"


class QueueFull(MasklineError):
    """Of the whole system; nothing was taken, and there is room again when jobs have run."""

    code = "queue_full"
    retryable = True


class DiskFull(MasklineError):
    """The disk of this process, where the files of forms are kept until they are stored."""

    code = "disk_full"
    retryable = True


STATUS: dict[type[MasklineError], int] = {
    Unauthorized: 401,
    InvalidRequest: 422,
    TooLarge: 413,
    QueueFull: 429,
    DiskFull: 507,
    errors.NotFound: 404,
    errors.InvalidTransition: 409,
    errors.JobActive: 409,
    errors.NotReady: 409,
    errors.IdempotencyConflict: 409,
    errors.IdempotencyMismatch: 422,
    errors.UploadIncomplete: 409,
    errors.UploadLost: 409,
    errors.SourceMissing: 404,
    errors.SourceChanged: 409,
    errors.SourceRemoved: 409,
    errors.SourceForbidden: 403,
    errors.KindMismatch: 422,
    errors.AddressRefused: 422,
    errors.EndpointExists: 409,
    errors.EndpointDisabled: 409,
    errors.TooManyEndpoints: 409,
    errors.StorageUnavailable: 503,
}


class Problem(BaseModel):
    """RFC 9457. `code` is stable and for programs; `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[dict[str, Any]] | None = None


class LargeBodiesAsProblems:
    """Starlette refuses a body by its announced length in plain text; this middleware says it as everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False

        async def send_problem(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == 413:
                refused = Headers(raw=message["headers"])["content-type"] != PROBLEM_TYPE
                if refused:
                    await _problem(413, TooLarge.code, "the request's body is too large")(scope, receive, send)
            if not refused:
                await send(message)

        await self._app(scope, receive, send_problem)


def describe_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that can refuse with these statuses."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI) -> None:
    app.add_exception_handler(MasklineError, _answer_our_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(PoolTimeoutError, _answer_database)
    app.add_exception_handler(DBAPIError, _answer_database)
    app.add_exception_handler(Exception, _answer_unexpected)


def _answer_our_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MasklineError)  # noqa: S101 - for the type checker
    status = STATUS.get(type(error), 500)
    return _problem(status, error.code, str(error))


def _answer_validation(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - for the type checker
    found = [
        {"field": ".".join(str(part) for part in each["loc"]), "detail": each["msg"], "rule": each["type"]}
        for each in error.errors()[:SHOWN_ERRORS]
    ]
    detail = "; ".join(f"{each['field']}: {each['detail']}" for each in found)
    if len(error.errors()) > SHOWN_ERRORS:
        detail += f"; and {len(error.errors()) - SHOWN_ERRORS} more"
    return _problem(422, InvalidRequest.code, detail, found=found)


def _answer_http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - for the type checker
    if error.status_code == 400:  # how the framework answers a body that it cannot parse
        return _problem(422, InvalidRequest.code, str(error.detail))
    codes = {404: "not_found", 405: "method_not_allowed", 413: TooLarge.code}
    code = codes.get(error.status_code, HTTPStatus(error.status_code).name.lower())
    return _problem(error.status_code, code, str(error.detail), headers=error.headers)


def _answer_nobody(request: Request, _error: Exception) -> JSONResponse:
    """Who hung up in the middle of a body hears nothing; it is no failure of ours either."""
    log.info("a client hung up before its request was complete", method=request.method, path=request.url.path)
    return _problem(400, InvalidRequest.code, "the request was not sent to its end")


def _answer_database(request: Request, error: Exception) -> JSONResponse:
    lost = isinstance(error, PoolTimeoutError | OperationalError) or getattr(error, "connection_invalidated", False)
    if not lost:
        return _answer_unexpected(request, error)
    log.warning("the database cannot be reached", path=request.url.path, error=type(error).__name__)
    return _problem(503, "database_unavailable", "the database cannot be reached; nothing was changed, try again")


def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("a request failed unexpectedly", method=request.method, path=request.url.path, exc_info=error)
    return _problem(500, "internal_error", "something failed on our side; the log has the reason")


def _problem(
    status: int,
    code: str,
    detail: str,
    *,
    found: list[dict[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    problem = Problem(
        type=f"urn:maskline:problem:{code}", title=HTTPStatus(status).phrase, status=status, detail=detail, code=code,
        errors=found,
    )  # fmt: skip
    extra = dict(headers or {})
    if status in (429, 503, 507) or code == errors.IdempotencyConflict.code:
        extra["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(exclude_none=True), status, headers=extra, media_type=PROBLEM_TYPE)
