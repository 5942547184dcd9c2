"""The benchmark of the service says what it promises to say; how long anything takes is not a test."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import structlog

from bench import service as bench
from bench._system import System, connect
from tests.acceptance.conftest import Service

ARGUMENTS = [
    "--json", "--quick", "--clients", "1", "2", "--seconds", "0.2", "--turns", "2", "--jobs", "2", "--webhooks", "5",
    "--listeners", "200", "--events", "2", "--event-pause", "0.01", "--rows", "50", "1000", "--repeats", "7",
    "--outage-seconds", "0.5",
]  # fmt: skip


def test_the_last_line_has_every_figure(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def open_system() -> Iterator[System]:
        with connect(service.stack) as system:
            yield system

    monkeypatch.setattr(bench, "open_system", open_system)
    monkeypatch.setattr(structlog, "configure", lambda **_: None)  # it would last for the tests after this one
    bench.run(ARGUMENTS)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in (
        "submit_to_claimed_p50_ms", "submit_to_claimed_p99_ms", "overhead_per_image_job_p50_ms",
        "overhead_per_image_job_p99_ms", "submissions_per_second", "submissions_ratio_to_bare", "webhooks_per_second",
        "events_per_second_200_listeners", "claim_p99_ratio_1k_to_50", "list_p99_ratio_1k_to_50",
        "redis_down_submit_max_seconds", "redis_back_all_done_seconds",
    ):  # fmt: skip
        assert figures[name] > 0, name
    assert [row["clients"] for row in figures["submissions"]] == [1, 2]
    assert figures["claim_p99_ratio_1m_to_1k"] is None, "so many rows were left out"
    assert figures["list_p99_ratio_1m_to_1k"] is None
