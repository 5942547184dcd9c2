"""What is told of a job, computed from its row alone, and how news of it are signed."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook, WebhookVerificationError

from shared import webhooks
from shared.contract import SMOOTH_WINDOW, Options, describe_job
from shared.inference.recipe import Recipe
from shared.models import Job, JobState, create_id

MOMENT = datetime(2026, 1, 31, 12, tzinfo=UTC)


def row(**values: Any) -> Job:
    """A job's row as the database would give it."""
    chosen: dict[str, Any] = {
        "id": create_id(), "tenant_id": create_id(), "state": JobState.QUEUED, "kind": "image", "mode": "demo",
        "source": {"filename": "a.png"}, "options": {}, "details": {}, "priority": 0, "attempts": 0, "frames_done": 0,
        "created_at": MOMENT, "queued_at": MOMENT,
    }  # fmt: skip
    return Job(**(chosen | values))


def after(seconds: float) -> datetime:
    return MOMENT + timedelta(seconds=seconds)


def test_waiting_and_total_time_are_counted_from_the_moment_of_queueing() -> None:
    job = describe_job(row(queued_at=after(10), started_at=after(12), finished_at=after(15.5)))
    assert (job.timing.queued_seconds, job.timing.total_seconds) == (2, 5.5)


def test_what_has_not_happened_has_no_time() -> None:
    timing = describe_job(row()).timing
    assert (timing.queued_seconds, timing.total_seconds, timing.frames) == (None, None, None)


def test_progress_tells_the_speed_and_the_time_that_is_left() -> None:
    running = row(
        state=JobState.RUNNING, started_at=MOMENT, progress_at=after(10), frames_done=50, frames_total=200,
    )  # fmt: skip
    progress = describe_job(running).progress
    assert (progress.frames_per_second, progress.eta_seconds) == (5, 30)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"started_at": MOMENT, "progress_at": MOMENT, "frames_done": 1, "frames_total": 2},
        {"started_at": MOMENT, "progress_at": after(1), "frames_done": 0, "frames_total": 2},
    ],
)
def test_without_progress_there_is_no_speed(values: dict[str, Any]) -> None:
    progress = describe_job(row(**values)).progress
    assert (progress.frames_per_second, progress.eta_seconds) == (None, None)


def test_nothing_is_left_of_a_finished_job() -> None:
    done = row(started_at=MOMENT, finished_at=after(2), frames_done=1, frames_total=1)
    assert describe_job(done).progress.eta_seconds is None


def test_options_left_out_have_their_default() -> None:
    assert Options() == Options(input_size=None, outputs=("mask",))
    assert Options().recipe() == Recipe()


@pytest.mark.parametrize(
    "values",
    [
        {"size": 1},
        {"input_size": True},
        {"input_size": 31},
        {"outputs": []},
        {"resize": "fill"},
        {"tile_overlap": 0.6},
        {"unlabeled_below": 1.1},
        {"resize": "published", "tiles": True},
        {"resize": "published", "input_size": 512},
        {"smooth": 2},
        {"smooth": 16},
        {"smooth": 1},
        {"smooth": 5.0},
        {"smooth": "true"},
        {"smooth": None},
    ],
)
def test_options_that_do_not_exist_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options.model_validate(values)


@pytest.mark.parametrize(("given", "kept"), [(False, False), (True, SMOOTH_WINDOW), (3, 3), (15, 15)])
def test_a_job_keeps_the_window_that_it_is_smoothed_with(given: bool | int, kept: bool | int) -> None:
    options = Options.model_validate({"smooth": given}).model_dump(mode="json")
    assert options["smooth"] is kept
    again = Options.model_validate(options)
    assert (again.smooth, again.smooth_window) == (kept, kept or 1)


# --- signatures ----------------------------------------------------------------------------------------------------


def test_a_secret_is_256_random_bits_in_the_form_of_the_standard() -> None:
    first, second = webhooks.create_secret(), webhooks.create_secret()
    assert first.startswith("whsec_")
    assert first != second
    assert len(first.removeprefix("whsec_")) == 44


@pytest.mark.parametrize("hours", [-11, 0, 2, 14])
def test_a_signature_is_of_the_moment_whatever_the_clocks_zone(hours: int) -> None:
    secret = webhooks.create_secret()
    body, at = '{"a":1}', datetime.now(timezone(timedelta(hours=hours)))
    headers = webhooks.sign(create_id(), body, secrets=[secret], at=at)
    assert Webhook(secret).verify(body, headers) == {"a": 1}


def test_a_message_signed_with_several_secrets_is_verified_by_any_of_them() -> None:
    secrets = [webhooks.create_secret() for _ in range(3)]
    headers = webhooks.sign(create_id(), '{"a":1}', secrets=secrets, at=datetime.now(UTC))
    assert [Webhook(secret).verify('{"a":1}', headers) for secret in secrets] == [{"a": 1}] * 3
    with pytest.raises(WebhookVerificationError):
        Webhook(webhooks.create_secret()).verify('{"a":1}', headers)


def test_the_id_of_a_message_holds_nothing_that_parts_a_signature() -> None:
    assert webhooks.message_id(create_id()).replace("_", "").isalnum()
