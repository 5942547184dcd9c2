"""Small image jobs queued at once: how much sooner they are all published in rounds than one by one.

Through the real runner, PostgreSQL and S3, both ways taking turns; timed from the last commit of a submission to the
last publication. `sleeping` is a model whose forward pass takes the same time for one image as for a whole batch, as
on a device far from full, so that it measures the system around the model. `demo` is the real model that ships with
Maskline. `alone` is one job with nothing else queued, which must not pay for what it does not use.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from unittest import mock

import structlog
import torch
from PIL import Image
from sqlalchemy import func, select

from bench._service import MODE, Service, SleepingEngine, open_service
from shared.broker import GPU
from shared.inference.demo.scenes import draw_scene
from shared.inference.device import choose_device, describe_device
from shared.inference.engine import Engine
from shared.models import Job, JobState, StepKind, create_id
from shared.storage import source_key

WAYS = ("in_rounds", "one_by_one")
SIDE = (320, 240)


@dataclass(frozen=True)
class Bench:
    service: Service
    images: list[bytes]

    def measure(self, engine: Any, *, jobs: int, repeats: int) -> dict[str, Any]:
        """Median seconds of both ways, and the median of the ratios of each turn."""
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(repeats + 1):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                spent = self._run(engine, way, jobs)
                if turn:  # the first warms up
                    seconds[way].append(spent)
        ratios = [one / rounds for rounds, one in zip(seconds["in_rounds"], seconds["one_by_one"], strict=True)]
        return {
            "jobs": jobs,
            "batch_images": engine.batch_images,
            **{f"{way}_seconds": round(statistics.median(times), 4) for way, times in seconds.items()},
            "batching_speedup": round(statistics.median(ratios), 3),
            "slowest_turn_speedup": round(min(ratios), 3),
        }

    def _run(self, engine: Any, way: str, jobs: int) -> float:
        batch_images = 1 if way == "one_by_one" else engine.batch_images
        with mock.patch.object(engine, "batch_images", batch_images), self.service.runner(GPU, engine) as runner:
            submitted = [self._submit(self.images[number % len(self.images)]) for number in range(jobs)]
            started = time.perf_counter()
            runner.run_until_idle()
            spent = time.perf_counter() - started
        with self.service.sessions() as session:
            done = select(func.count()).where(Job.id.in_(submitted), Job.state == JobState.SUCCEEDED)
            assert session.scalar(done) == jobs, "a job has not succeeded"
        return spent

    def _submit(self, image: bytes) -> uuid.UUID:
        job_id = create_id()
        key = source_key(self.service.tenant_id, job_id)
        stored = self.service.storage.put(key, image, content_type="image/png")
        source = {"key": key, "etag": stored.etag, "size_bytes": stored.size_bytes, "filename": "scene.png"}
        return self.service.submit((StepKind.INFER, GPU), kind="image", source=source, job_id=job_id)


def _draw(seed: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(draw_scene(seed, width=SIDE[0], height=SIDE[1]).image).save(buffer, "PNG")
    return buffer.getvalue()


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(prog="python -m bench.batching", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="images that the sleeping model takes together")
    parser.add_argument("--demo-batch", type=int, help="of the demo model; the device's own unless given")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.02, 0.05, 0.1], help="seconds it sleeps")
    parser.add_argument("--device", default="cpu", help="of the demo model")
    parser.add_argument("--threads", type=int, help="of the demo model; torch's own number unless given")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors alone
    if options.threads:
        torch.set_num_threads(options.threads)
    name, _ = describe_device(choose_device(options.device))
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    print(f"{name}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}, load {load:.2f}")
    rows: list[dict[str, Any]] = []
    with open_service() as service:
        bench = Bench(service, [_draw(seed) for seed in range(8)])
        plan: list[tuple[str, Any, int, int]] = [
            (f"sleeping {latency:g} s", SleepingEngine(latency=latency, batch_images=options.batch), options.jobs, 1)
            for latency in options.latency
        ]
        batched = Engine(device=options.device, batch_images=options.demo_batch)
        plan += [(MODE, batched, options.jobs, 1), (f"{MODE} alone", batched, 1, 8)]
        for model, engine, jobs, times in plan:
            rows.append({"model": model, **bench.measure(engine, jobs=jobs, repeats=times * options.repeats)})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        print(json.dumps({"device": name, "threads": threads, "load": load, "batching": rows}))


if __name__ == "__main__":
    run(sys.argv[1:])
