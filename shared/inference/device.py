"""The device that inference runs on: choosing it and naming it."""

import os
import platform
import re
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is the first CUDA device, or the CPU where there is none; anything else is torch's own name for one.

    Raises ValueError for a name torch does not know and for a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device called {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """`name`, or what the device is best at: bfloat16 where the chip has it, float16 on CUDA before that (a T4).

    On a CPU float32, also where bfloat16 would be faster (bench/RESULTS.md): some pixels would change their class, and
    whoever waits for a CPU can say which of the two counts. Raises ValueError for a name that is no precision of ours.
    """
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def describe_device(device: torch.device) -> tuple[str, int]:
    """The device's name for people, and its memory in bytes (of the CPU: the machine's, or the container's limit)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return str(properties.name), int(properties.total_memory)
    return _cpu_name(), _machine_memory()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def _machine_memory() -> int:
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)
