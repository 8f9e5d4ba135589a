"""Memory of this process or its GPU: the most that was used, and a named error where there is none left."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from trainers.errors import OutOfMemory

_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory")


@contextlib.contextmanager
def memory_named(message: str) -> Iterator[None]:
    """Raise OutOfMemory with `message` where an allocation fails, on a GPU or on the CPU."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (named or any(sign in str(error) for sign in _NO_MEMORY)):
            raise
        raise OutOfMemory(message) from error


def forget_peak_memory() -> None:
    """Start a new maximum, so that a reused process does not report that of an earlier training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Return the most memory that was used, of the GPU where there is one, else of the process (Linux; NaN elsewhere)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return kilobytes[0] * 1024 / 1e9 if kilobytes else math.nan
