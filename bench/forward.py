"""The forward pass of every mode against its library's own: time, peak memory, and whether the answers agree.

Both run alternately in one process over the same random weights, so that a busy machine slows both alike; memory is
the highest resident size above that of the loaded network (CUDA: allocated bytes), each measured in a process of its
own. DeepLabV3 of the library includes its upsampling to the input, which ours leaves to the mask.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench._meter import in_child, now, peak_bytes
from bench._networks import build_both, build_random, forward_of
from shared.inference import networks
from shared.inference.device import choose_device, describe_device

MODES = ("fast", "balanced", "accurate", "sota")
SIZES = {"sota": (1024,)}
ALSO = ("bfloat16", "compiled")

Run = Callable[[torch.Tensor], networks.Output]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.forward", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--sizes", nargs="+", type=int, help="sides of the square input; by default the mode's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--also", nargs="+", default=(), choices=ALSO, help="further ways of ours")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    name, _ = describe_device(device)
    print(f"{name}, {options.threads} threads, torch {torch.__version__}, Python {platform.python_version()}")
    results = []
    for mode in options.modes:
        for size in options.sizes or SIZES.get(mode, (512,)):
            result = measure_time(mode, size, options.repeats, device, also=options.also)
            for way in ("ours", "library"):
                result[f"{way}_peak_bytes"] = in_child(measure_memory, mode, way, size, options.device)
            result["peak_memory_ratio"] = round(
                float(result["ours_peak_bytes"]) / float(result["library_peak_bytes"]), 3
            )
            results.append(result)
            print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if options.json:
        print(json.dumps({"device": name, "threads": options.threads, "forward": results}))


def measure_time(
    mode: str, size: int, repeats: int, device: torch.device, *, also: Sequence[str]
) -> dict[str, float | str]:
    """Median seconds of every way, how much sooner ours are done, and how far off: of the library's largest output."""
    ways = open_ways(mode, device, also=also)
    pixels = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(1)).to(device)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    outputs: dict[str, networks.Output] = {}
    with torch.inference_mode():
        for number in range(repeats + 1):
            for way, run in ways.items():
                started = now(device)
                outputs[way] = run(pixels)
                elapsed = now(device) - started
                if number:  # the first round warms up
                    seconds[way].append(elapsed)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    result: dict[str, float | str] = {"mode": mode, "size": size}
    result |= {f"{way}_seconds": round(median, 4) for way, median in medians.items()}
    for way in (way for way in ways if way != "library"):
        result[f"{way}_speedup"] = round(medians["library"] / medians[way], 3)
        result[f"{way}_relative_error"] = _compare(outputs[way], outputs["library"])
    return result


def open_ways(mode: str, device: torch.device, *, also: Sequence[str] = ()) -> dict[str, Run]:
    """The library's way, ours in single precision, and of ours those in `also`, all over the same weights."""
    network, library = build_both(mode, device)
    ways: dict[str, Run] = {"ours": partial(networks.run, network, dtype=torch.float32), "library": forward_of(library)}
    if "bfloat16" in also:
        half = networks.prepare(build_random(mode), torch.bfloat16).to(device)
        ways["bfloat16"] = partial(networks.run, half, dtype=torch.bfloat16)
    if "compiled" in also:
        ways["compiled"] = networks.compile_run(network, torch.float32, device)
    return ways


def _compare(found: networks.Output, expected: networks.Output) -> float:
    """The largest difference of an output; a DeepLabV3's is brought to the input's size, as the library's is."""
    if found[0].shape[-2:] != expected[0].shape[-2:]:
        found = (torch.nn.functional.interpolate(found[0].float(), size=expected[0].shape[-2:], mode="bilinear"),)
    return max(float((own - other).abs().max() / other.abs().max()) for own, other in zip(found, expected, strict=True))


def measure_memory(mode: str, way: str, size: int, device_name: str) -> int:
    """The bytes a forward pass takes on top of the loaded network; for a process of its own."""
    device = choose_device(device_name)
    run = open_ways(mode, device)[way]
    pixels = torch.randn((1, 3, size, size)).to(device)
    with torch.inference_mode():
        # Once at the smallest size, for what the kernels set up for themselves.
        run(pixels[:, :, :64, :64])
        return peak_bytes(lambda: run(pixels), device)


if __name__ == "__main__":
    main(sys.argv[1:])
