"""The data folder of a local stack: one owner at a time, with the ports and secrets that a restart keeps.

The owner is whoever holds the lock on `lock`; the kernel drops it with the process, so no lock is ever stale. Ports
and secrets are in `remembered.json`, readable by its user alone.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cli.local.child import StackError, stop_leftovers

# Below what the kernel hands to outgoing connections (Linux from 32768, others higher): a client that keeps trying to
# reach a stopped server must not be given the server's own port as its source, which would take it, or even connect
# to itself.
PORTS = range(20_000, 32_768)
KEEPER_SECONDS = 40.0
PACKAGES = Path(__file__).resolve().parents[2]


class DataFolder:
    """A claimed folder; made by `claim_folder` alone."""

    def __init__(self, path: Path, *, lock: BinaryIO) -> None:
        self.path = path
        self._lock = lock
        self._file = path / "remembered.json"
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "cli.local.keeper", str(path)],
            cwd=PACKAGES,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )

    @property
    def keeper_pid(self) -> int:
        return self._keeper.pid

    def make(self, name: str, *, mode: int = 0o700) -> Path:
        path = self.path / name
        path.mkdir(mode=mode, exist_ok=True)
        return path

    def recall(self, key: str) -> str | None:
        return self._read().get(key)

    def remember(self, key: str, value: str) -> None:
        write_private(self._file, json.dumps({**self._read(), key: value}, indent=1))

    def secret(self, key: str, *, length: int = 32) -> str:
        """A random secret made of letters and digits, the same on every call."""
        known = self.recall(key)
        if known is None:
            alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
            known = "".join(secrets.choice(alphabet) for _ in range(length))
            self.remember(key, known)
        return known

    def port(self, name: str, *, wanted: int | None = None) -> int:
        """The wanted port, or the one of last time, or a free one; remembered. Only a wanted one may be refused."""
        key = f"{name}_port"
        last = self.recall(key)
        if wanted is not None:
            if not is_free(wanted):
                raise StackError(
                    f"Port {wanted} is in use. Choose another for {name}, or none to have a free one found."
                )
            port = wanted
        elif last is not None and is_free(int(last)):
            return int(last)
        else:
            port = self._free_port()
        self.remember(key, str(port))
        return port

    def release(self) -> None:
        """Let go; the keeper ends what is still running."""
        try:
            self._keeper.communicate(timeout=KEEPER_SECONDS)  # closes its input
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        finally:
            self._lock.close()

    def _free_port(self) -> int:
        taken = {value for key, value in self._read().items() if key.endswith("_port")}
        for port in random.sample(PORTS, 200):
            if str(port) not in taken and is_free(port):
                return port
        raise StackError(f"No free port was found between {PORTS.start} and {PORTS.stop}.")

    def _read(self) -> dict[str, str]:
        try:
            remembered: dict[str, str] = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise StackError(
                f"{self._file} cannot be understood ({error}). It holds the passwords: restore it."
            ) from error
        return remembered


@contextlib.contextmanager
def claim_folder(path: Path) -> Iterator[DataFolder]:
    """Make the folder if needed, become its one owner, and end what an owner that was killed left running there."""
    path = Path(os.path.abspath(path))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("run", "logs"):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        # Permissions do not bind root, and a mount may be read-only: only writing tells.
        write_private(path / "run" / "probe", "")
        (path / "run" / "probe").unlink()
        lock = (path / "lock").open("a+b", buffering=0)
    except (FileExistsError, NotADirectoryError) as error:
        raise StackError(f"{path} cannot be the data folder: {error.filename} is or is in a file.") from error
    except OSError as error:
        raise StackError(f"{path} cannot be the data folder: {error.strerror} ({error.filename}).") from error
    try:
        _take(lock, path=path)
        stop_leftovers(path)
        folder = DataFolder(path, lock=lock)
    except BaseException:
        lock.close()
        raise
    try:
        yield folder
    finally:
        folder.release()


def _take(lock: BinaryIO, *, path: Path) -> None:
    deadline = time.monotonic() + KEEPER_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().decode() or "unknown"
            # A dead owner's keeper is still clearing up; that is over in a moment.
            if _is_alive(owner) or time.monotonic() > deadline:
                raise StackError(f"A stack is already running in {path} (process {owner}).") from None
            time.sleep(0.05)
        except OSError as error:
            raise StackError(f"{path} cannot be the data folder: its file system has no locks ({error}).") from error
    lock.truncate(0)
    lock.write(str(os.getpid()).encode())


def _is_alive(owner: str) -> bool:
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do: connections of the last run that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise StackError(f"Port {port} cannot be had: {error.strerror}.") from error
        except OverflowError as error:
            raise StackError(f"There is no port {port}.") from error
    return True


def write_private(path: Path, text: str) -> None:
    """Replace the file at once, readable by its user alone."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
