"""Recordings through the whole system: how near it comes to the bare model, and what more workers and deaths do.

Through the real runner, PostgreSQL and S3, what is compared taking turns. `sleeping` is a model that takes the same
time for every frame and no processor, so that it measures the system around it; `demo` is the real model that ships
with Maskline, with which decoding and encoding share the processor on a CPU. Figures are medians of the turns':

- `pipeline_efficiency`: frames/s of a chunk, from its claim to its files stored and it done, over those of the bare
  model on the same frames decoded before.
- `fanout_speedup_4`: the time from a recording's chunks being queued until they are done (and until it is published)
  with one worker over that with four, each a process.
- `resume_recomputed_frames`: the frames that the model was given twice when a worker was killed in its second chunk.
- `memory_growth_ratio`: the peak memory of a process that makes a chunk of ten times the length over that of one;
  `chunk_bytes` are what of it came with the chunk.
- `codecs`: FFV1 beside PNG, a frame each, for the demo model's masks of these frames.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import func, select, update

from bench import codecs
from bench._crew import Hand, measure_chunk, open_crew, quiet
from bench._film import Film, publish, queue_chunks, read_chunks, store_film
from bench._meter import in_child
from bench._service import MODE, Service, SleepingEngine, open_service
from shared import lateness
from shared.broker import GPU
from shared.contract import Options
from shared.inference.device import choose_device, describe_device
from shared.inference.engine import Engine
from shared.inference.postprocess import proceed
from shared.inference.recipe import DEFAULT
from shared.models import Step, StepState, Worker

SIZE = (640, 360)
WORKERS = 4
GROWTH = 10
MEMORY_LATENCY = 0.005
KILL_AFTER = 1.5
"""Chunks."""
POLL_SECONDS = 0.005
CODEC_FRAMES = 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    service: Service
    size: tuple[int, int]
    repeats: int

    def store(self, frames: int, *, keyframe_every: int = 25) -> Film:
        return store_film(self.service, frames=frames, size=self.size, keyframe_every=keyframe_every)

    def measure_efficiency(self, engine: Any, film: Film, options: Options) -> Row:
        """Both ways take turns; `stages` are the seconds of the last turn's chunk, side by side in its threads."""
        images = film.decode()
        recipe = options.recipe()
        ratios, rates, chunks, bare = [], [], [], []
        for turn in range(self.repeats + 1):
            job_id = queue_chunks(self.service, film, options=options)
            with self.service.runner(GPU, engine) as runner:
                started = time.perf_counter()
                runner.run_until_idle()
                chunk_seconds = time.perf_counter() - started
            chunks = read_chunks(self.service, job_id)
            publish(self.service, job_id)
            started = time.perf_counter()
            for image in images:
                engine.segment_batch([image], MODE, recipe, checkpoint=proceed)
            bare_seconds = time.perf_counter() - started
            if turn:  # the first warms up
                ratios.append(bare_seconds / chunk_seconds)
                rates.append(film.frames / chunk_seconds)
                bare.append(film.frames / bare_seconds)
        [chunk] = chunks
        timing = (chunk.result or {})["timing"]
        return {
            "outputs": list(options.outputs),
            "frames": film.frames,
            "pipeline_fps": round(statistics.median(rates), 3),
            "bare_fps": round(statistics.median(bare), 3),
            "pipeline_efficiency": round(statistics.median(ratios), 4),
            "lowest": round(min(ratios), 4),
            "stages": {name: timing[name] for name in timing if name.endswith("_seconds")},
        }

    def measure_fanout(self, crew: Sequence[Hand], film: Film, *, chunk_frames: int, latency: float) -> Row:
        done: dict[int, list[float]] = {1: [], len(crew): []}
        published: dict[int, list[float]] = {1: [], len(crew): []}
        for turn in range(self.repeats + 1):
            for workers in done:
                job_id = queue_chunks(self.service, film, frames=chunk_frames)
                started = time.perf_counter()
                for hand in crew[:workers]:
                    hand.begin(latency)
                for hand in crew[:workers]:
                    hand.wait()
                ended = time.perf_counter()
                publish(self.service, job_id)
                if turn:
                    done[workers].append(ended - started)
                    published[workers].append(time.perf_counter() - started)
        return {
            "latency": latency,
            "chunks": -(-film.frames // chunk_frames),
            "chunk_frames": chunk_frames,
            **{f"done_seconds_{workers}": round(statistics.median(times), 3) for workers, times in done.items()},
            f"fanout_speedup_{len(crew)}": _compare(done, len(crew)),
            f"published_speedup_{len(crew)}": _compare(published, len(crew)),
        }

    def measure_resume(self, film: Film, *, chunk_frames: int, latency: float) -> Row:
        """Two workers, one of which is killed; the other makes what is left."""
        twice = []
        for _ in range(self.repeats):
            job_id = queue_chunks(self.service, film, frames=chunk_frames)
            with open_crew(self.service.settings, self.service.tenant_id, workers=2) as (doomed, other):
                doomed.begin(latency)
                other.begin(latency)
                while doomed.given.value < KILL_AFTER * chunk_frames:
                    assert doomed.process.is_alive(), "a worker died before it was killed"
                    time.sleep(POLL_SECONDS)
                doomed.kill()
                self._take_back(doomed)
                other.wait()
                while any(step.state != StepState.DONE for step in read_chunks(self.service, job_id)):
                    other.begin(latency)
                    other.wait()
                twice.append(doomed.given.value + other.given.value - film.frames)
            publish(self.service, job_id)
        return {"kills": len(twice), "chunk_frames": chunk_frames, "frames_twice": twice, "most": max(twice)}

    def _take_back(self, dead: Hand) -> None:
        """As upkeep does once the lease of the step has run out."""
        its_step = select(Worker.step_id).where(Worker.pid == dead.process.pid).scalar_subquery()
        with self.service.sessions.begin() as session:
            session.execute(update(Step).where(Step.id == its_step).values(lease_expires_at=func.now()))
        with self.service.sessions.begin() as session:
            assert lateness.reap(session, lost_attempts=3) is not None, "the worker had no step"

    def measure_memory(self, *, frames: int) -> Row:
        warm_up, films = self.store(frames), {times: self.store(times * frames) for times in (1, GROWTH)}
        peaks: dict[int, list[int]] = {times: [] for times in films}
        taken: dict[int, list[int]] = {times: [] for times in films}
        for _ in range(self.repeats):
            for times, film in films.items():
                settings, tenant_id = self.service.settings, self.service.tenant_id
                before, more = in_child(measure_chunk, settings, tenant_id, (warm_up, film), MEMORY_LATENCY)
                peaks[times].append(before + more)
                taken[times].append(more)
        return {
            "frames": frames,
            **{f"peak_bytes_{times}": statistics.median(each) for times, each in peaks.items()},
            **{f"chunk_bytes_{times}": statistics.median(each) for times, each in taken.items()},
            "memory_growth_ratio": round(statistics.median(peaks[GROWTH]) / statistics.median(peaks[1]), 4),
        }


def _compare(seconds: dict[int, list[float]], workers: int) -> float:
    return round(statistics.median(one / many for one, many in zip(seconds[1], seconds[workers], strict=True)), 3)


def measure_codecs(engine: Engine, images: Sequence[NDArray[np.uint8]], *, repeats: int) -> list[Row]:
    masks = [engine.segment(image, MODE, DEFAULT).mask for image in images]
    height, width = masks[0].shape
    ways = {
        "png": codecs.list_png_ways()["ours"],
        "ffv1": codecs.list_ffv1_ways((width, height))["ours"],
    }
    rows: list[Row] = [*codecs.take_turns(ways, masks, repeats)]
    return [*rows, {**codecs.write_file(masks, repeats), "way": "ffv1 in a file"}]


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(prog="python -m bench.recordings", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, default=300, help="of a recording in one chunk")
    parser.add_argument("--demo-frames", type=int, default=100, help="of it with the demo model")
    parser.add_argument("--chunks", type=int, default=16, help="of a recording for several workers")
    parser.add_argument("--chunk-frames", type=int, default=50, help="of each of these chunks")
    parser.add_argument(
        "--memory-frames", type=int, default=60, help=f"of the short chunk; the long has {GROWTH} times"
    )
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--latency", type=float, nargs="+", default=[0.05, 0.1], help="seconds a frame sleeps")
    parser.add_argument("--model", choices=["sleeping", MODE], help="of the pipeline; both unless given")
    parser.add_argument("--device", default="cpu", help="of the demo model")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    quiet()
    name, _ = describe_device(choose_device(options.device))
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    print(f"{name}, {threads} threads, torch {torch.__version__}, PyAV {av.__version__},", end=" ")
    print(f"Python {platform.python_version()}, load {load:.2f}", flush=True)
    with open_service() as service:
        figures = _measure(Bench(service, tuple(options.size), options.repeats), options)
    if options.json:
        size = f"{options.size[0]}x{options.size[1]}"
        print(json.dumps({"device": name, "threads": threads, "load": load, "size": size, **figures}))


MEASURES = ("pipeline", "fanout", "resume", "memory", "codecs")


def _measure(bench: Bench, options: argparse.Namespace) -> Row:
    """Every figure that was asked for; of several latencies the lowest is the one that counts."""
    figures: Row = {}
    if "pipeline" in options.only:
        figures["pipeline"] = rows = _measure_pipeline(bench, options)
        for figure, real in (("pipeline_efficiency", False), ("pipeline_efficiency_demo", True)):
            found = [row["pipeline_efficiency"] for row in rows if (row["model"] == MODE) == real]
            figures[figure] = min(found, default=None)
    film = bench.store(options.chunks * options.chunk_frames, keyframe_every=options.chunk_frames)
    if "fanout" in options.only:
        figures["fanout"] = []
        with open_crew(bench.service.settings, bench.service.tenant_id, workers=WORKERS) as crew:
            for latency in options.latency:
                row = bench.measure_fanout(crew, film, chunk_frames=options.chunk_frames, latency=latency)
                figures["fanout"].append(_tell(row))
        for figure in (f"fanout_speedup_{WORKERS}", f"published_speedup_{WORKERS}"):
            figures[figure] = min(row[figure] for row in figures["fanout"])
    if "resume" in options.only:
        row = bench.measure_resume(film, chunk_frames=options.chunk_frames, latency=min(options.latency))
        figures["resume"] = _tell(row)
        figures["resume_recomputed_frames"] = row["most"]
    if "memory" in options.only:
        figures["memory"] = _tell(bench.measure_memory(frames=options.memory_frames))
        figures["memory_growth_ratio"] = figures["memory"]["memory_growth_ratio"]
    if "codecs" in options.only:
        engine = Engine(device=options.device)
        images = bench.store(min(CODEC_FRAMES, options.frames)).decode()
        figures["codecs"] = [_tell(row) for row in measure_codecs(engine, images, repeats=options.repeats)]
    return figures


def _measure_pipeline(bench: Bench, options: argparse.Namespace) -> list[Row]:
    film, short = bench.store(options.frames), bench.store(options.demo_frames)
    masks, pictures = Options(), Options(outputs=("mask", "overlay"))
    plan: list[tuple[str, Any, Film, Options]] = [
        (f"sleeping {latency:g} s", SleepingEngine(latency=latency, batch_images=1), film, wanted)
        for latency in options.latency
        for wanted in (masks, pictures)
        if options.model != MODE
    ]
    if options.model != "sleeping":
        plan.append((MODE, Engine(device=options.device), short, masks))
    return [_tell({"model": model, **bench.measure_efficiency(*what)}) for model, *what in plan]


def _tell(row: Row) -> Row:
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    run(sys.argv[1:])
