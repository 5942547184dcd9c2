"""The inference core from image to mask: ours, the library's own way and the straightforward one, in time and memory.

`python -m bench.core [--json] [--sizes SIZE …] [--modes MODE …] [--repeats N] [--threads N] [--device cuda]`

One run, the same weights, the same images, turn about. "whole": a uint8 RGB array in, the mask out, by Engine.segment
against the library's processor, network and post-processing, with the stages' own times; a square source is the input
as it is, a wide one is brought to the mode's input size, and for "library_own" to the library's. The straightforward
way shares the library's network, and then resizes everything to full size and combines it. All networks see the same
pixels, so that labels can be compared. The weights are random, and so are the masks: `classes` says how many there are
in one, with ragged borders, which costs ours more than a real image's would and the others the same. "masks": the
masks of Mask2Former alone, from made-up output (bench.logits): structured, like that of real images, and noise, the
worst case. "memory": the highest use beyond the loaded network and the image, each way in a process of its own.

The figures by their own names are of `sota`: forward and whole at 1024×1024, masks from structured output at 1024×1024,
memory of the whole for a 4K source against the straightforward way, and the lowest agreement with the straightforward
labels of all cases. `flops_utilisation` is the library's count of operations (ours does a few less) by our seconds,
and by what a large matrix product reaches in the same run.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mask2FormerConfig

from bench import _networks, _whole, forward, masks
from bench._meter import in_child, matrix_rate
from shared.inference.device import choose_device, describe_device

Size = tuple[int, int]
Case = dict[str, Any]

REFERENCE: Size = (1024, 1024)
UHD: Size = (3840, 2160)
SIZES: dict[str, tuple[Size, ...]] = dict.fromkeys(forward.MODES, ((512, 512), UHD)) | {"sota": masks.SIZES}
MASK_REPEATS = 3
"""Masks take seconds and the whole minutes, so there are more turns of them, but for a 4K source."""


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object with --json."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    about = {"device": describe_device(device)[0], "threads": options.threads, "torch": torch.__version__}
    print(_line(about), platform.platform(), sep=", ", flush=True)
    cases = []
    for mode in options.modes:
        sizes = options.sizes or SIZES[mode]
        for case in measure(mode, sizes, options.repeats, device, memory=not options.no_memory):
            print(_line(case), flush=True)
            cases.append(case)
    summary = summarise(cases, device)
    print(_line(summary))
    if options.json:
        print(json.dumps({**summary, **about, "cases": cases}))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.core", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--modes", nargs="+", default=forward.MODES, choices=forward.MODES)
    parser.add_argument("--sizes", nargs="+", type=masks.parse_size, metavar="SIZE", help="a side or WIDTHxHEIGHT")
    parser.add_argument("--repeats", type=int, default=1, help="turns of the slow cases; the quick ones take more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="leave out the child processes")
    return parser.parse_args(arguments)


def measure(mode: str, sizes: Sequence[Size], repeats: int, device: torch.device, *, memory: bool) -> Iterator[Case]:
    """Every case of a mode, as soon as it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        engine, library = _whole.open_ways(mode, Path(folder), device)
        for size in sizes:
            yield _whole.measure(mode, size, engine, library, repeats)
        # Their memory is needed for what follows.
        del engine, library
    if mode != "sota":
        return
    for kind in masks.INPUTS:
        for size in sizes:
            turns = repeats * (1 if size == UHD else MASK_REPEATS)
            row = masks.measure(kind, size, repeats=turns, memory=memory, device_name=str(device))
            yield {"stage": "masks", "mode": mode, "source": row.pop("size"), **row}
    if memory and REFERENCE in sizes:
        yield _compare_forward_memory(mode, REFERENCE, device)
    if memory and UHD in sizes:
        yield _whole.compare_memory(mode, UHD, device)


def _compare_forward_memory(mode: str, size: Size, device: torch.device) -> Case:
    """The peak bytes of the forward pass alone, in single precision."""
    case: Case = {"stage": "memory of forward", "mode": mode, "input": _whole.name(size)}
    for way in ("ours", "library"):
        case[f"{way}_peak_bytes"] = in_child(forward.measure_memory, mode, way, size[0], str(device))
    return {**case, "peak_memory_ratio_vs_library": case["ours_peak_bytes"] / case["library_peak_bytes"]}


def summarise(cases: Sequence[Case], device: torch.device) -> Case:
    """The figures by their own names; None where the case they are of was left out."""

    def pick(figure: str, **wanted: str) -> float | None:
        found = (case[figure] for case in cases if wanted.items() <= case.items())
        return next(found, None)

    whole = {"stage": "whole", "mode": "sota", "source": _whole.name(REFERENCE)}
    structured = {"stage": "masks", "input": "structured", "source": _whole.name(REFERENCE)}
    seconds = pick("ours_forward_seconds", **whole)
    return {
        "forward_speedup": pick("forward_speedup_vs_library", **whole),
        "masks_speedup_vs_transformers": pick("masks_speedup_vs_transformers", **structured),
        "masks_speedup_vs_straightforward": pick("masks_speedup_vs_straightforward", **structured),
        "total_speedup_vs_transformers": pick("total_speedup_vs_library", **whole),
        "peak_memory_ratio": pick("peak_memory_ratio_vs_straightforward", stage="memory of whole"),
        "forward_peak_memory_ratio": pick("peak_memory_ratio_vs_library", stage="memory of forward"),
        "label_agreement": min((case["label_agreement"] for case in cases if "label_agreement" in case), default=None),
        "flops_utilisation": None if seconds is None else _utilisation(seconds, device),
    }


def _utilisation(seconds: float, device: torch.device) -> float:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return count_operations(REFERENCE) / seconds / matrix_rate(device, dtype)


def count_operations(size: Size) -> int:
    """Floating-point operations of the library's own forward pass of `sota`, two for a multiplication and addition."""
    with FakeTensorMode(), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network = _networks.build_mask2former(Mask2FormerConfig(**_networks.MASK2FORMER_SWIN_LARGE)).eval()
        network(torch.empty((1, 3, size[1], size[0])))
    return int(counter.get_total_flops())


def _line(figures: Case) -> str:
    return ", ".join(
        f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
    )


if __name__ == "__main__":
    run(sys.argv[1:])
