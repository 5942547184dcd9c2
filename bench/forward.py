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

import torch

from bench._meter import in_child, now, peak_bytes
from bench._networks import build_both, forward_of
from shared.inference.device import choose_device, describe_device
from shared.inference.networks import predict
from shared.inference.postprocess import QueryLogits

MODES = ("fast", "balanced", "accurate", "sota")
SIZES = {"sota": (1024,)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.forward", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--sizes", nargs="+", type=int, help="sides of the square input; by default the mode's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    name, _ = describe_device(device)
    print(f"{name}, {options.threads} threads, torch {torch.__version__}, Python {platform.python_version()}")
    results = []
    for mode in options.modes:
        for size in options.sizes or SIZES.get(mode, (512,)):
            result = measure_time(mode, size, options.repeats, device)
            for side in ("ours", "library"):
                result[f"{side}_peak_bytes"] = in_child(measure_memory, mode, side, size, options.device)
            result["peak_memory_ratio"] = round(
                float(result["ours_peak_bytes"]) / float(result["library_peak_bytes"]), 3
            )
            results.append(result)
            print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if options.json:
        print(json.dumps({"device": name, "threads": options.threads, "forward": results}))


def measure_time(mode: str, size: int, repeats: int, device: torch.device) -> dict[str, float | str]:
    """Median seconds of both sides, their ratio, and the largest difference relative to the largest logit."""
    ours, network = build_both(mode, device)
    library = forward_of(network)
    pixels = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(1)).to(device)
    seconds: dict[str, list[float]] = {"ours": [], "library": []}
    with torch.inference_mode():
        for number in range(repeats + 1):
            for side in seconds:
                started = now(device)
                if side == "ours":
                    [output] = predict(ours, pixels, torch.float32)
                else:
                    expected = library(pixels)
                elapsed = now(device) - started
                if number:  # the first round warms up
                    seconds[side].append(elapsed)
    found = (output.masks, output.classes) if isinstance(output, QueryLogits) else (output.logits,)
    if found[0].shape[-2:] != expected[0].shape[-2:]:
        found = (torch.nn.functional.interpolate(found[0][None], size=expected[0].shape[-2:], mode="bilinear")[0],)
    errors = [
        float((own - other[0]).abs().max() / other.abs().max()) for own, other in zip(found, expected, strict=True)
    ]
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "mode": mode,
        "size": size,
        "ours_seconds": round(medians["ours"], 4),
        "library_seconds": round(medians["library"], 4),
        "forward_speedup": round(medians["library"] / medians["ours"], 3),
        "relative_error": max(errors),
    }


def measure_memory(mode: str, side: str, size: int, device_name: str) -> int:
    """The bytes a forward pass takes on top of the loaded network; for a process of its own."""
    device = choose_device(device_name)
    ours, network = build_both(mode, device)
    library = forward_of(network)
    pixels = torch.randn((1, 3, size, size)).to(device)

    def run(pixels: torch.Tensor) -> object:
        return predict(ours, pixels, torch.float32) if side == "ours" else library(pixels)

    with torch.inference_mode():
        # Once at the smallest size, for what the kernels set up for themselves.
        run(pixels[:, :, :64, :64])
        return peak_bytes(lambda: run(pixels), device)


if __name__ == "__main__":
    main(sys.argv[1:])
