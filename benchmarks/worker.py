"""One contender in a process of its own; started by `benchmarks.interleave`, with a Job in JSON as its argument."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.turns import Job, Turns, resident_bytes
from trainers.pairs.tokens import TokenPair


def steps_of(pairs: Sequence[TokenPair], job: Job) -> list[Sequence[TokenPair]]:
    """The pairs of each step: `batch` at a time to train on, all of them to score."""
    if job.task == "score":
        return [pairs]
    return [pairs[start : start + job.batch] for start in range(0, len(pairs), job.batch)]


def serve(
    turns: Turns, steps: Sequence[Sequence[TokenPair]], run: Callable[[Sequence[TokenPair]], float]
) -> None:
    """Run steps as the parent asks for them; scoring repeats its only step."""
    while True:
        pairs = steps[turns.wait() % len(steps)]
        value = run(pairs)
        turns.stop()
        turns.answer(pairs, value)


def main() -> None:
    """Become the contender, say `ready`, and serve."""
    turns = Turns()
    job = Job(**json.loads(sys.argv[1]))

    import torch

    from benchmarks.data import load

    torch.set_num_threads(job.threads)
    drawn = load(Path(job.folder))
    name = job.contender.partition(":")[0]
    if name == "trl":
        from benchmarks.trl_trainers import train_in_turns

        train_in_turns(job, drawn, turns)
        return
    if name == "naive":
        from benchmarks.naive import NaiveContender as Contender
    else:
        from benchmarks.ours import OurContender as Contender
    before = resident_bytes()
    contender = Contender(job, drawn.pairs)
    turns.tell(
        prepass_seconds=contender.prepass_seconds,
        parameter_bytes=contender.parameter_bytes,
        resident_before_model=before,
    )
    serve(turns, steps_of(drawn.pairs, job), contender.step if job.task == "train" else contender.mean_margin)


if __name__ == "__main__":
    main()
