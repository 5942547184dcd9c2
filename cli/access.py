"""Where the service is and how to be let in: what was typed, else the environment, else the local stack nearby.

A running stack describes itself in `.maskline/stack.json`; it is looked for from the working folder upwards.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.failures import UNREACHABLE, Failure, Misuse

if TYPE_CHECKING:
    from shared.config import Settings

DATA_FOLDER = ".maskline"
SERVERS = ("MASKLINE_DATABASE__", "MASKLINE_BROKER__", "MASKLINE_STORAGE__")


class NoService(Failure):
    exit_status = UNREACHABLE


@dataclass(frozen=True, kw_only=True)
class Access:
    url: str
    api_key: str


@dataclass(frozen=True, kw_only=True)
class LocalStack:
    """A stack that runs on this machine, as it describes itself."""

    folder: Path
    url: str
    api_key: str
    environment: Mapping[str, str]
    pids: frozenset[int]


def find_access(*, url: str | None, api_key: str | None, folder: Path | None = None) -> Access:
    """Raises NoService, and Misuse without a key for an address that is not the local stack's."""
    stack = find_stack(folder or Path.cwd()) if not (url and api_key) else None
    if not url:
        if stack is None:
            raise NoService("no service is known: start one here with `maskline up`, or give --url (MASKLINE_URL)")
        url = stack.url
    if not api_key:
        if stack is None or url.rstrip("/") != stack.url:
            raise Misuse(f"{url} needs an API key: give --api-key or set MASKLINE_API_KEY")
        api_key = stack.api_key
    return Access(url=url, api_key=api_key)


def find_stack(folder: Path) -> LocalStack | None:
    """The stack that runs in `.maskline` of this folder or the nearest one above."""
    for each in (folder, *folder.parents):
        stack = read_stack(each / DATA_FOLDER)
        if stack is not None:
            return stack
    return None


def read_stack(data: Path) -> LocalStack | None:
    """The stack that runs on this data folder; None when none does, or its owner was killed."""
    path = data / "stack.json"
    try:
        described: dict[str, Any] = json.loads(path.read_text())
        stack = LocalStack(
            folder=data,
            url=described["url"],
            api_key=described["api_key"],
            environment=described["environment"],
            pids=frozenset(described["pids"].values()),
        )
        return stack if _is_alive(described["pid"]) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise Failure(f"{path} belongs to another user: give --url and --api-key") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{path} cannot be understood: stop that stack and start it again") from error


def load_service_settings(*, folder: Path | None = None) -> "Settings":
    """The settings of the servers' own processes, for the commands that work beside them.

    Who names no server in the environment, and has a stack running nearby, means that one.
    """
    from shared.config import SettingsError, load_settings

    if not names_servers():
        stack = find_stack(folder or Path.cwd())
        if stack is not None:
            os.environ.update(stack.environment)
    try:
        return load_settings()
    except SettingsError as error:
        raise Misuse(str(error)) from error


def names_servers() -> bool:
    """Whether the environment says where the database, the broker or the storage is."""
    return any(name.startswith(SERVERS) for name in os.environ)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
