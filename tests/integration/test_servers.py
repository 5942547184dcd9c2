"""What the servers of the local stack promise: real answers, data that outlives them, and nothing left running."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx2
import psycopg
import pytest
import redis
from botocore.config import Config
from mypy_boto3_s3 import S3Client
from redis.backoff import NoBackoff
from redis.retry import Retry

from cli.local.child import StackError
from cli.local.folder import claim_folder
from cli.local.postgres import Postgres
from cli.local.server import Server
from cli.local.servers import ObjectStore, Redis, Servers, run_servers

BUCKET = "promises"
END_SECONDS = 15
PART_BYTES = 5 * 2**20
OWNER = """
import json, os, sys, time
from pathlib import Path
from cli.local.servers import run_servers
with run_servers(Path(sys.argv[1]), durable=False) as servers:
    pids = {server.name: server.pid for server in servers.all()}
    print(json.dumps(pids | {"keeper": servers.folder.keeper_pid}), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="maskline-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def s3(servers: Servers) -> S3Client:
    return connect_s3(servers.s3)


def connect_s3(store: ObjectStore) -> S3Client:
    client: S3Client = boto3.client(
        "s3",
        endpoint_url=store.url,
        region_name="us-east-1",
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1},
        ),
    )
    with contextlib.suppress(client.exceptions.BucketAlreadyExists):
        client.create_bucket(Bucket=BUCKET)
    return client


def connect_redis(server: Redis) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


def ask(server: Postgres, question: str) -> str:
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        row = connection.execute(question.encode()).fetchone()
    assert row is not None
    return str(row[0])


def start_owner(folder: Path) -> tuple[subprocess.Popen[str], dict[str, int]]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    return owner, json.loads(owner.stdout.readline())


def kill_owner(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: dict[str, int]) -> None:
    deadline = time.monotonic() + END_SECONDS
    while alive := [name for name, pid in pids.items() if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def write_everywhere(servers: Servers, text: str) -> None:
    with psycopg.connect(servers.postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE TABLE kept AS SELECT '{text}' AS text".encode())
    client = connect_redis(servers.redis)
    client.set("kept", text)
    client.close()
    connect_s3(servers.s3).put_object(Bucket=BUCKET, Key="kept", Body=text.encode())


def read_everywhere(servers: Servers) -> set[str]:
    client = connect_redis(servers.redis)
    kept = client.get("kept")
    client.close()
    stored = connect_s3(servers.s3).get_object(Bucket=BUCKET, Key="kept")["Body"].read().decode()
    return {ask(servers.postgres, "SELECT text FROM kept"), str(kept), stored}


class TestAnswers:
    def test_postgres_is_18_in_utf8_and_makes_ordered_ids(self, servers: Servers) -> None:
        assert ask(servers.postgres, "SHOW server_version").startswith("18.")
        assert ask(servers.postgres, "SHOW server_encoding") == "UTF8"
        assert ask(servers.postgres, "SELECT lower('ÄÉ')") == "äé"
        assert ask(servers.postgres, "SELECT uuid_extract_version(uuidv7())") == "7"

    def test_postgres_wants_the_password(self, servers: Servers) -> None:
        stranger = f"host=127.0.0.1 port={servers.postgres.port} user=maskline dbname=maskline password=guess"
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(stranger)

    def test_redis_never_evicts_and_writes_to_disk(self, servers: Servers) -> None:
        client = connect_redis(servers.redis)
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        client.close()

    def test_redis_wants_the_password(self, servers: Servers) -> None:
        client = redis.Redis(port=servers.redis.port, retry=Retry(NoBackoff(), 0))
        with pytest.raises(redis.AuthenticationError):
            client.ping()
        client.close()


class TestObjects:
    def test_put_is_read_back_whole_and_in_part(self, s3: S3Client) -> None:
        s3.put_object(Bucket=BUCKET, Key="a/b c é.bin", Body=b"first")
        s3.put_object(Bucket=BUCKET, Key="a/b c é.bin", Body=b"0123456789")
        assert s3.get_object(Bucket=BUCKET, Key="a/b c é.bin")["Body"].read() == b"0123456789"
        ranged = s3.get_object(Bucket=BUCKET, Key="a/b c é.bin", Range="bytes=2-4")
        assert (ranged["Body"].read(), ranged["ContentRange"]) == (b"234", "bytes 2-4/10")

    def test_list_pages_and_delete(self, s3: S3Client) -> None:
        keys = [f"many/{number}/x" for number in range(5)]
        for key in keys:
            s3.put_object(Bucket=BUCKET, Key=key, Body=b"x")
        pages = s3.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix="many/", PaginationConfig={"PageSize": 2}
        )
        assert [found["Key"] for page in pages for found in page["Contents"]] == keys
        s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": key} for key in [*keys, "many/never"]]})
        assert "Contents" not in s3.list_objects_v2(Bucket=BUCKET, Prefix="many/")
        with pytest.raises(s3.exceptions.NoSuchKey):
            s3.get_object(Bucket=BUCKET, Key=keys[0])

    def test_signed_links_put_and_get(self, s3: S3Client) -> None:
        put = s3.generate_presigned_url("put_object", Params={"Bucket": BUCKET, "Key": "signed"})
        assert httpx2.put(put, content=b"by link").status_code == 200
        named = {"Bucket": BUCKET, "Key": "signed", "ResponseContentDisposition": 'attachment; filename="x.png"'}
        answer = httpx2.get(s3.generate_presigned_url("get_object", Params=named))
        assert (answer.content, answer.headers["content-disposition"]) == (b"by link", 'attachment; filename="x.png"')
        assert httpx2.get(f"{put.split('?')[0]}").status_code >= 400

    def test_multipart_by_links_in_any_order(self, s3: S3Client) -> None:
        upload = s3.create_multipart_upload(Bucket=BUCKET, Key="parts")["UploadId"]
        parts = {2: b"2" * 10, 1: b"1" * PART_BYTES}
        tags = {}
        for number, content in parts.items():
            target = {"Bucket": BUCKET, "Key": "parts", "UploadId": upload, "PartNumber": number}
            tags[number] = httpx2.put(s3.generate_presigned_url("upload_part", Params=target), content=content)
        with pytest.raises(s3.exceptions.NoSuchKey):
            s3.get_object(Bucket=BUCKET, Key="parts")
        s3.complete_multipart_upload(
            Bucket=BUCKET,
            Key="parts",
            UploadId=upload,
            MultipartUpload={"Parts": [{"PartNumber": n, "ETag": tags[n].headers["etag"]} for n in sorted(parts)]},
        )
        assert s3.get_object(Bucket=BUCKET, Key="parts")["Body"].read() == parts[1] + parts[2]


class TestLives:
    def test_a_second_set_runs_beside_and_data_survives_stops_and_kills(self, servers: Servers, folder: Path) -> None:
        with run_servers(folder) as second:
            ports = [server.port for server in second.all()]
            assert not set(ports) & {server.port for server in servers.all()}
            write_everywhere(second, "here")
            write_everywhere(servers, "there")
            time.sleep(1.1)  # what Redis may lose to a kill is its last second
            for server in second.all():
                server.kill()
                assert not server.running
                server.start()
            assert read_everywhere(second) == {"here"}
        with run_servers(folder) as again:
            assert [server.port for server in again.all()] == ports
            assert read_everywhere(again) == {"here"}
        assert read_everywhere(servers) == {"there"}

    def test_a_killed_owner_leaves_nothing_running_and_no_stale_lock(self, folder: Path) -> None:
        owner, pids = start_owner(folder)
        kill_owner(owner)
        with run_servers(folder, durable=False):  # waits for the keeper, which still holds the lock
            pass
        wait_until_gone(pids)

    def test_leftovers_of_a_killed_owner_and_keeper_end_at_the_next_start(self, folder: Path) -> None:
        owner, pids = start_owner(folder)
        os.kill(pids["keeper"], signal.SIGKILL)
        kill_owner(owner)
        left = {name: pid for name, pid in pids.items() if name != "keeper"}
        assert all(is_alive(pid) for pid in left.values())
        with run_servers(folder, durable=False) as servers:
            assert not any(is_alive(pid) for pid in left.values())
            assert ask(servers.postgres, "SELECT 1") == "1"

    def test_a_stranger_with_the_id_of_a_leftover_is_left_alone(self, folder: Path) -> None:
        with run_servers(folder, durable=False):
            pass
        with subprocess.Popen(["sleep", "600"]) as stranger:
            record = {"pid": stranger.pid, "program": "/bin/postgres", "stop_signal": 15, "rank": 0}
            (folder / "run" / "postgres.pid").write_text(json.dumps(record))
            (folder / "postgres" / "postmaster.pid").write_text(f"{stranger.pid}\n{folder / 'postgres'}\n")
            with run_servers(folder, durable=False):
                assert stranger.poll() is None
            stranger.kill()

    def test_postgres_starts_again_though_a_session_outlives_its_kill(self, folder: Path) -> None:
        with run_servers(folder, durable=False) as servers:
            session = psycopg.connect(servers.postgres.url.replace("+psycopg", ""))
            servers.postgres.kill()
            servers.postgres.start()
            with pytest.raises(psycopg.OperationalError):
                session.execute("SELECT 1")
            session.close()


class TestRefusals:
    @pytest.mark.parametrize("kind", [Postgres, Redis, ObjectStore])
    def test_a_wanted_port_in_use_is_named(self, kind: type[Server], folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken, claim_folder(folder) as claimed:
            port = taken.getsockname()[1]
            with pytest.raises(StackError, match=rf"^Port {port} is in use\."):
                kind(claimed, port=port, durable=False).start()

    def test_a_folder_has_one_owner(self, servers: Servers) -> None:
        started = time.monotonic()
        with (
            pytest.raises(StackError, match=rf"already running in .* \(process {os.getpid()}\)"),
            run_servers(servers.folder.path),
        ):
            pass
        assert time.monotonic() - started < 5

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_folder_below_a_file_is_refused(self, folder: Path, name: str) -> None:
        (folder / "file").touch()
        with pytest.raises(StackError, match=r"cannot be the data folder: .*file"), claim_folder(folder / name):
            pass

    def test_a_folder_nobody_can_write_is_refused(self) -> None:
        # Permissions do not bind root, so a file system that takes no files stands in for a read-only mount.
        with (
            pytest.raises(StackError, match=r"^/proc/maskline cannot be the data folder: "),
            claim_folder(Path("/proc/maskline")),
        ):
            pass

    @pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
    def test_a_folder_we_may_not_write_is_refused(self, folder: Path) -> None:
        folder.chmod(0o500)
        with pytest.raises(StackError, match=r"cannot be the data folder: Permission denied"), claim_folder(folder):
            pass

    def test_a_program_that_ends_says_why(self, folder: Path) -> None:
        with claim_folder(folder) as claimed:
            (folder / "redis").mkdir()
            (folder / "redis" / "appendonly.aof").write_text("not a log of commands\n")
            with pytest.raises(StackError, match=r"(?s)Redis ended while starting:.*Bad file format"):
                Redis(claimed, durable=False).start()
