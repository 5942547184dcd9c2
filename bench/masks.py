"""Masks from mask logits: ours, the straightforward formulation and transformers, in time, memory and agreement.

`python -m bench.masks [--json] [--repeats N] [--threads N] [SIZE …]`, where SIZE is a side or WIDTHxHEIGHT. The three
take turns, so what else the machine does meets them alike; times are medians. Peak memory is what a child process
needs beyond its input. The inputs are of bench.logits.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch.nn import functional
from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

from bench._meter import in_child, now, peak_bytes
from bench.logits import random_queries, structured_queries
from shared.inference.device import choose_device, describe_device
from shared.inference.postprocess import PixelLogits, QueryLogits, label
from shared.inference.resize import fit_size
from shared.inference.tiles import label_tiles

Size = tuple[int, int]

SIZES: tuple[Size, ...] = ((512, 512), (768, 768), (1024, 1024), (1280, 1280), (1920, 1080), (3840, 2160))
MAX_INPUT_SIZE = 1024
"""The model's input: a larger source is resized to about this many pixels squared, a smaller one stays as it is."""


def ours(logits: QueryLogits, size: Size) -> torch.Tensor:
    """The labels of the inference core, uint8 (height, width)."""
    return torch.from_numpy(label(logits, size=size, channel_offset=0).mask)


def plain_tiles(logits: QueryLogits, size: Size) -> torch.Tensor:
    """The inference core's tiles without any shortcut, uint8 (height, width)."""
    weights = logits.classes.softmax(dim=-1)[:, :-1].contiguous()
    return label_tiles(logits.masks, weights, size=size, confidence=False, checkpoint=lambda: None)[0]


def straightforward(logits: PixelLogits | QueryLogits, size: Size) -> torch.Tensor:
    """Everything resized to full size, then combined, in single precision: int64 (height, width)."""
    planes = (logits.logits if isinstance(logits, PixelLogits) else logits.masks).float()
    planes = functional.interpolate(planes[None], size=size[::-1], mode="bilinear", align_corners=False)[0]
    if isinstance(logits, PixelLogits):
        return planes.argmax(dim=0)
    weights = logits.classes.float().softmax(dim=-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", weights, planes.sigmoid()).argmax(dim=0)


def transformers(logits: QueryLogits, size: Size) -> torch.Tensor:
    """The library's own post-processing, which passes through 384×384: int64 (height, width)."""
    outputs = SimpleNamespace(masks_queries_logits=logits.masks[None], class_queries_logits=logits.classes[None])
    labels = Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[size[::-1]])[0]
    assert isinstance(labels, torch.Tensor)
    return labels


WAYS: dict[str, Callable[[QueryLogits, Size], torch.Tensor]] = {
    "ours": ours,
    "plain_tiles": plain_tiles,
    "straightforward": straightforward,
    "transformers": transformers,
}
INPUTS = {"structured": structured_queries, "random": random_queries}


def make_logits(kind: str, size: Size, device: torch.device) -> QueryLogits:
    """What the model would give for a source of `size`: masks at a quarter of its input's sides."""
    side = min(MAX_INPUT_SIZE, round((size[0] * size[1]) ** 0.5))
    width, height = fit_size(*size, side)
    logits = INPUTS[kind](height // 4, width // 4)
    return QueryLogits(masks=logits.masks.to(device), classes=logits.classes.to(device))


@torch.inference_mode()
def measure(
    kind: str, size: Size, *, repeats: int, memory: bool = True, device_name: str = "cpu"
) -> dict[str, float | str]:
    """One row: seconds and peak bytes of every way, the speed-ups, and how many labels are the straightforward ones."""
    device = choose_device(device_name)
    logits = make_logits(kind, size, device)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    labels = {}
    for _ in range(repeats):
        for name, way in WAYS.items():
            started = now(device)
            labels[name] = way(logits, size).cpu()
            seconds[name].append(now(device) - started)
    row: dict[str, float | str] = {"input": kind, "size": f"{size[0]}x{size[1]}"}
    for name, times in seconds.items():
        row[f"{name}_seconds"] = statistics.median(times)
    for name in ("straightforward", "transformers", "plain_tiles"):
        # Of each turn's two times, and then the median: what slows a whole turn down drops out.
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds["ours"], strict=True)]
        row[f"masks_speedup_vs_{name}"] = statistics.median(ratios)
    row["label_agreement"] = (labels["ours"] == labels["straightforward"]).double().mean().item()
    row["transformers_agreement"] = (labels["transformers"] == labels["straightforward"]).double().mean().item()
    if memory:
        for name in ("ours", "straightforward", "transformers"):
            row[f"{name}_peak_bytes"] = in_child(measure_memory, name, kind, size, device_name)
        row["peak_memory_ratio"] = float(row["ours_peak_bytes"]) / float(row["straightforward_peak_bytes"])
    return row


@torch.inference_mode()
def measure_memory(name: str, kind: str, size: Size, device_name: str) -> int:
    """How many bytes one way needs beyond its input; for a process of its own."""
    device = choose_device(device_name)
    logits = make_logits(kind, size, device)
    # Libraries take their own memory at first use, which is no matter of the image's size.
    WAYS[name](make_logits(kind, (64, 64), device), (64, 64))
    return peak_bytes(lambda: WAYS[name](logits, size), device)


def _print_table(rows: list[dict[str, float | str]]) -> None:
    print(f"{'input':<11}{'size':<11}{'ours s':>9}{'vs plain':>10}{'vs straight':>12}{'vs transf.':>11}", end="")
    print(f"{'agreement':>12}{'memory':>8}")
    for row in rows:
        print(f"{row['input']:<11}{row['size']:<11}{row['ours_seconds']:>9.3f}", end="")
        for name, width in (("plain_tiles", 10), ("straightforward", 12), ("transformers", 11)):
            print(f"{row[f'masks_speedup_vs_{name}']:>{width - 1}.2f}×", end="")
        print(f"{row['label_agreement']:>12.7f}{row.get('peak_memory_ratio', float('nan')):>8.3f}")


def parse_size(text: str) -> Size:
    """(width, height) of "1024" or "1920x1080"."""
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(prog="python -m bench.masks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=parse_size, metavar="SIZE")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's own number unless given")
    parser.add_argument("--input", choices=[*INPUTS], action="append", help="both unless given")
    parser.add_argument("--no-memory", action="store_true", help="leave out the child processes")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for kind in options.input or INPUTS:
        for size in options.sizes or SIZES:
            rows.append(measure(kind, size, repeats=options.repeats, memory=not options.no_memory))
            print(json.dumps(rows[-1]), file=sys.stderr)
    device, _ = describe_device(torch.device("cpu"))
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()), platform.platform(), sep=", ")
    _print_table(rows)
    if options.json:
        print(json.dumps({**about, "masks": rows}))


if __name__ == "__main__":
    run(sys.argv[1:])
