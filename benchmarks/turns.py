"""The worker's side of an interleaved measurement: wait for a turn, time it, answer with one JSON line.

The parent writes `run 3` on stdin; the worker runs step 3 and answers, so that one worker at a time is active.
"""

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainers.pairs.tokens import TokenPair
from trainers.specs import Precision

Kind = Literal["ex_rm", "im_rm"]
Task = Literal["train", "score"]
BETA = 0.01
LEARNING_RATE = 1e-6
HEAD_SEED = 0
EFFECTIVE_BATCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker is to be: `folder` holds the drawn pairs, `contender` names who runs them.

    Step i of the task `train` is an optimiser step on the i-th `batch` pairs; of `score`, it scores all pairs.
    Every contender is on the GPU where there is one.
    """

    contender: str
    task: Task
    kind: Kind
    model: str
    folder: str
    threads: int
    precision: Precision = "fp32"
    batch: int = EFFECTIVE_BATCH
    """Pairs of an optimiser step."""


def token_count(pairs: Sequence[TokenPair]) -> int:
    """Tokens of both rows of every pair, padding not counted: the same for every contender."""
    return sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)


def peak_bytes() -> int:
    """The most memory since `forget_peak`: of the GPU where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes(peak=True)


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process, or its maximum since `forget_peak` (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def forget_peak() -> None:
    """Start a new maximum of the memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def give_back_memory() -> None:
    """Return freed memory to the system, so that the next contender has the machine to itself (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Turns:
    """Answers go to a copy of the original stdout; what libraries print goes to stderr instead."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = 0.0
        self._seconds = 0.0

    def wait(self) -> int:
        """Block until the parent grants a turn, and start the clock. Exits when the parent hangs up."""
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        number = int(line.removeprefix("run "))
        forget_peak()
        self._began = time.perf_counter()
        return number

    def stop(self) -> None:
        """Stop the clock; what comes before `answer` is not timed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self._began

    def answer(self, pairs: Sequence[TokenPair], value: float) -> None:
        """Report the turn; `value` is its loss or mean margin, alike for all contenders if they compute alike."""
        peak = peak_bytes()
        give_back_memory()
        self.tell(seconds=self._seconds, tokens=token_count(pairs), value=value, peak_bytes=peak)

    def tell(self, **facts: Any) -> None:
        """Write one line to the parent."""
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()
