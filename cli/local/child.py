"""One child process of the local stack: started, watched, stopped, and found again after its owner died.

Every child leads a session of its own: Ctrl-C in a terminal reaches the owner alone, which then decides the order in
which things end, and one signal to the group takes a worker's pool processes along. What runs is written to
`run/NAME.pid` in the data folder, so that the keeper, or the next start, can end what a killed owner left behind.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HOME_VARIABLE = "MASKLINE_HOME"
KILL_SECONDS = 5.0
POLL_SECONDS = 0.02
TAIL_BYTES = 4096
LOG_BYTES = 64 * 2**20


class StackError(Exception):
    """Something about the local stack that its user can put right; the message is the whole story."""


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    account: pwd.struct_passwd | None = None
    """Whom to run as; None is whoever runs us."""
    rank: int = 0
    """What is left behind ends from the highest rank to the lowest: a worker before the database it writes to."""


@dataclass(frozen=True)
class Record:
    """What a pid file says."""

    pid: int
    program: str
    stop_signal: int
    rank: int


class Child(ABC):
    """A subclass says what `start` runs, when that is ready, and how long `stop` waits."""

    def __init__(self, name: str, *, home: Path) -> None:
        self.name = name
        self.home = home
        self.log = home / "logs" / f"{name}.log"
        self._record = home / "run" / f"{name}.pid"
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_signal = signal.SIGTERM
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self.poll() is None

    @abstractmethod
    def start(self) -> None:
        """Start it unless it runs, and return once it is ready; StackError, with its last words, if it does not."""

    @abstractmethod
    def stop(self) -> None:
        """Stop it cleanly within a bounded time, else kill it."""

    def spawn(self, command: Command) -> None:
        """Run the program; its output goes straight to the log file, so that no slow reader can ever block it."""
        with self._lock:
            account = command.account
            self.trim_log()
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command.arguments,
                    cwd=command.folder,
                    env={**command.environment, HOME_VARIABLE: str(self.home)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    user=account.pw_uid if account else None,
                    group=account.pw_gid if account else None,
                    extra_groups=[] if account else None,
                )
            self._stop_signal = command.stop_signal
            record = {
                "pid": self._process.pid,
                "program": os.path.realpath(command.arguments[0]),
                "stop_signal": int(command.stop_signal),
                "rank": command.rank,
            }
            self._record.write_text(json.dumps(record))

    def poll(self) -> int | None:
        """The exit status once it has ended (negative: the signal), else None."""
        with self._lock:
            if self._process is None or self._process.returncode is not None:
                return self._process.returncode if self._process else None
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            # Before it is reaped its id still names its group and nobody else's, so what it started ends with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._record.unlink(missing_ok=True)
            return self._process.wait()

    def signal(self, number: int) -> None:
        with self._lock:
            if self._process is not None and self.poll() is None:
                os.kill(self._process.pid, number)

    def ask_to_stop(self) -> None:
        self.signal(self._stop_signal)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.running:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def end(self, *, grace_seconds: float) -> bool:
        """Ask it to end, wait, then kill; False if it had to be killed."""
        self.ask_to_stop()
        if self.wait(grace_seconds):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        with self._lock:
            if self._process is not None and self.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self.wait(KILL_SECONDS)

    def trim_log(self) -> None:
        """Set a log aside that has grown large. Its writer appends, so it may be emptied while it is written."""
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)

    def last_words(self, lines: int = 8) -> str:
        """The end of its log, for a message about why it ended."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return "\n".join(log.read().decode(errors="replace").strip().splitlines()[-lines:])
        return ""


def describe_exit(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def stop_leftovers(home: Path, *, grace_seconds: float = 10.0) -> list[str]:
    """End what an owner that was killed left running, workers before servers; returns the names."""
    records = [(path, record) for path in sorted((home / "run").glob("*.pid")) if (record := _read_record(path))]
    stopped = []
    for rank in sorted({record.rank for _, record in records}, reverse=True):
        same = [(path, record) for path, record in records if record.rank == rank]
        alive = [(path, record) for path, record in same if _is_ours(record, path=path, home=home)]
        for _, record in alive:
            _send(record.pid, record.stop_signal)
        _wait_until_gone(alive, home=home, seconds=grace_seconds)
        for path, record in alive:
            if _is_ours(record, path=path, home=home):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(record.pid, signal.SIGKILL)
        if not _wait_until_gone(alive, home=home, seconds=KILL_SECONDS):
            raise StackError(f"Processes of an earlier stack in {home} do not end: {[r.pid for _, r in alive]}")
        stopped += [path.stem for path, _ in alive]
        for path, _ in same:
            path.unlink(missing_ok=True)
    return stopped


def _read_record(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        # Half-written when the owner was killed; its process, if any, holds a port, and another port is found.
        path.unlink(missing_ok=True)
        return None


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_until_gone(records: list[tuple[Path, Record]], *, home: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_is_ours(record, path=path, home=home) for path, record in records):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _is_ours(record: Record, *, path: Path, home: Path) -> bool:
    """Whether that id is still the process we started: ids are used again, after a reboot almost surely.

    The program must be the same, and the process must work in the data folder or carry it in its environment. (Redis
    overwrites its environment for its title, and the applications do not run in the folder: hence either.)
    """
    process = Path("/proc") / str(record.pid)
    if not Path("/proc/self/exe").exists():
        return _might_be_ours(record, path=path)
    try:
        if os.readlink(process / "exe").removesuffix(" (deleted)") != record.program:
            return False
        working = Path(os.readlink(process / "cwd"))
        environment = (process / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # gone, a zombie, or another user's
    real_home = home.resolve()
    return working.is_relative_to(real_home) or f"{HOME_VARIABLE}={home}".encode() in environment


def _might_be_ours(record: Record, *, path: Path) -> bool:
    """Without /proc nothing tells a leftover from a stranger, so a person decides."""
    try:
        os.kill(record.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    raise StackError(
        f"Process {record.pid} may be {path.stem} of an earlier stack: end it if so, else delete {path}; start again."
    )
