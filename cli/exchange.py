"""One exchange with a server: sent again while it is busy or the line breaks, and what its refusals are as errors."""

import contextlib
import re
import time
from collections.abc import Callable

import httpx2

from cli.failures import REFUSED, UNREACHABLE, Failure

ATTEMPTS = 4
PAUSE_SECONDS = 0.25  # doubled after every attempt
LONGEST_PAUSE_SECONDS = 10.0  # however long a server asks to wait
BUSY = frozenset({429, 502, 503, 504, 507})


class ApiError(Failure):
    """The service answered, and refused. `code` is stable and for programs."""

    exit_status = REFUSED

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{detail} ({code}, HTTP {status})")
        self.status = status
        self.code = code
        self.detail = detail


class ServiceUnreachable(Failure):
    exit_status = UNREACHABLE


def repeat(
    send: Callable[[], httpx2.Response],
    *,
    whom: str,
    accepted: frozenset[int] = frozenset(),
    resent: list[str] | None = None,
) -> httpx2.Response:
    """Send until there is an answer that is not "later", at most ATTEMPTS times; the last answer counts anyway."""
    pause = PAUSE_SECONDS
    for attempts_left in reversed(range(ATTEMPTS)):
        asked_seconds: float | None = None
        try:
            answer = send()
        except httpx2.TransportError as error:
            if not attempts_left:
                raise ServiceUnreachable(f"{whom} cannot be reached: {describe(error)}") from error
            if resent is not None and not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                resent.append(describe(error))
        else:
            if not attempts_left or answer.status_code in accepted or not _is_for_later(answer):
                return answer
            with contextlib.suppress(ValueError):  # it may also be a date; our own pause does then
                asked_seconds = float(answer.headers.get("Retry-After", ""))
        time.sleep(min(pause if asked_seconds is None else max(asked_seconds, 0.0), LONGEST_PAUSE_SECONDS))
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


def _is_for_later(answer: httpx2.Response) -> bool:
    """Busy, or still at work on the same request that an earlier try sent."""
    return answer.status_code in BUSY or (answer.status_code == 409 and refusal(answer).code == "idempotency_in_flight")


def refusal(answer: httpx2.Response) -> ApiError:
    try:
        problem = answer.json()
        return ApiError(answer.status_code, str(problem["code"]), str(problem["detail"]))
    except (ValueError, KeyError, TypeError):  # not ours: a proxy's page, or another program's
        return ApiError(answer.status_code, f"http_{answer.status_code}", answer.reason_phrase or "refused")


def describe(error: httpx2.TransportError) -> str:
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
