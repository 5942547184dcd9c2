"""The memory of a device: how much there is, how much was taken, and what to do when it has run out."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.inference.device import describe_device
from shared.inference.errors import OutOfMemory


class DeviceMemory:
    """The memory that one process may use on its device; on a CPU peaks are not measured and count as 0."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self.name, self.total_bytes = describe_device(device)

    def start_peak(self) -> int:
        """Count the peak from here on; the bytes in use now."""
        if not self._cuda:
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def read_peak(self) -> int:
        """The most bytes that were in use at once since `start_peak`."""
        return torch.cuda.max_memory_allocated(self._device) if self._cuda else 0

    def find_free(self) -> int:
        """The bytes that could still be taken; on a CPU, all there are, as only the system knows better."""
        if not self._cuda:
            return self.total_bytes
        free, _ = torch.cuda.mem_get_info(self._device)
        # What torch keeps for itself is free for torch.
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def release(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    def describe(self) -> str:
        """The device and its numbers, for the message of an error."""
        if not self._cuda:
            return f"{self.name} ({_gib(self.total_bytes)})"
        return f"{self.name} ({_gib(self.total_bytes)}, of which {_gib(self.find_free())} free)"


@contextmanager
def watch_allocators() -> Iterator[None]:
    """Turn the failure of any allocator into OutOfMemory, without what it kept alive."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _ran_out(error):
            raise
        # Its frames hold the very tensors that took the memory.
        raise OutOfMemory("The device has too little memory") from error.with_traceback(None)


def _ran_out(error: Exception) -> bool:
    # The CPU allocator raises a bare RuntimeError; its words are all there is to go by.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
