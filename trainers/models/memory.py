"""Memory of this process or its GPU: the peak, and a clear error when it runs out."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from trainers.errors import NO_MEMORY, OutOfMemory


@contextlib.contextmanager
def memory_named(message: str, *, forward_tokens: int | None = None) -> Iterator[None]:
    """Raise OutOfMemory with these values if an allocation fails, on a GPU or the CPU."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (named or any(sign in str(error).lower() for sign in NO_MEMORY)):
            raise
        raise OutOfMemory(message, forward_tokens=forward_tokens) from error


def device_gb(device: str) -> float:
    """Return the memory of a GPU in GB; infinite for a CPU."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(chosen).total_memory / 1e9


def forget_peak_memory() -> None:
    """Reset the peak, so that a reused process does not report that of an earlier training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, float]:
    """Return the peak memory in GB: reserved and allocated by tensors on a GPU, else resident memory of the process.

    NaN if the system is not Linux.
    """
    if torch.cuda.is_available():
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        return {"peak_mem_gb": reserved / 1e9, "allocated_gb": allocated / 1e9}
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return {"peak_mem_gb": kilobytes[0] * 1024 / 1e9 if kilobytes else math.nan}
