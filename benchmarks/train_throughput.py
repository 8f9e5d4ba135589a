"""Seconds of an optimiser step of four random pairs: this project against the paper's plain recipe and TRL.

    python -m benchmarks.train_throughput --model MODEL --against naive trl trl:1x4+precomputed

Contenders are naive and trl[:PAIRSxFORWARDS][+precomputed]. Where a contender computes the reference's log-probs
beforehand, that pass is shared out over the epochs of a training, and counted.
"""

from pathlib import Path

import tyro

from benchmarks.data import prepared
from benchmarks.interleave import OURS, measure, print_table
from benchmarks.turns import EFFECTIVE_BATCH, Kind

EPOCHS = 5


def main(
    model: Path,
    data: Path = Path("../shared/data/ultrafeedback"),
    split: str = "test",
    seed: int = 0,
    against: tuple[str, ...] = ("naive", "trl:4x1", "trl:1x4+precomputed"),
    kinds: tuple[Kind, ...] = ("ex_rm", "im_rm"),
    repetitions: int = 5,
) -> None:
    """Print a table for each reward type."""
    steps = repetitions + 1
    with prepared(model, data, split=split, count=EFFECTIVE_BATCH * steps, seed=seed) as inputs:
        for kind in kinds:
            # Only IM-RM has a reference to compute beforehand.
            names = [name for name in (OURS, *against) if kind == "im_rm" or "+precomputed" not in name]
            measured = measure([inputs.job(name, "train", kind) for name in names], repetitions)
            title = f"{kind}, a step of {EFFECTIVE_BATCH} pairs"
            print_table(title, measured, pairs=EFFECTIVE_BATCH, prepass_share=1 / (EPOCHS * steps))


if __name__ == "__main__":
    tyro.cli(main)
