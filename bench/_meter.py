"""Seconds, bytes and matrix rate: what the benchmarks read off a device.

Memory is counted from a mark on: of CUDA the allocated bytes, else the process's largest resident size.
"""

import ctypes
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from shared.inference.linear import linear

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")


def now(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """How much `work` takes at most beyond what is in use before it, and beyond what other work left free."""
    before = mark(device)
    work()
    return _peak(device) - before


def in_child(measure: Callable[..., Result], *arguments: object) -> Result:
    """Measure in a fresh process with as many threads as this one, where nothing else has been at work."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return pool.apply(measure, arguments)


def matrix_rate(device: torch.device, dtype: torch.dtype, *, side: int = 4096, repeats: int = 5) -> float:
    """Floating-point operations per second in a product of two square matrices: the best of `repeats`.

    On a CPU the better of torch's two kernels counts, so that a slow one flatters nobody.
    """
    left, right = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    products: tuple[Callable[[], torch.Tensor], ...] = (lambda: left @ right, lambda: linear(left, right, None))
    seconds = []
    with torch.inference_mode():
        for product in products:
            for _ in range(repeats + 1):
                started = now(device)
                product()
                seconds.append(now(device) - started)
    return float(2 * side**3 / min(seconds))


def mark(device: torch.device) -> int:
    """The bytes in use now; peaks are counted from here on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if _STATUS.exists():
        # What was freed must be given back, or the work would find it and seem to need nothing.
        ctypes.CDLL(None).malloc_trim(0)
        _STATUS.with_name("clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
