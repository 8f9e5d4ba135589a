"""Seconds from the start of a process to its first optimiser step, and what they are spent on.

    python -m benchmarks.start_up --model MODEL

Each repetition is a fresh process; the medians are printed. The first step is of four pairs.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro

_FIRST_STEP = """
import sys, time
marks = [("interpreter", time.time())]
def mark(name):
    marks.append((name, time.time()))
import torch
mark("import torch")
import transformers.modeling_utils
mark("import transformers")
import deepspeed
mark("import deepspeed")
import contextlib, json
from benchmarks.data import load
from benchmarks.turns import Job
from benchmarks.ours import OurContender
from pathlib import Path
mark("import rmsweep")
job = Job(**json.loads(sys.argv[1]))
pairs = load(Path(job.folder)).pairs
mark("read pairs")
contender = OurContender(job, pairs)
mark("load the model, make the engine")
contender.step(pairs)
mark("first step")
print("MARKS" + json.dumps(marks))
"""


def main(
    model: Path,
    data: Path = Path("../shared/data/ultrafeedback"),
    split: str = "test",
    repetitions: int = 5,
) -> None:
    """Print a table of phases."""
    from dataclasses import asdict

    from benchmarks.data import prepared
    from benchmarks.turns import EFFECTIVE_BATCH

    phases: dict[str, list[float]] = {}
    with prepared(model, data, split=split, count=EFFECTIVE_BATCH, seed=0) as inputs:
        job = json.dumps(asdict(inputs.job("ours", "train", "ex_rm")))
        for _ in range(repetitions):
            before = time.time()
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_STEP, job], capture_output=True, text=True, check=True
            )
            marks = next(line for line in done.stdout.splitlines() if line.startswith("MARKS"))
            for name, at in json.loads(marks.removeprefix("MARKS")):
                phases.setdefault(name, []).append(at - before)
                before = at
    print("| phase | median s |\n|---|---:|")
    for name, seconds in phases.items():
        print(f"| {name} | {statistics.median(seconds):.1f} |")
    print(f"| sum | {sum(map(statistics.median, phases.values())):.1f} |")


if __name__ == "__main__":
    tyro.cli(main)
