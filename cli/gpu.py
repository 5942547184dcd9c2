"""What `nvidia-smi` knows of the GPUs: the driver, their memory, who uses them, whether heat or power slows them."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass

QUERY_SECONDS = 20.0
SLOWDOWNS = {
    "hw_thermal_slowdown": "heat",
    "sw_thermal_slowdown": "heat",
    "hw_power_brake_slowdown": "the power supply",
}


class GpuUnreadable(Exception):
    """nvidia-smi is there and does not work; the message is its own."""


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    pid: int
    name: str
    memory: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_total: str
    memory_used: str
    temperature: str
    held_back_by: tuple[str, ...]
    processes: tuple[GpuProcess, ...]


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    driver: str
    cuda: str
    """The newest CUDA that the driver runs, as `13.0`."""
    gpus: tuple[Gpu, ...]


def read_report() -> GpuReport | None:
    """None where there is no nvidia-smi; raises GpuUnreadable where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, "-q", "-x"], capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise GpuUnreadable(f"nvidia-smi did not answer in {QUERY_SECONDS:.0f} s") from error
    except OSError as error:
        raise GpuUnreadable(f"nvidia-smi does not start: {error.strerror}") from error
    if done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines()
        raise GpuUnreadable(words[0] if words else f"nvidia-smi ended with status {done.returncode}")
    return parse_report(done.stdout)


def parse_report(text: str) -> GpuReport:
    """Read the XML of `nvidia-smi -q -x`. Its tags change from driver to driver, so only their ends are relied on."""
    try:
        log = ElementTree.fromstring(text)  # noqa: S314 - from the driver's own program
    except ElementTree.ParseError as error:
        raise GpuUnreadable(f"nvidia-smi says something unknown: {error}") from error
    return GpuReport(
        driver=log.findtext("driver_version", "unknown"),
        cuda=log.findtext("cuda_version", "unknown"),
        gpus=tuple(_read_gpu(gpu) for gpu in log.iter("gpu")),
    )


def is_too_old(*, driver_cuda: str, torch_cuda: str) -> bool:
    """Whether a driver is too old for a build of torch; within one major version of CUDA, any two go together."""
    driver, torch = (re.match(r"(\d+)", each) for each in (driver_cuda, torch_cuda))
    return bool(driver and torch and int(driver[1]) < int(torch[1]))


def _read_gpu(gpu: ElementTree.Element) -> Gpu:
    return Gpu(
        name=gpu.findtext("product_name", "unknown"),
        memory_total=gpu.findtext("fb_memory_usage/total", "unknown"),
        memory_used=gpu.findtext("fb_memory_usage/used", "unknown"),
        temperature=gpu.findtext("temperature/gpu_temp", "unknown"),
        held_back_by=tuple(sorted(set(_find_slowdowns(gpu)))),
        processes=tuple(_find_processes(gpu)),
    )


def _find_slowdowns(gpu: ElementTree.Element) -> Iterator[str]:
    for element in gpu.iter():
        for ending, cause in SLOWDOWNS.items():
            if element.tag.endswith(ending) and (element.text or "").strip() == "Active":
                yield cause


def _find_processes(gpu: ElementTree.Element) -> Iterator[GpuProcess]:
    for process in gpu.iter("process_info"):
        pid = process.findtext("pid", "")
        if pid.isdigit():
            yield GpuProcess(
                pid=int(pid),
                name=process.findtext("process_name") or "unnamed",  # empty for those of other containers
                memory=process.findtext("used_memory", "unknown"),
            )
