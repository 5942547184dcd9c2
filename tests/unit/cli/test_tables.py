"""Jobs as they are shown on a terminal."""

from typing import Any

import pytest

from cli.tables import describe_seconds, print_batch, print_batches, print_job, print_jobs

JOB: dict[str, Any] = {
    "id": "019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b11", "state": "failed", "mode": "demo", "kind": "image",
    "options": {"outputs": ["mask"]}, "metadata": {"order": "[bold]7[/bold]"}, "priority": 0, "batch_id": None,
    "attempts": 2,
    "progress": {"stage": "segmenting", "done": 0, "total": 1, "unit": "frames", "frames_per_second": None,
                 "eta_seconds": None},
    "queue_position": None, "cancel_requested_at": None, "created_at": "2026-01-31T12:00:00Z",
    "started_at": "2026-01-31T12:00:01Z", "finished_at": "2026-01-31T12:00:03Z", "expires_at": None,
    "timing": {"queued_seconds": 1.0, "inference_seconds": 0.25, "total_seconds": 3.0, "device": "a CPU", "frames": 1},
    "model": {"name": "Tiny", "revision": "sha256:1", "dtype": "float32", "input_size": [256, 192]},
    "error": {"code": "invalid_media", "detail": "The file is no image [of a known format]", "retryable": False},
}  # fmt: skip


BATCH: dict[str, Any] = {
    "id": "019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b12", "name": "street [bold]7[/bold]", "state": "running", "mode": "demo",
    "options": {}, "metadata": {}, "priority": -10,
    "jobs": {"total": 10, "queued": 3, "running": 1, "succeeded": 4, "failed": 1, "canceled": 0, "expired": 1},
    "progress": {"done": 6, "total": None, "unit": "frames", "frames_per_second": 1.5, "eta_seconds": 200.0},
    "created_at": "2026-01-31T12:00:00Z", "finished_at": None,
}  # fmt: skip


def test_a_list_of_batches_says_how_far_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_batches([BATCH])
    out = capsys.readouterr().out
    for part in (BATCH["id"], "running", "6 of 10", "3.3 min", "street [bold]7[/bold]"):
        assert part in out


def test_a_batch_is_shown_with_its_jobs_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_batch(BATCH)
    out = capsys.readouterr().out
    jobs = "10 in all · 3 queued · 1 running · 4 succeeded · 1 failed · 1 expired"
    for part in (jobs, "6 of so far unknown", "1.5 frames per second", "about 3.3 min"):
        assert part in out
    assert "canceled" not in out


def test_a_list_keeps_whole_ids_and_reasons_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_jobs([JOB])
    out = capsys.readouterr().out
    assert JOB["id"] in out
    assert "invalid_media: The file is no image [of a known format]" in out


def test_a_job_is_shown_with_its_reason_stages_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    print_job(JOB)
    out = capsys.readouterr().out
    for part in ("failed", "invalid_media", "attempts", "inference 0.25 s", "Tiny (sha256:1), float32, input 256×192"):
        assert part in out
    assert "[bold]7[/bold]" in out


def test_a_job_that_waits_has_nothing_to_show_yet_and_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = dict.fromkeys(JOB["timing"])
    print_job({**JOB, "state": "queued", "started_at": None, "finished_at": None, "timing": nothing, "model": None,
               "error": None, "queue_position": 3})  # fmt: skip
    assert "in the queue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.0312, "0.0312 s"),
        (3.04, "3.0 s"),
        (90, "90.0 s"),
        (200, "3.3 min"),
        (9000, "2.5 h"),
        (200_000, "2.3 d"),
    ],
)
def test_durations_have_the_unit_that_fits(seconds: float | None, text: str) -> None:
    assert describe_seconds(seconds) == text
