"""How much of the machine's matrix rate a training step uses, and where the rest goes.

    python -m benchmarks.utilisation --model MODEL

The matrix rate is measured in the same run, between the steps, on the model's own largest layer at the step's own
number of tokens. Model FLOPs are those that the definition needs: 6 a weight and token (2 forward, 4 backward), the
prompt once, the unembedding at response positions only, attention over what a token may see; the recomputation of
logits is not counted as useful.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.data import load, prepared
from benchmarks.ours import OurContender
from benchmarks.turns import EFFECTIVE_BATCH, Kind
from trainers.pairs import TokenPair

_MATRIX_REPEATS = 10
_LISTED = 8


def main(
    model: Path,
    data: Path = Path("../shared/data/ultrafeedback"),
    split: str = "test",
    seed: int = 0,
    kinds: tuple[Kind, ...] = ("ex_rm", "im_rm"),
    repetitions: int = 5,
) -> None:
    """Print the utilisation of each reward type, and the operations of one profiled step."""
    steps = repetitions + 2
    with prepared(model, data, split=split, count=EFFECTIVE_BATCH * steps, seed=seed) as inputs:
        pairs = load(inputs.folder).pairs
        batches = [pairs[start : start + EFFECTIVE_BATCH] for start in range(0, len(pairs), EFFECTIVE_BATCH)]
        for kind in kinds:
            _report(OurContender(inputs.job("ours", "train", kind), pairs), kind, batches)


def _report(contender: OurContender, kind: Kind, batches: Sequence[Sequence[TokenPair]]) -> None:
    contender.step(batches[0])
    shares, rates = [], []
    for batch in batches[1:-1]:
        began = time.perf_counter()
        contender.step(batch)
        seconds = time.perf_counter() - began
        rate = matrix_rate(contender.model.config, sum(pair.tokens for pair in batch))
        shares.append(step_flops(contender.model, kind, batch) / seconds / rate)
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


def step_flops(model: Any, kind: Kind, batch: Sequence[TokenPair]) -> float:
    """What the definition needs, forward and backward."""
    embeddings = model.get_input_embeddings().weight
    matrices = sum(weight.numel() for weight in model.base_model.parameters() if weight.dim() == 2)
    matrices -= embeddings.numel()
    tokens = sum(pair.tokens for pair in batch)
    responses = sum(len(pair.chosen) + len(pair.rejected) for pair in batch)
    unembedding = 0 if kind == "ex_rm" else 6 * embeddings.numel() * responses
    seen = sum(map(_seen, batch))
    # Scores and weighted values, 2 FLOPs each forward and twice that backward.
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * seen
    return 6.0 * matrices * tokens + unembedding + attention


def _seen(pair: TokenPair) -> int:
    """(query, key) pairs of tokens that may see one another."""
    prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    whole = prompt + chosen
    return whole * (whole + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2


if __name__ == "__main__":
    tyro.cli(main)
