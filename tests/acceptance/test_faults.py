"""What dies, comes back; what was accepted, ends. Real processes, real signals."""

import time

import redis

from tests.acceptance.conftest import SLOW, Service
from tests.receiver import Receiver

RUNNING = {"running"}


def test_a_worker_killed_in_the_middle_of_a_job_costs_one_attempt_and_nothing_else(
    service: Service, receiver: Receiver, large_scene: bytes
) -> None:
    job = service.submit(large_scene, options=SLOW, webhook_url=receiver.url)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    service.kill_gpu_child()
    done = service.wait_for(job)
    assert (done["state"], done["attempts"]) == ("succeeded", 2)
    assert [event["outcome"] for event in service.events(job, "attempt")] == ["started", "lost", "started", "done"]
    [(manifest_key,)] = service.query(f"SELECT manifest_key FROM jobs WHERE id = '{job['id']}'")  # noqa: S608
    assert "/attempts/2/" in manifest_key
    assert _manifests(service, job["id"]) == [manifest_key]
    deliveries = receiver.wait_for(job["id"])
    time.sleep(1)  # a second webhook would come from a second sender, at once
    assert len({each.webhook_id for each in deliveries}) == 1
    assert len(service.query(f"SELECT id FROM webhook_deliveries WHERE job_id = '{job['id']}'")) == 1  # noqa: S608


def test_a_worker_killed_in_the_middle_of_a_round_loses_none_of_its_jobs(
    service: Service, receiver: Receiver, large_scene: bytes
) -> None:
    first = service.submit(large_scene, options=SLOW)
    service.wait_for(first, states=RUNNING)
    jobs = [service.submit(large_scene, options=SLOW, webhook_url=receiver.url) for _ in range(3)]
    for job in jobs:  # the model has one of them, and the others are there
        service.wait_for(job, states=RUNNING, stage="segmenting")
    service.kill_gpu_child()
    for job in jobs:
        assert service.wait_for(job)["state"] == "succeeded"
        outcomes = [event["outcome"] for event in service.events(job, "attempt")]
        assert outcomes == ["started", "lost", "started", "done"]
        assert len(_manifests(service, job["id"])) == 1
        assert len({each.webhook_id for each in receiver.wait_for(job["id"])}) == 1


def test_an_emptied_broker_loses_no_queued_job(service: Service, scene: bytes) -> None:
    service.stack.stop("gpu0")
    jobs = [service.submit(scene) for _ in range(20)]
    with redis.Redis.from_url(service.stack.environment()["MASKLINE_BROKER__URL"]) as broker:
        broker.flushall()
    service.stack.start("gpu0")
    with redis.Redis.from_url(service.stack.environment()["MASKLINE_BROKER__URL"]) as broker:
        broker.flushall()
    assert [service.wait_for(job)["state"] for job in jobs] == ["succeeded"] * 20


def test_a_job_is_accepted_at_once_and_runs_later_while_the_broker_is_down(service: Service, scene: bytes) -> None:
    service.stack.stop("redis")
    try:
        began = time.monotonic()
        job = service.submit(scene)
        assert time.monotonic() - began < 2, "the contract says 202 in under 2 s while Redis is down"
        assert service.http.get("/readyz").json()["status"] == "degraded"
    finally:
        service.stack.start("redis")
    assert service.wait_for(job)["state"] == "succeeded"


def test_a_worker_that_is_deployed_anew_gives_its_step_back_and_spends_no_attempt(
    service: Service, large_scene: bytes
) -> None:
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    service.stack.restart("gpu0")
    assert service.wait_for(job)["state"] == "succeeded"
    outcomes = [event["outcome"] for event in service.events(job, "attempt")]
    assert outcomes == ["started", "released", "started", "done"]
    assert service.query(f"SELECT lost, failures FROM steps WHERE job_id = '{job['id']}'") == [(0, 0)]  # noqa: S608


def test_a_running_job_that_is_canceled_stops_and_frees_the_worker(
    service: Service, scene: bytes, large_scene: bytes
) -> None:
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    answer = service.http.post(job["links"]["cancel"])
    assert answer.status_code == 202
    assert service.wait_for(job)["state"] == "canceled"
    assert service.http.get(job["links"]["result"]).json()["code"] == "not_ready"
    assert service.wait_for(service.submit(scene))["state"] == "succeeded"


def test_a_deleted_job_takes_its_files_with_it(service: Service, scene: bytes) -> None:
    job = service.wait_for(service.submit(scene))
    assert service.http.delete(job["links"]["self"]).status_code == 204
    assert service.http.get(job["links"]["self"]).status_code == 404
    deadline = time.monotonic() + 20
    while _keys(service, job["id"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _keys(service, job["id"]) == []


def _manifests(service: Service, job_id: str) -> list[str]:
    return [key for key in _keys(service, job_id) if key.endswith("manifest.json")]


def _keys(service: Service, job_id: str) -> list[str]:
    return [key for key in service.storage().list_keys("tenants/") if f"/jobs/{job_id}/" in key]
