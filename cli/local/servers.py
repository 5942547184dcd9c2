"""The three real servers of the local stack, out of wheels: PostgreSQL 18, Redis, and S3 on a folder.

Each is a child process on 127.0.0.1 with its own port, password and subfolder, the same after every restart.
`maskline up` and the tests run exactly these; nothing of the application is here.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from cli.local.child import Command
from cli.local.folder import DataFolder, claim_folder
from cli.local.postgres import Postgres
from cli.local.server import HOST, Server, find_program, plain_environment

BUCKET = "maskline"


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
            arguments=(find_program("redis-server"), "redis.conf"), folder=data, environment=plain_environment()
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
            arguments=(find_program("rclone"), *arguments, str(self.folder.path / "s3")),
            folder=self.folder.path / "s3",
            environment=plain_environment() | {"RCLONE_AUTH_KEY": keys},
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
            "MASKLINE_STORAGE__BUCKET": BUCKET,
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
