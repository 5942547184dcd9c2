"""The whole way of an image to its mask: ours, the library's own and the straightforward one, taking turns.

A square source is the input as it is; a wide one is brought to the mode's own input size, by every way, so that all
look at the same picture. "library_own" is the library left to itself, which may look at a larger or smaller one.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from bench import _networks, masks
from bench._library import Library
from bench._meter import in_child, now, peak_bytes
from bench.logits import smooth_noise
from shared.inference.device import choose_device
from shared.inference.engine import Engine
from shared.inference.modes import MODES
from shared.inference.resize import fit_size, to_input

Size = tuple[int, int]
Case = dict[str, Any]
Result = TypeVar("Result")

QUICK_SECONDS = 5.0
"""A case whose turn takes less has one more to warm up, and QUICK_REPEATS times as many that count."""
QUICK_REPEATS = 3
WARM_UP: Size = (64, 64)
SPEEDUPS = (
    ("forward", "library"),
    ("masks", "library"),
    ("masks", "straightforward"),
    ("total", "library"),
    ("total", "straightforward"),
    ("total", "library_own"),
)


def paint(size: Size) -> NDArray[np.uint8]:
    """A picture of waves of several lengths, uint8 RGB (height, width, 3)."""
    generator = torch.Generator().manual_seed(0)
    waves = [smooth_noise(size[1], size[0], 12, generator) + smooth_noise(size[1], size[0], 48, generator)] * 3
    planes = torch.stack([wave + smooth_noise(size[1], size[0], 4, generator) for wave in waves], dim=2)
    picture: NDArray[np.uint8] = (128 + 50 * planes).clamp(0, 255).byte().numpy()
    return picture


def open_ways(mode: str, folder: Path, device: torch.device) -> tuple[Engine, Library]:
    """Ours and the library's way, with the same random weights, which are left in `folder`; both have run once."""
    network = _networks.build_random(mode)
    _networks.write_checkpoint(mode, network, folder)
    library = Library(mode, network, device)
    del network
    engine = Engine(device=str(device), sources={mode: (str(folder), None)}, offline=True)
    image = paint(WARM_UP)
    with torch.inference_mode(), seeing(mode, WARM_UP):
        engine.segment(image, mode)
        library.label(library.forward(library.preprocess(image, WARM_UP)), WARM_UP)
    return engine, library


def input_size(mode: str, size: Size) -> Size:
    """The (width, height) at which a source is seen."""
    return fit_size(*size, size[0] if size[0] == size[1] else MODES[mode].input_size)


@contextmanager
def seeing(mode: str, size: Size) -> Iterator[None]:
    """Let the engine see a square source as it is, instead of at the mode's own input size."""
    if size[0] != size[1]:
        yield
        return
    with mock.patch.dict(MODES, {mode: replace(MODES[mode], input_size=size[0])}):
        yield


@torch.inference_mode()
def measure(mode: str, size: Size, engine: Engine, library: Library, repeats: int) -> Case:
    """The seconds of every stage of every way, the speed-ups, and how many labels are the straightforward ones."""
    image = paint(size)
    turns: list[dict[str, float]] = []
    warmed = False
    while len(turns) < repeats:
        seconds, labels = _take_turn(mode, image, engine, library)
        if not warmed and seconds["ours_total"] + seconds["library_total"] < QUICK_SECONDS:
            repeats *= QUICK_REPEATS
        else:
            turns.append(seconds)
        warmed = True
    case: Case = {"stage": "whole", "mode": mode, "source": name(size), "input": name(input_size(mode, size))}
    if size[0] != size[1]:
        case["library_own_input"] = name(library.own_input_size(size))
    case["repeats"] = len(turns)
    for key in turns[0]:
        case[f"{key}_seconds"] = statistics.median(turn[key] for turn in turns)
    for stage, way in SPEEDUPS:
        if f"{way}_{stage}" not in turns[0]:
            continue
        # Of each turn's two times, and then the median: what slows a whole turn down drops out.
        ratios = [turn[f"{way}_{stage}"] / turn[f"ours_{stage}"] for turn in turns]
        case[f"{stage}_speedup_vs_{way}"] = statistics.median(ratios)
    return {**case, **labels}


def _take_turn(
    mode: str, image: NDArray[np.uint8], engine: Engine, library: Library
) -> tuple[dict[str, float], dict[str, float]]:
    """The seconds of every stage, and what there is to say of the labels."""
    chosen, device = MODES[mode], engine.device
    size = (image.shape[1], image.shape[0])
    with seeing(mode, size):
        total, ours = _timed(device, lambda: engine.segment(image, mode))
    seconds = {
        "ours_preprocess": ours.preprocess_seconds,
        "ours_forward": ours.inference_seconds,
        "ours_masks": ours.postprocess_seconds,
        "ours_total": total,
    }
    inputs = input_size(mode, size)
    seconds["library_preprocess"], pixels = _timed(device, lambda: library.preprocess(image, inputs))
    # The library rounds what it resized to 8 bits. With our pixels instead, labels differ by what comes after.
    same = to_input(image, size=inputs, mean=chosen.mean, std=chosen.std, device=device)
    assert pixels.shape == same.shape
    seconds["library_forward"], output = _timed(device, lambda: library.forward(same))
    seconds["library_masks"], _ = _timed(device, lambda: library.label(output, size))
    logits = library.logits(same, output)
    seconds["straightforward_masks"], labels = _timed(device, lambda: masks.straightforward(logits, size).cpu())
    for way in ("library", "straightforward"):
        shared = seconds["library_preprocess"] + seconds["library_forward"]
        seconds[f"{way}_total"] = shared + seconds[f"{way}_masks"]
    if size[0] != size[1]:
        own = library.own_input_size(size)
        seconds["library_own_total"], _ = _timed(
            device, lambda: library.label(library.forward(library.preprocess(image, own)), size)
        )
    same_labels = torch.from_numpy(ours.mask) - chosen.channel_offset == labels
    return seconds, {"classes": len(np.unique(ours.mask)), "label_agreement": same_labels.double().mean().item()}


def _timed(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    started = now(device)
    result = work()
    return now(device) - started, result


def compare_memory(mode: str, size: Size, device: torch.device) -> Case:
    """The peak bytes of every way beyond its network and the image."""
    case: Case = {"stage": "memory of whole", "mode": mode, "source": name(size)}
    case["input"] = name(input_size(mode, size))
    for way in ("ours", "library", "straightforward"):
        case[f"{way}_peak_bytes"] = in_child(measure_memory, way, mode, size, str(device))
    for way in ("library", "straightforward"):
        case[f"peak_memory_ratio_vs_{way}"] = case["ours_peak_bytes"] / case[f"{way}_peak_bytes"]
    return case


@torch.inference_mode()
def measure_memory(way: str, mode: str, size: Size, device_name: str) -> int:
    """The peak bytes of one way from an image to its mask; for a process of its own."""
    device = choose_device(device_name)
    image = paint(size)
    with tempfile.TemporaryDirectory() as folder:
        engine, library = open_ways(mode, Path(folder), device)

    def run() -> object:
        if way == "ours":
            with seeing(mode, size):
                return engine.segment(image, mode)
        pixels = library.preprocess(image, input_size(mode, size))
        output = library.forward(pixels)
        if way == "library":
            return library.label(output, size)
        return masks.straightforward(library.logits(pixels, output), size)

    return peak_bytes(run, device)


def name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
