"""What a row of the catalogue is: an input, and the one answer there is to it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """At once, by a problem with this status and code; no job comes of it."""

    status: int
    code: str


@dataclass(frozen=True)
class Ended:
    """A job that comes to this state, with this code where it fails."""

    state: str
    code: str | None = None
    warns: bool = False
    """Of something in the file, in the manifest."""


DONE = Ended("succeeded")
WARNED = Ended("succeeded", warns=True)
INVALID = Ended("failed", "invalid_media")
TOO_MUCH = Ended("failed", "media_limit")


@dataclass(frozen=True)
class Media:
    """A file that somebody sends."""

    row: int
    says: str
    name: str
    data: bytes
    answer: Refused | Ended

    def __str__(self) -> str:
        return f"{self.row} {self.says}"


@dataclass(frozen=True)
class Sent:
    """Bytes that somebody sends to the API's port."""

    row: int
    says: str
    request: bytes
    answers: frozenset[tuple[int, str | None]]
    """Status and code. More than one where HTTP leaves it to the server; none of them is 500."""

    def __str__(self) -> str:
        return f"{self.row} {self.says}"
