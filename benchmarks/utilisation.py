"""How much of the machine's matrix rate a training step uses, and where the rest goes.

    python -m benchmarks.utilisation --model MODEL

The matrix rate is measured in the same run, between the steps, on the model's own largest layer at the step's own
number of tokens. Operations are those that the definition needs, as `plan` counts them (orchestrator/plan/durations.py), but
without the recomputation of logits.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.contenders import BETA, Ours
from benchmarks.data import draw
from benchmarks.turns import EFFECTIVE_BATCH, OURS, Job, Kind
from orchestrator.plan.durations import BACKWARD, forward_flops, unembedding_flops
from orchestrator.plan.memory import PairTokens, Training
from trainers.command import model_folder
from trainers.models.architecture import Architecture, of_config
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec
from trainers.train.engine import process_group

_MATRIX_REPEATS = 10
_LISTED = 8


def main(
    model: str,
    data: Path = Path("../shared/data/ultrafeedback"),
    kinds: tuple[Kind, ...] = ("ex_rm", "im_rm"),
    repetitions: int = 5,
) -> None:
    """Print the utilisation of each reward type, and the operations of one profiled step."""
    steps = repetitions + 2
    with model_folder(model) as folder:
        drawn = draw(folder, data, EFFECTIVE_BATCH * steps)
        for kind in kinds:
            job = Job(contender=OURS, task="train", kind=kind, drawn=drawn)
            with process_group():
                _report(Ours(job), kind, [job.pairs_of(step) for step in range(steps)])


def _report(contender: Ours, kind: Kind, batches: Sequence[Sequence[TokenPair]]) -> None:
    shapes = of_config(contender.model.config.to_dict())
    assert shapes is not None
    contender.step(batches[0])
    shares, rates = [], []
    for batch in batches[1:-1]:
        began = time.perf_counter()
        contender.step(batch)
        seconds = time.perf_counter() - began
        rate = matrix_rate(contender.model.config, sum(pair.tokens for pair in batch))
        shares.append(step_flops(shapes, kind, batch) / seconds / rate)
        rates.append(rate)
    share, rate = statistics.median(shares), statistics.median(rates)
    print(f"\n{kind}: {share:.0%} of {rate / 1e9:.0f} GFLOP/s ({min(shares):.0%}–{max(shares):.0%})\n")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        contender.step(batches[-1])
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("| operation | share of the step |\n|---|---:|")
    for event in events[:_LISTED]:
        print(f"| {event.key} | {event.self_cpu_time_total / total:.1%} |")


def matrix_rate(config: Any, tokens: int) -> float:
    """FLOP/s of a [tokens, hidden] × [hidden, intermediate] product, forward and both gradients."""
    left = torch.randn(tokens, config.hidden_size)
    weight = torch.randn(config.intermediate_size, config.hidden_size)
    right = torch.randn(tokens, config.intermediate_size)
    began = time.perf_counter()
    for _ in range(_MATRIX_REPEATS):
        left @ weight.T
        right @ weight
        right.T @ left
    return 6 * _MATRIX_REPEATS * tokens * weight.numel() / (time.perf_counter() - began)


def step_flops(shapes: Architecture, kind: Kind, batch: Sequence[TokenPair]) -> float:
    """What the definition needs, forward and twice that backward."""
    lengths = [
        PairTokens(prompt=len(pair.prompt), chosen=len(pair.chosen), rejected=len(pair.rejected))
        for pair in batch
    ]
    training = Training(
        architecture=shapes,
        reward=RewardSpec(kind=kind, beta=BETA if kind == "im_rm" else None),
        optim=OptimSpec(),
        precision="fp32",
        pair=lengths[0],
    )
    forward = sum(forward_flops(training, pair) + unembedding_flops(training, pair) for pair in lengths)
    return (1 + BACKWARD) * forward


if __name__ == "__main__":
    tyro.cli(main)
