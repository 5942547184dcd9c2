"""The servers die, hang, fill up, and come back, under a whole stack of real processes. What was accepted, ends."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest
import redis

from tests.acceptance.conftest import GIVEN_BACK, SLOW, Service, stopped, wait_until

RUNNING = {"running"}
URLS = ("MASKLINE_DATABASE__URL", "MASKLINE_BROKER__URL")


# --- Redis ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker(service: Service) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(service.stack.environment()["MASKLINE_BROKER__URL"]) as client:
        yield client


def test_a_broker_that_dies_and_comes_back_empty_loses_no_job(
    service: Service, scene: bytes, large_scene: bytes
) -> None:
    running = service.submit(large_scene, options=SLOW)
    service.wait_for(running, states=RUNNING, stage="segmenting")
    queued = service.submit(scene)
    service.stack.kill("redis")
    for log in (service.stack.path / "redis").rglob("appendonly*"):
        if log.is_file():
            log.unlink()
    service.stack.start("redis")
    assert [service.wait_for(job)["state"] for job in (running, queued)] == ["succeeded"] * 2
    assert service.outcomes(running) == ["started", "done"]


def test_a_job_is_accepted_at_once_while_the_broker_hangs(service: Service, scene: bytes) -> None:
    with stopped(service, "redis"):
        began = time.monotonic()
        job = service.submit(scene)
        assert time.monotonic() - began < 2, "the contract says 202 in under 2 s while Redis is down"
    assert service.wait_for(job)["state"] == "succeeded"


def test_what_is_submitted_while_the_broker_is_down_is_all_accepted_and_all_done_after_its_return(
    service: Service, scene: bytes
) -> None:
    service.stack.kill("redis")
    try:
        jobs = [service.submit(scene) for _ in range(5)]
    finally:
        service.stack.start("redis")
    assert [service.wait_for(job)["state"] for job in jobs] == ["succeeded"] * 5


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_job_is_accepted_while_the_broker_takes_nothing(
    service: Service, broker: redis.Redis, scene: bytes, trouble: str
) -> None:
    log = service.stack.path / "logs" / "api.log"
    begin = log.stat().st_size
    if trouble == "full":
        broker.config_set("maxmemory", 1)
    else:
        broker.replicaof("127.0.0.1", 1)
    try:
        job = service.submit(scene)
        wait_until(lambda: b"a hint was not sent" in log.read_bytes()[begin:], "the broker took the hint")
    finally:
        broker.config_set("maxmemory", 0)
        broker.replicaof("NO", "ONE")
    assert service.wait_for(job)["state"] == "succeeded"


def test_a_child_that_dies_while_the_broker_is_away_gives_its_step_back_all_the_same(
    service: Service, large_scene: bytes
) -> None:
    service.arm("infer-made", "stop")
    job = service.submit(large_scene)
    child = service.wait_for_fault("infer-made")
    service.stack.kill("redis")
    try:
        os.kill(child, signal.SIGKILL)
        wait_until(partial(service.query, GIVEN_BACK.format(job["id"])), "nobody noticed")
    finally:
        service.stack.start("redis")
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job) == ["started", "lost", "started", "done"]


# --- PostgreSQL ----------------------------------------------------------------------------------------------------


def test_a_database_that_dies_costs_a_running_job_nothing(service: Service, large_scene: bytes) -> None:
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    service.stack.kill("postgres")
    answer = service.http.get(job["links"]["self"])
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    service.stack.start("postgres")
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job) == ["started", "done"]


def test_a_child_that_dies_while_the_database_is_away_gives_its_step_back_when_it_returns(
    service: Service, large_scene: bytes
) -> None:
    service.arm("infer-made", "stop")
    job = service.submit(large_scene)
    child = service.wait_for_fault("infer-made")
    service.stack.kill("postgres")
    os.kill(child, signal.SIGKILL)
    log = service.stack.path / "logs" / "gpu0.log"
    begin = log.stat().st_size
    wait_until(lambda: b"waits for the database" in log.read_bytes()[begin:], "nobody came into its place")
    service.stack.start("postgres")
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job) == ["started", "lost", "started", "done"]


def test_a_database_that_hangs_and_goes_on_loses_nothing(service: Service, scene: bytes, large_scene: bytes) -> None:
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    with stopped(service, "postgres"):
        answer = service.http.get(job["links"]["self"], timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job) == ["started", "done"]
    assert service.wait_for(service.submit(scene))["state"] == "succeeded"


# --- S3 ------------------------------------------------------------------------------------------------------------


def test_a_storage_that_dies_before_the_masks_are_stored_puts_the_job_off(service: Service, large_scene: bytes) -> None:
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    service.stack.kill("s3")
    try:
        wait_until(lambda: "put off" in service.outcomes(job), "it was not put off")
        assert service.http.get(job["links"]["result"]).json()["code"] == "not_ready"
    finally:
        service.stack.start("s3")
    assert service.wait_for(job)["state"] == "succeeded"


def test_a_storage_whose_disk_is_full_puts_the_job_off_and_shows_nothing_partial(
    service: Service, large_scene: bytes
) -> None:
    server = service.stack.processes["s3"].pid
    assert server is not None
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    soft, hard = resource.prlimit(server, resource.RLIMIT_FSIZE)
    resource.prlimit(server, resource.RLIMIT_FSIZE, (100, hard))
    try:
        wait_until(lambda: "put off" in service.outcomes(job), "it was not put off")
        keys = [key for key in service.storage().list_keys("tenants/") if f"/jobs/{job['id']}/" in key]
        assert [key.rpartition("/")[2] for key in keys] == ["source"]
    finally:
        resource.prlimit(server, resource.RLIMIT_FSIZE, (soft, hard))
    assert service.wait_for(job)["state"] == "succeeded"


# --- what all of that leaves behind --------------------------------------------------------------------------------


def test_no_log_tells_a_secret(service: Service) -> None:
    """After all of the trouble above, which is when errors are written down with what they carry."""
    given = service.stack.environment()
    secrets = [
        service.stack.api_key, service.stack.webhook_secret, given["MASKLINE_STORAGE__SECRET_KEY"],
        *(given[name].partition("//")[2].partition("@")[0].rpartition(":")[2] for name in URLS), "X-Amz-Signature",
    ]  # fmt: skip
    assert all(len(each) > 10 for each in secrets)
    for log in (service.stack.path / "logs").iterdir():
        written = log.read_text(errors="replace")
        assert [each for each in secrets if each in written] == [], log.name
