"""The local stack: servers, migrations, a tenant with its key, and the application, under one owner.

`Stack` is for Python (the demo and the acceptance tests start, kill and restart its processes); `up.py` puts it on
a terminal. Whatever ends unasked is started again; whatever was stopped by name stays down until it is started.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cli.local.apps import DRAIN_SECONDS, App, answers, api_arguments, app_environment, worker_arguments
from cli.local.child import Child, StackError, describe_exit
from cli.local.folder import DataFolder, claim_folder, write_private
from cli.local.server import HOST
from cli.local.servers import Servers, make_servers

if TYPE_CHECKING:
    from shared.db import SessionFactory

WATCH_SECONDS = 0.2
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""Who ran this long has recovered, and its next end is a first one."""
PROCESSES_OF_IO = 2
SOURCES = "sources"
"""The bucket that jobs may name, `s3://sources/…`: a folder of the stack, to drop files into."""


class Stack:
    """Use it as a context manager, or `start()` and `stop()`. `report` is told, in sentences, what goes on."""

    def __init__(
        self,
        path: Path,
        *,
        port: int | None = None,
        gpu_workers: int = 1,
        settings: Mapping[str, str] | None = None,
        durable: bool = True,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.processes: dict[str, Child] = {}
        """The servers, then the application; in the order of starting."""
        self.url = ""
        self.api_key = ""
        self.webhook_secret = ""
        self._wanted_port = port
        self._gpu_workers = gpu_workers
        self._settings = dict(settings or {})
        self._durable = durable
        self._report = report or (lambda _: None)
        self._owned = contextlib.ExitStack()
        self._servers: Servers | None = None
        self._sessions: SessionFactory | None = None
        self._held: set[str] = set()
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._given_up = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str | None = None) -> None:
        """Everything, or the one process of that name; returns once it is ready. StackError if that fails."""
        if name is not None:
            self._start_one(self.processes[name])
            return
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def stop(self, name: str | None = None) -> None:
        """Cleanly: everything, or the one process of that name, which then stays down, its port and data kept."""
        if name is not None:
            with self._lock:
                self._held.add(name)
                self.processes[name].stop()
            return
        self._ending.set()
        with self._owned:
            pass
        self._ending.clear()
        self._given_up = False

    def kill(self, name: str) -> None:
        """As `kill -9`, its children included; it stays down until it is started."""
        with self._lock:
            self._held.add(name)
            self.processes[name].kill()

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)

    def give_up(self) -> None:
        """From a signal or another thread: `start` need not go on, everything is about to be stopped."""
        self._given_up = True

    def hurry(self) -> None:
        """From a signal or another thread: `stop` need not wait. What ran is taken back when its lease ends."""
        for process in self.processes.values():
            process.kill()

    def environment(self) -> dict[str, str]:
        """The settings that this stack's application runs with."""
        if self._servers is None:
            raise StackError("The stack is not started.")
        # Receivers and sources of a local stack are on the same machine, mostly.
        defaults = {
            "MASKLINE_WEBHOOKS__ALLOW_PRIVATE_ADDRESSES": "true",
            "MASKLINE_FETCH__ALLOW_PRIVATE_ADDRESSES": "true",
            "MASKLINE_STORAGE__SOURCES": json.dumps([SOURCES]),
        }
        return defaults | self._settings | self._servers.environment()

    def _start_all(self) -> None:
        self._held.clear()
        folder = self._owned.enter_context(claim_folder(self.path))
        port = folder.port("api", wanted=self._wanted_port)
        self._servers = make_servers(folder, durable=self._durable)
        self.processes = {server.name: server for server in self._servers.all()}
        self._report("Starting PostgreSQL, Redis and S3 …")
        for server in self._servers.all():
            if self._given_up:
                return
            self._owned.callback(server.stop)
            server.start()
        self._prepare_services(folder)
        self.url = f"http://{HOST}:{port}"
        self.processes |= {app.name: app for app in self._make_apps(port)}
        self._owned.callback(self._remove_description)
        self._owned.callback(self._drain)
        self._report("Starting the application …")
        for app in self._apps():
            app.launch()
        self._write_description()
        for app in self._apps():
            app.wait_ready(given_up=lambda: self._given_up)
        watch = threading.Thread(target=self._watch, name="watch", daemon=True)
        watch.start()
        self._owned.callback(watch.join)

    def _start_one(self, process: Child) -> None:
        with self._lock:
            self._held.discard(process.name)
            if isinstance(process, App):
                process.launch()
            else:
                process.start()
            self._write_description()
        if isinstance(process, App):  # outside the lock: a worker takes its time, and the others are watched meanwhile
            process.wait_ready()

    def _prepare_services(self, folder: DataFolder) -> None:
        """Schema, bucket, and a tenant whose key stays the same from start to start."""
        from shared import config, db, storage, tenants

        if self._servers is None:
            raise StackError("The stack is not started.")
        given = self._servers.environment()
        database = config.Database(url=given["MASKLINE_DATABASE__URL"])
        db.upgrade(database.url)
        buckets = config.Storage.model_validate(
            {
                name.removeprefix("MASKLINE_STORAGE__").lower(): value
                for name, value in given.items()
                if name.startswith("MASKLINE_STORAGE__")
            }
        )
        for bucket in (buckets.bucket, SOURCES):
            storage.Storage.from_settings(buckets).other(bucket).ensure_bucket()
        self._sessions = db.SessionFactory(database)
        self._owned.callback(self._sessions.dispose)
        access = tenants.ensure_local_tenant(self._sessions, api_key=folder.recall("api_key"))
        folder.remember("api_key", access.api_key)
        self.api_key, self.webhook_secret = access.api_key, access.webhook_secret

    def _make_apps(self, port: int) -> list[App]:
        environment = app_environment(self.environment())

        def make(name: str, arguments: tuple[str, ...], is_ready: Callable[[App], bool] | None = None) -> App:
            return App(name, home=self.path, arguments=arguments, environment=environment, is_ready=is_ready)

        def worker(name: str, queue: str, concurrency: int) -> App:
            # The port makes the node's name unique among the stacks of one machine.
            arguments = worker_arguments(queue, node=f"{name}.{port}@%h", concurrency=concurrency)
            return make(name, arguments, self._is_registered)

        return [
            make("api", api_arguments(port), lambda _: answers(self.url, "/readyz")),
            make("upkeep", ("-m", "worker.upkeep")),
            worker("io0", "io", PROCESSES_OF_IO),
            worker("webhooks0", "webhooks", 1),
            *(worker(f"gpu{number}", "gpu", 1) for number in range(self._gpu_workers)),
        ]

    def _is_registered(self, app: App) -> bool:
        """Whether a process of this worker's own session has its row; rows of an earlier start linger."""
        from sqlalchemy import select
        from sqlalchemy.exc import OperationalError

        from shared.models import Worker

        if self._sessions is None:
            return False
        try:
            with self._sessions() as session:
                pids = session.scalars(select(Worker.pid)).all()
        except OperationalError:
            return False
        return any(_session_of(pid) == app.pid for pid in pids)

    def _apps(self) -> list[App]:
        return [process for process in self.processes.values() if isinstance(process, App)]

    def _write_description(self) -> None:
        """For the command line: where the stack is and how to be let in. It exists while the stack runs."""
        description = {
            "url": self.url,
            "api_key": self.api_key,
            "webhook_secret": self.webhook_secret,
            "pid": os.getpid(),
            "pids": {name: process.pid for name, process in self.processes.items()},
            "environment": self.environment(),
        }
        write_private(self.path / "stack.json", json.dumps(description, indent=1))
        write_private(self.path / "authorization", f"Authorization: Bearer {self.api_key}\n")  # for `curl -H @file`

    def _remove_description(self) -> None:
        for name in ("stack.json", "authorization"):
            (self.path / name).unlink(missing_ok=True)

    def _drain(self) -> None:
        """Workers first, while all that they need is up; the API last, so that clients can watch."""
        workers = [app for app in self._apps() if app.name != "api"]
        for app in workers:
            app.ask_to_stop()
        deadline = time.monotonic() + DRAIN_SECONDS
        for app in workers:
            if not app.wait(deadline - time.monotonic()):
                app.kill()
                self._report(f"{app.name} did not stop in {DRAIN_SECONDS:.0f} s and was killed.")
        self.processes["api"].stop()

    def _watch(self) -> None:
        pauses: dict[str, float] = {}
        started: dict[str, float] = {}
        due: dict[str, float] = {}
        while not self._ending.wait(WATCH_SECONDS):
            for name, process in self.processes.items():
                process.trim_log()
                with self._lock:
                    if name in self._held or process.running or self._ending.is_set():
                        due.pop(name, None)
                        continue
                    now = time.monotonic()
                    if name not in due:
                        steady = now - started.get(name, 0.0) > STEADY_SECONDS
                        pause = FIRST_PAUSE_SECONDS if steady else pauses[name]
                        pauses[name] = min(2 * pause, LONGEST_PAUSE_SECONDS)
                        due[name] = now + pause
                        status = describe_exit(process.poll() or 0)
                        self._report(f"{name} ended ({status}); starting it again in {pause:g} s.")
                    elif now >= due[name]:
                        del due[name]
                        self._start_again(process)
                        started[name] = time.monotonic()

    def _start_again(self, process: Child) -> None:
        try:
            if isinstance(process, App):
                process.launch()
            else:
                process.start()
            self._write_description()
        except (StackError, OSError) as error:  # a full disk, say: the next round tries again, after a longer pause
            self._report(str(error))


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
