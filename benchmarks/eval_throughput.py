"""Seconds to score random pairs: this project against padded batches of four with whole-vocabulary logits.

    python -m benchmarks.eval_throughput --model MODEL --pairs 40

IM-RM is scored against a reference. The plain recipe runs it with every batch; here it is run once for a base model
and data set, and `--models` trained models (seeds, epochs, learning rates) are scored with it.
rewardbench 0.1.4 is no contender: it pins transformers 4.51.0 (on 5.23 its import fails) and moves its inputs to
"cuda" unconditionally.
"""

from pathlib import Path

import tyro

from benchmarks.data import prepared
from benchmarks.interleave import OURS, measure, print_table
from benchmarks.turns import Kind


def main(
    model: Path,
    data: Path = Path("../shared/data/ultrafeedback"),
    split: str = "test",
    seed: int = 0,
    pairs: int = 40,
    kinds: tuple[Kind, ...] = ("ex_rm", "im_rm"),
    models: int = 1,
    repetitions: int = 5,
) -> None:
    """Print a table for each reward type."""
    with prepared(model, data, split=split, count=pairs, seed=seed) as inputs:
        for kind in kinds:
            jobs = [inputs.job(name, "score", kind) for name in (OURS, "naive")]
            print_table(
                f"{kind}, scoring {inputs.count} pairs",
                measure(jobs, repetitions),
                pairs=inputs.count,
                prepass_share=1 / models,
            )


if __name__ == "__main__":
    tyro.cli(main)
