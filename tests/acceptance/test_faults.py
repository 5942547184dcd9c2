"""What dies, comes back; what was accepted, ends. Real processes, real signals."""

import os
import signal
import time
import uuid
from functools import partial
from pathlib import Path

import redis

from shared.broker import GPU, Hints
from shared.config import Broker
from tests.acceptance.conftest import GIVEN_BACK, SLOW, Service, make_recording, stopped, wait_until
from tests.receiver import Receiver

RUNNING = {"running"}
RUNS = "SELECT 1 FROM steps WHERE job_id = '{}' AND attempt = {} AND state = 'running'"


def test_a_worker_killed_in_the_middle_of_a_job_costs_one_attempt_and_nothing_else(
    service: Service, receiver: Receiver, large_scene: bytes
) -> None:
    job = service.submit(large_scene, options=SLOW, webhook_url=receiver.url)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    service.kill_gpu_child()
    done = service.wait_for(job)
    assert (done["state"], done["attempts"]) == ("succeeded", 2)
    assert service.outcomes(job) == ["started", "lost", "started", "done"]
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
        assert service.outcomes(job) == ["started", "lost", "started", "done"]
        assert len(_manifests(service, job["id"])) == 1
        assert len({each.webhook_id for each in receiver.wait_for(job["id"])}) == 1


def test_a_job_that_kills_its_worker_every_time_fails_and_the_others_proceed(
    service: Service, scene: bytes, large_scene: bytes
) -> None:
    poison = service.submit(large_scene, options=SLOW, priority=10)
    others = [service.submit(scene) for _ in range(3)]
    for attempt in range(3):
        wait_until(partial(service.query, RUNS.format(poison["id"], attempt + 1)), "it was not tried again")
        service.kill_gpu_child()
    failed = service.wait_for(poison)
    assert (failed["state"], failed["error"]["code"], failed["attempts"]) == ("failed", "worker_lost", 3)
    assert [service.wait_for(job)["state"] for job in others] == ["succeeded"] * 3


def test_a_child_that_dies_while_its_worker_drains_leaves_its_step_to_others_at_once(
    service: Service, large_scene: bytes
) -> None:
    """Nobody is started in its place, so the parent itself gives the step back, last of all."""
    service.arm("infer-made", "stop")
    job = service.submit(large_scene)
    child = service.wait_for_fault("infer-made")
    service.stack.processes["gpu0"].ask_to_stop()
    os.kill(child, signal.SIGKILL)
    service.stack.stop("gpu0")
    assert service.query(f"SELECT state, lost FROM steps WHERE job_id = '{job['id']}'") == [("queued", 1)]  # noqa: S608
    service.stack.start("gpu0")
    assert service.wait_for(job)["state"] == "succeeded"


def test_when_parent_and_child_are_killed_the_end_of_the_lease_gives_the_step_back(
    service: Service, large_scene: bytes
) -> None:
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    service.stack.kill("gpu0")
    service.end_leases()
    wait_until(partial(service.query, GIVEN_BACK.format(job["id"])), "it was not given back")
    service.stack.start("gpu0")
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job) == ["started", "lost", "started", "done"]


def test_a_worker_that_is_started_again_gives_back_at_once_what_it_held_when_it_was_killed(
    service: Service, large_scene: bytes
) -> None:
    job = service.submit(large_scene, options=SLOW)
    service.wait_for(job, states=RUNNING, stage="segmenting")
    service.stack.kill("gpu0")
    service.stack.start("gpu0")
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job) == ["started", "lost", "started", "done"]


def test_a_child_that_hangs_with_the_interpreter_to_itself_is_ended_and_its_job_goes_on(
    service: Service, scene: bytes
) -> None:
    """Every thread of its own stands still, also those that could notice; its parent does."""
    service.stack.stop("gpu0")
    try:
        with service.second_worker(MASKLINE_WORKER__LEASE_SECONDS="2"):
            service.arm("infer-made", "hang")
            job = service.submit(scene)
            hanging = service.wait_for_fault("infer-made")
            assert service.wait_for(job)["state"] == "succeeded"
            assert not Path(f"/proc/{hanging}").exists()
    finally:
        service.stack.start("gpu0")
    assert service.outcomes(job) == ["started", "lost", "started", "done"]


def test_a_worker_that_wakes_after_its_job_was_taken_over_changes_nothing(
    service: Service, receiver: Receiver, scene: bytes
) -> None:
    """Stopped in the worst moment: all is stored, and the next thing it would do is to publish."""
    service.arm("infer-made", "stop")
    job = service.submit(scene, webhook_url=receiver.url)
    zombie = service.wait_for_fault("infer-made")
    service.end_leases()
    with service.second_worker():
        done = service.wait_for(job)
        os.kill(zombie, signal.SIGCONT)
        idle = f"SELECT 1 FROM workers WHERE pid = {zombie} AND step_id IS NULL"  # noqa: S608
        wait_until(partial(service.query, idle), "it did not leave the step")
    assert service.look(job) == done
    assert service.outcomes(job) == ["started", "lost", "started", "done"]
    assert [event["state"] for event in service.events(job, "state")] == ["queued", "running", "succeeded"]
    [(manifest_key,)] = service.query(f"SELECT manifest_key FROM jobs WHERE id = '{job['id']}'")  # noqa: S608
    assert "/attempts/2/" in manifest_key
    assert len({each.webhook_id for each in receiver.wait_for(job["id"])}) == 1


def test_a_job_whose_hint_was_taken_by_a_worker_that_hung_and_died_idle_runs(service: Service) -> None:
    """The broker gives a message away before anybody is known to have it: the hint is gone, the row is not."""
    with stopped(service, "io0"):
        job = service.submit(make_recording(frames=1), name="clip.mp4")
        service.stack.kill("io0")
    service.stack.start("io0")
    assert service.wait_for(job)["state"] == "succeeded"


def test_fifty_hints_for_one_job_are_one_run(service: Service, scene: bytes) -> None:
    service.stack.stop("gpu0")
    job = service.submit(scene)
    hints = Hints(Broker(url=service.stack.environment()["MASKLINE_BROKER__URL"]))
    for _ in range(50):
        hints.wake(GPU, uuid.UUID(job["id"]))
    hints.close(seconds=30)
    service.stack.start("gpu0")
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job) == ["started", "done"]


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
    assert service.outcomes(job) == ["started", "released", "started", "done"]
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
