"""Memory of this process or its GPU: its maximum, and a name for its end."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from trainers.errors import OutOfMemory

_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory")


@contextlib.contextmanager
def memory_named(message: str) -> Iterator[None]:
    """Turn an allocation that fails, on a GPU or on the CPU, into OutOfMemory with that message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (named or any(sign in str(error) for sign in _NO_MEMORY)):
            raise
        raise OutOfMemory(message) from error


def forget_peak_memory() -> None:
    """Start a new maximum: a reused process would report that of an earlier training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Of the GPU where there is one, else the process's resident memory (Linux; NaN elsewhere)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return kilobytes[0] * 1024 / 1e9 if kilobytes else math.nan
