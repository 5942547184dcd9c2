"""Smoothed masks of moving scenes against their exact truth: flicker, mIoU and time, of our rule and of others.

`python -m bench smooth [--json] [--scenes N] [--frames N] [--fps F] [--size WIDTHxHEIGHT] [--threads N]`. The masks are
those of the real `demo` model; "noisy" are the same with a twentieth of all blocks of 8×8 pixels relabeled at random in
every frame. `flips` is how many of a million pixels change their label from one frame to the next, of those whose truth
is the same throughout the recording, so that neither things that move nor their delay count. `moving_accuracy` is of
the pixels whose truth has changed within the last four frames.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from shared.inference.demo.scenes import draw_scene
from shared.inference.device import choose_device, describe_device
from shared.inference.engine import Engine
from shared.inference.metrics import PROTOCOLS, Tally
from shared.inference.smoothing import Smoother

Mask = NDArray[np.uint8]
Row = dict[str, float | str]

FIRST_SEED = 6_000_000
MODE = "demo"
BLOCK = 8
NOISY_SHARE = 0.05
LATELY_FRAMES = 4
FULL_HD = (1080, 1920)
TIMED_FRAMES = 30


@dataclass(frozen=True)
class Recording:
    """Truth and masks, uint8 (frames, height, width) of class ids."""

    truth: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def pairs(masks: Sequence[Mask], window: int) -> Iterator[Mask]:
    """Ours: the newest label that two frames in a row gave."""
    smoother = Smoother(window)
    for mask in masks:
        smooth = smoother.smooth(mask)
        assert smooth is not None
        yield smooth


def majority(masks: Sequence[Mask], window: int) -> Iterator[Mask]:
    """The label that most of the last frames gave; of equally many, the newest."""
    recent: deque[Mask] = deque(maxlen=window)
    for mask in masks:
        recent.appendleft(mask)
        chosen, most = mask.copy(), np.zeros(mask.shape, np.uint8)
        for place, candidate in enumerate(recent):
            votes = np.ones(mask.shape, np.uint8)
            for other in list(recent)[place + 1 :]:
                votes += candidate == other
            won = votes > most
            chosen[won], most[won] = candidate[won], votes[won]
        yield chosen


WAYS: dict[str, Callable[[Sequence[Mask]], Iterator[Mask]]] = {
    "off": partial(pairs, window=1),
    **{f"smooth {window}": partial(pairs, window=window) for window in (3, 4, 5, 6, 8, 15)},
    **{f"majority {window}": partial(majority, window=window) for window in (4, 5, 7)},
}


def record(seed: int, engine: Engine, *, frames: int, fps: float, size: tuple[int, int]) -> Recording:
    """A place for a while, and what the model sees of it."""
    scenes = [draw_scene(seed, width=size[0], height=size[1], time_seconds=number / fps) for number in range(frames)]
    masks = [engine.segment(scene.image, MODE).mask for scene in scenes]
    return Recording(truth=np.stack([scene.labels for scene in scenes]), masks=np.stack(masks))


def add_noise(recording: Recording, seed: int) -> Recording:
    """The same, with blocks of one random label each."""
    random = np.random.default_rng(seed)
    frames, height, width = recording.masks.shape
    grid = (frames, -(-height // BLOCK), -(-width // BLOCK))
    struck, labels = random.random(grid) < NOISY_SHARE, random.integers(1, 10, grid, dtype=np.uint8)

    def enlarge(blocks: NDArray[np.generic]) -> NDArray[np.generic]:
        return blocks.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)[:, :height, :width]

    return Recording(truth=recording.truth, masks=np.where(enlarge(struck), enlarge(labels), recording.masks))


def measure(recordings: Sequence[Recording], smooth: Callable[[Sequence[Mask]], Iterator[Mask]]) -> Row:
    """What a way makes of all recordings together."""
    tally = Tally(PROTOCOLS[MODE])
    flips = steady = hits = moved = 0
    for recording in recordings:
        truth, masks = recording.truth, np.stack(list(smooth(list(recording.masks))))
        for frame, mask in zip(truth, masks, strict=True):
            tally.add(truth=frame, mask=mask)
        still = (truth == truth[0]).all(axis=0)
        flips += int((masks[1:] != masks[:-1])[:, still].sum())
        steady += int(still.sum()) * (len(truth) - 1)
        for number in range(1, len(truth)):
            moving = (truth[max(0, number - LATELY_FRAMES) : number] != truth[number]).any(axis=0)
            hits += int((masks[number] == truth[number])[moving].sum())
            moved += int(moving.sum())
    scores = tally.score()
    return {"miou": scores.miou, "flips": 1e6 * flips / steady, "moving_accuracy": hits / moved}


def measure_milliseconds(masks: Sequence[Mask], window: int) -> float:
    """Median milliseconds for a frame."""
    smoother, spent = Smoother(window), []
    for mask in masks:
        started = time.perf_counter()
        smoother.smooth(mask)
        spent.append(1e3 * (time.perf_counter() - started))
    return statistics.median(spent)


def time_full_hd(recording: Recording) -> Iterator[Row]:
    """The model's masks made larger, and noise in which no pixel is ever like its neighbours, the worst there is."""
    height, width = recording.masks.shape[1:]
    rows, columns = (np.arange(side) * own // side for side, own in zip(FULL_HD, (height, width), strict=True))
    larger = [recording.masks[number % len(recording.masks)][np.ix_(rows, columns)] for number in range(TIMED_FRAMES)]
    noise = list(np.random.default_rng(1).integers(1, 10, (TIMED_FRAMES, *FULL_HD), dtype=np.uint8))
    for window in (3, 5, 15):
        yield {
            "window": window,
            "masks_ms": measure_milliseconds(larger, window),
            "noise_ms": measure_milliseconds(noise, window),
        }


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(prog="python -m bench smooth", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--fps", type=float, default=25)
    parser.add_argument("--size", default="640x360", help="WIDTHxHEIGHT")
    parser.add_argument("--threads", type=int, help="torch's own number unless given")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    width, height = map(int, options.size.split("x"))
    engine = Engine(device="cpu")
    name, _ = describe_device(choose_device("cpu"))
    print(
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
    recordings = []
    for number in range(options.scenes):
        seed = FIRST_SEED + number
        recordings.append(record(seed, engine, frames=options.frames, fps=options.fps, size=(width, height)))
        print("scene", seed, file=sys.stderr, flush=True)
    inputs = {"model": recordings, "noisy": [add_noise(each, number) for number, each in enumerate(recordings)]}
    table: list[Row] = []
    for kind, made in inputs.items():
        for way, smooth in WAYS.items():
            row = {"input": kind, "way": way, **measure(made, smooth)}
            table.append(row)
            print(f"{kind:<8}{way:<12}", end="")
            print(
                f"mIoU {row['miou']:.4f}  flips {row['flips']:>9.1f}  moving {row['moving_accuracy']:.4f}", flush=True
            )
    times = list(time_full_hd(recordings[0]))
    for row in times:
        print(
            f"window {row['window']}: {row['masks_ms']:.2f} ms a frame of 1920×1080, {row['noise_ms']:.2f} ms of noise"
        )
    if options.json:
        print(json.dumps({"device": name, "smooth": table, "times": times}))


if __name__ == "__main__":
    run(sys.argv[1:])
