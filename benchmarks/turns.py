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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


class ContenderDied(RuntimeError):
    """A contender's process ended before its work did; why stands above, in what it wrote to stderr."""


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
    threads: int = field(
        default_factory=lambda: int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    )

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
        self._step, self._began, self._seconds = 0, 0.0, 0.0

    def ready(self, model: Any, prepass_s: float) -> None:
        """Say that the model is built; `prepass_s` is what was done before the first turn."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self._pipe.send(
            {"prepass_s": prepass_s, "parameter_bytes": weights, "before_model_bytes": self._before}
        )

    def wait(self) -> Sequence[TokenPair]:
        """Block until the parent grants a turn, start the clock and give the turn's pairs. Exits when it hangs up."""
        step = self._pipe.recv()
        if step is None:
            sys.exit(0)
        self._step = step
        forget_peak_memory()
        self._began = time.perf_counter()
        return self._job.pairs_of(step)

    def stop(self) -> None:
        """Stop the clock; what comes before `answer` is not timed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self._began

    def answer(self, value: float) -> None:
        """Report the turn; `value` is its loss or mean margin, alike for all contenders if they compute alike."""
        peak, pairs = peak_bytes(), self._job.pairs_of(self._step)
        gc.collect()
        # Freed memory goes back to the system, so that the next contender has the machine to itself (glibc).
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        # Of both rows of every pair, padding not counted: the same for every contender.
        tokens = sum(pair.tokens + len(pair.prompt) for pair in pairs)
        self._pipe.send({"seconds": self._seconds, "tokens": tokens, "value": value, "peak_bytes": peak})


def peak_bytes() -> float:
    """The most memory since it was last forgotten: what tensors filled of the GPU, else of this process (Linux)."""
    found = peak_memory()
    return 1e9 * found.get("allocated_gb", found["peak_mem_gb"])


def _be_a_contender(job: Job, pipe: Connection) -> None:
    # What libraries print would stand in the table.
    os.dup2(2, 1)
    torch.set_num_threads(job.threads)
    from benchmarks.contenders import contend

    contend(job, Turns(pipe, job))


class _Contender:
    """A contender's process and the pipe to it."""

    def __init__(self, job: Job) -> None:
        self._name = job.contender
        self._pipe, theirs = _PROCESSES.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(job.threads)
        self._process = _PROCESSES.Process(target=_be_a_contender, args=(job, theirs))
        self._process.start()
        theirs.close()
        self.ready = self._answer()

    def run(self, step: int) -> dict[str, Any]:
        """Have a step run, and wait for it. Raises ContenderDied."""
        with contextlib.suppress(OSError):
            self._pipe.send(step)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ContenderDied(f"{self._name} ended with code {self._process.exitcode}") from None
        return answer

    def close(self) -> None:
        """Hang up and wait; one that stays is killed."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=30)
        self._process.kill()
        self._process.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one contender reported: `ready` once, `turns` for each repetition, the warm-up dropped."""

    ready: dict[str, Any]
    turns: list[dict[str, Any]]

    def seconds(self, *, prepass_share: float = 0.0) -> list[float]:
        """Seconds of each turn, with this share of the pre-pass added."""
        return [turn["seconds"] + self.ready["prepass_s"] * prepass_share for turn in self.turns]

    @property
    def value(self) -> float:
        """The loss or margin of the last turn: contenders that compute the same agree on it."""
        return float(self.turns[-1]["value"])

    @property
    def peak_bytes(self) -> float:
        return max(turn["peak_bytes"] for turn in self.turns)


def measure(jobs: Sequence[Job], repetitions: int) -> dict[str, Measured]:
    """Each contender's turns, in the order of `jobs`. The first turn of each is a warm-up. Raises ContenderDied.

    They start one after another, so that none disturbs another's pre-pass.
    """
    with contextlib.ExitStack() as stack:
        started = {job.contender: stack.enter_context(contextlib.closing(_Contender(job))) for job in jobs}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in started}
        for step in range(repetitions + 1):
            for name, contender in started.items():
                turns[name].append(contender.run(step))
        return {name: Measured(ready=one.ready, turns=turns[name][1:]) for name, one in started.items()}


def ratio_to_ours(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """Median over repetitions of `name`'s seconds over ours."""
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True))


def print_table(title: str, measured: Mapping[str, Measured], *, pairs: int, prepass_share: float) -> None:
    """One row a contender. A turn runs `pairs` pairs; rates and ratios count the pre-pass at its share.

    Tokens are those of both rows of a pair without padding, so that tokens/s compares contenders.
    """
    print(f"\n{title}\n")
    print(
        "| contender | median s | fastest–slowest s | pre-pass share s | pairs/s | tokens/s | × ours | peak GB | last value |"
    )
    print("|---" + "|---:" * 8 + "|")
    seconds = {name: found.seconds(prepass_share=prepass_share) for name, found in measured.items()}
    for name, found in measured.items():
        alone, whole = found.seconds(), statistics.median(seconds[name])
        tokens = statistics.median(turn["tokens"] for turn in found.turns)
        print(
            f"| {name} | {statistics.median(alone):.3f} | {min(alone):.3f}–{max(alone):.3f} "
            f"| {found.ready['prepass_s'] * prepass_share:.3f} | {pairs / whole:.3f} | {tokens / whole:.0f} "
            f"| {ratio_to_ours(seconds, name):.2f} | {found.peak_bytes / 1e9:.2f} | {found.value:.7f} |",
            flush=True,
        )
