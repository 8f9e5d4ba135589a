"""Contenders that take turns: each is a live worker process, one of them at work at a time.

Measured one after another, contenders meet a machine in different moods; measured in turns, each repetition gives
a ratio of neighbours, and the median of the ratios is robust to a slow spell.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.turns import Job

OURS = "ours"
_REPOSITORY = Path(__file__).resolve().parent.parent
_LAST_WORDS = 25


class WorkerDied(RuntimeError):
    """A worker ended before its work did; the message carries the end of its stderr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one worker reported: `ready` once, `turns` for each repetition, the warm-up dropped."""

    ready: dict[str, Any]
    turns: list[dict[str, Any]]

    def seconds(self, *, prepass_share: float = 0.0) -> list[float]:
        """Seconds of each turn, with this share of the pre-pass (its work done before the first turn) added."""
        added = self.ready["prepass_seconds"] * prepass_share
        return [turn["seconds"] + added for turn in self.turns]

    @property
    def value(self) -> float:
        """The loss or margin of the last turn: contenders that compute the same agree on it."""
        return float(self.turns[-1]["value"])


class Worker:
    """A worker process and the pipe to it."""

    def __init__(self, job: Job) -> None:
        self._name = job.contender
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=_REPOSITORY,
            env=environment,
        )
        self.ready = self._answer()

    def run(self, number: int) -> dict[str, Any]:
        """Have step `number` run, and wait for it. Raises WorkerDied."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"run {number}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> WorkerDied:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        said = "\n".join(lines[-_LAST_WORDS:]) or "(nothing on stderr)"
        return WorkerDied(f"the worker {self._name} ended with code {code}; its last words:\n{said}")

    def close(self) -> None:
        """Hang up and wait; a worker that stays is killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


@contextlib.contextmanager
def _workers(jobs: Sequence[Job]) -> Iterator[dict[str, Worker]]:
    """Every worker, started one after another so that none disturbs another's pre-pass."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Worker] = {}
        for job in jobs:
            started[job.contender] = stack.enter_context(contextlib.closing(Worker(job)))
        yield started


def measure(jobs: Sequence[Job], repetitions: int) -> dict[str, Measured]:
    """Each contender's turns, in the order of `jobs`. The first turn of each is a warm-up. Raises WorkerDied."""
    with _workers(jobs) as workers:
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for number in range(repetitions + 1):
            for name, worker in workers.items():
                turns[name].append(worker.run(number))
        return {name: Measured(ready=worker.ready, turns=turns[name][1:]) for name, worker in workers.items()}


def ratio_to_ours(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """Median over repetitions of `name`'s seconds over ours."""
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True))


_COLUMNS = (
    "contender",
    "median s",
    "fastest–slowest s",
    "pre-pass share s",
    "pairs/s",
    "tokens/s",
    "× ours",
    "peak GB",
    "last value",
)


def print_table(title: str, measured: Mapping[str, Measured], *, pairs: int, prepass_share: float) -> None:
    """One row a contender. A turn runs `pairs` pairs; rates and ratios count the pre-pass at its share.

    Tokens are those of both rows of a pair without padding, so that tokens/s compares contenders. The last value is
    the loss or the mean margin of the last turn: contenders that compute the same agree on it.
    """
    seconds = {name: found.seconds(prepass_share=prepass_share) for name, found in measured.items()}
    print(f"\n{title}\n")
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|---" + "|---:" * (len(_COLUMNS) - 1) + "|")
    for name, found in measured.items():
        alone, whole = found.seconds(), statistics.median(seconds[name])
        tokens = statistics.median(turn["tokens"] for turn in found.turns)
        cells = (
            name,
            f"{statistics.median(alone):.3f}",
            f"{min(alone):.3f}–{max(alone):.3f}",
            f"{found.ready['prepass_seconds'] * prepass_share:.3f}",
            f"{pairs / whole:.3f}",
            f"{tokens / whole:.0f}",
            f"{ratio_to_ours(seconds, name):.2f}",
            f"{max(turn['peak_bytes'] for turn in found.turns) / 1e9:.2f}",
            f"{found.value:.7f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)
