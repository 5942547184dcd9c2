"""The benchmark of recordings says what it promises to say; how long anything takes is not a test."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench import recordings
from bench._service import Service
from shared.broker import Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Tenant
from shared.storage import Storage

ARGUMENTS = [
    "--json", "--repeats", "1", "--size", "96", "64", "--frames", "12", "--demo-frames", "2",
    "--chunks", "4", "--chunk-frames", "6", "--memory-frames", "4", "--latency", "0.02",
]  # fmt: skip


def test_the_last_line_has_every_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Settings, sessions: SessionFactory,
    storage: Storage, hints: Hints, tenant: Tenant,
) -> None:  # fmt: skip
    service = Service(settings=settings, sessions=sessions, storage=storage, hints=hints, tenant_id=tenant.id)

    @contextmanager
    def open_service() -> Iterator[Service]:
        yield service

    monkeypatch.setattr(recordings, "open_service", open_service)
    monkeypatch.setattr(recordings, "quiet", lambda: None)  # it would last for the tests after this one
    recordings.run(ARGUMENTS)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in (
        "pipeline_efficiency", "pipeline_efficiency_demo", "fanout_speedup_4", "published_speedup_4",
        "memory_growth_ratio",
    ):  # fmt: skip
        assert figures[name] > 0, name
    assert 0 < figures["resume_recomputed_frames"] <= 6, "at most the chunk that was lost"
    assert [row["model"] for row in figures["pipeline"]] == ["sleeping 0.02 s"] * 2 + ["demo"]
    assert [row["chunks"] for row in figures["fanout"]] == [4]
    assert [row["way"] for row in figures["codecs"]] == ["png", "ffv1", "ffv1 in a file"]
    assert figures["device"]
    assert figures["size"] == "96x64"
