"""Contenders that take turns: each is a live process, one of them at work at a time.

Measured one after another, contenders meet a machine in different moods; measured in turns, each repetition gives
a ratio of neighbours, and the median of the ratios is robust to a slow spell.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch

from benchmarks.data import Drawn
from trainers.models.memory import forget_peak_memory, peak_memory
from trainers.pairs.tokens import TokenPair
from trainers.specs import Precision

Kind = Literal["ex_rm", "im_rm"]
OURS, COMPILED = "ours", "ours, layers compiled"
EFFECTIVE_BATCH = 4
_PROCESSES = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is to be: `contender` names who runs the pairs.

    Step i of the task `train` is an optimiser step on the i-th `batch` pairs; of `score`, it scores all pairs.
    Every contender is on the GPU where there is one.
    """

    contender: str
    task: Literal["train", "score"]
    kind: Kind
    drawn: Drawn
    precision: Precision = "fp32"
    batch: int = EFFECTIVE_BATCH

    def pairs_of(self, step: int) -> Sequence[TokenPair]:
        """The pairs of a step."""
        pairs = self.drawn.pairs
        return pairs if self.task == "score" else pairs[step * self.batch : (step + 1) * self.batch]


class Turns:
    """A contender's end of the pipe: wait for a turn, time it, answer."""

    def __init__(self, pipe: Connection, job: Job) -> None:
        self._pipe, self._job = pipe, job
        forget_peak_memory()
        self._before = peak_bytes()
        self._began = self._seconds = 0.0

    def ready(self, model: Any, prepass_s: float) -> None:
        """Say that the model is built; `prepass_s` is what was done before the first turn."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self._pipe.send((prepass_s, weights, self._before))

    def wait(self) -> Sequence[TokenPair]:
        """Block until the parent grants a turn, start the clock and give the turn's pairs. Exits when it hangs up."""
        try:
            pairs = self._job.pairs_of(self._pipe.recv())
        except EOFError:
            sys.exit(0)
        forget_peak_memory()
        self._began = time.perf_counter()
        return pairs

    def stop(self) -> None:
        """Stop the clock; what comes before `answer` is not timed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self._began

    def answer(self, value: float) -> None:
        """Report the turn; `value` is its loss or mean margin, alike for all contenders if they compute alike."""
        peak = peak_bytes()
        gc.collect()
        # Freed memory goes back to the system, so that the next contender has the machine to itself (glibc).
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._pipe.send((self._seconds, value, peak))


def peak_bytes() -> float:
    """The most memory since it was last forgotten: what tensors filled of the GPU, else of this process (Linux)."""
    found = peak_memory()
    return 1e9 * found.get("allocated_gb", found["peak_mem_gb"])


def _be_a_contender(job: Job, pipe: Connection) -> None:
    # What libraries print would stand in the table.
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    from benchmarks.contenders import contend

    contend(job, Turns(pipe, job))


@contextlib.contextmanager
def _contender(job: Job) -> Iterator[Connection]:
    """Start a contender's process, and yield the pipe to it, which ends where the process died: why stands in its stderr."""
    pipe, theirs = _PROCESSES.Pipe()
    process = _PROCESSES.Process(target=_be_a_contender, args=(job, theirs))
    process.start()
    theirs.close()
    try:
        yield pipe
    finally:
        pipe.close()
        process.join(timeout=30)
        process.kill()
        process.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one contender reported: before its first turn, and of each repetition, the warm-up dropped.

    Contenders that compute the same agree on `value`, the loss or margin of the last turn.
    """

    prepass_s: float
    parameter_bytes: float
    before_model_bytes: float
    turns_s: list[float]
    value: float
    peak_bytes: float

    def seconds(self, *, prepass_share: float = 0.0) -> list[float]:
        """Return the seconds of each turn, with this share of the pre-pass added."""
        return [seconds + self.prepass_s * prepass_share for seconds in self.turns_s]


def measure(jobs: Sequence[Job], repetitions: int) -> dict[str, Measured]:
    """Return what each contender took, in the order of `jobs`; the first turn of each is a warm-up.

    They start one after another, so that none disturbs another's pre-pass. Raises EOFError where one died.
    """
    turns: dict[str, list[tuple[float, float, float]]] = {job.contender: [] for job in jobs}
    with contextlib.ExitStack() as stack:
        pipes, ready = {}, {}
        for job in jobs:
            pipes[job.contender] = stack.enter_context(_contender(job))
            ready[job.contender] = pipes[job.contender].recv()
        for step in range(repetitions + 1):
            for name, pipe in pipes.items():
                pipe.send(step)
                turns[name].append(pipe.recv())
    found = {}
    for name, (prepass_s, weights, before) in ready.items():
        seconds, values, peaks = zip(*turns[name][1:], strict=True)
        found[name] = Measured(
            prepass_s=prepass_s,
            parameter_bytes=weights,
            before_model_bytes=before,
            turns_s=list(seconds),
            value=values[-1],
            peak_bytes=max(peaks),
        )
    return found


def ratio_to_ours(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """Return the median over repetitions of `name`'s seconds over ours."""
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True))


def print_table(title: str, measured: Mapping[str, Measured], *, pairs: int, prepass_share: float) -> None:
    """Print one row a contender. A turn runs `pairs` pairs; rates and ratios count the pre-pass at its share."""
    print(f"\n{title}\n")
    print("| contender | median s | fastest–slowest s | pairs/s | × ours | peak GB | last value |")
    print("|---" + "|---:" * 6 + "|")
    seconds = {name: found.seconds(prepass_share=prepass_share) for name, found in measured.items()}
    for name, found in measured.items():
        alone = found.turns_s
        print(
            f"| {name} | {statistics.median(alone):.3f} | {min(alone):.3f}–{max(alone):.3f} "
            f"| {pairs / statistics.median(seconds[name]):.3f} | {ratio_to_ours(seconds, name):.2f} "
            f"| {found.peak_bytes / 1e9:.2f} | {found.value:.7f} |",
            flush=True,
        )
