"""This project against the paper's plain recipe and TRL: seconds of an optimiser step, seconds to score, memory.

    python -m benchmarks.throughput train --model MODEL --against naive trl:4x1 trl:1x4+precomputed
    python -m benchmarks.throughput score --model MODEL --pairs 40
    python -m benchmarks.throughput memory

Contenders (contenders.py) are naive and trl[:PAIRSxFORWARDS][+precomputed].
"""

import tempfile
from pathlib import Path

import tyro

from benchmarks.data import draw, random_draw
from benchmarks.turns import EFFECTIVE_BATCH, OURS, Job, Kind, measure, print_table
from trainers.command import model_folder

DATA = Path("../shared/data/ultrafeedback")
EPOCHS = 5
# Weights, gradients and AdamW's two moments.
_TENSORS_PER_WEIGHT = 4


def train(
    model: str,
    data: Path = DATA,
    against: tuple[str, ...] = ("naive", "trl:4x1", "trl:1x4+precomputed"),
    kinds: tuple[Kind, ...] = ("ex_rm", "im_rm"),
    repetitions: int = 5,
) -> None:
    """Seconds of an optimiser step of four random pairs.

    Where a contender computes the reference's log-probs beforehand, that pass is shared out over the epochs of a
    training, and counted.
    """
    steps = repetitions + 1
    with model_folder(model) as folder:
        drawn = draw(folder, data, EFFECTIVE_BATCH * steps)
        for kind in kinds:
            # Only IM-RM has a reference to compute beforehand.
            names = [name for name in (OURS, *against) if kind == "im_rm" or "+precomputed" not in name]
            jobs = [Job(contender=name, task="train", kind=kind, drawn=drawn) for name in names]
            title = f"{kind}, a step of {EFFECTIVE_BATCH} pairs"
            share = 1 / (EPOCHS * steps)
            print_table(title, measure(jobs, repetitions), pairs=EFFECTIVE_BATCH, prepass_share=share)


def score(
    model: str,
    data: Path = DATA,
    pairs: int = 40,
    kinds: tuple[Kind, ...] = ("ex_rm", "im_rm"),
    models: int = 1,
    repetitions: int = 5,
) -> None:
    """Seconds to score random pairs, against padded batches of four with whole-vocabulary logits.

    IM-RM is scored against a reference. The plain recipe runs it with every batch; here it is run once for a base model
    and data set, and `--models` trained models (seeds, epochs, learning rates) are scored with it.
    """
    with model_folder(model) as folder:
        drawn = draw(folder, data, pairs)
        for kind in kinds:
            jobs = [Job(contender=name, task="score", kind=kind, drawn=drawn) for name in (OURS, "naive")]
            title = f"{kind}, scoring {pairs} pairs"
            print_table(title, measure(jobs, repetitions), pairs=pairs, prepass_share=1 / models)


def memory(vocabularies: tuple[int, ...] = (8_000, 32_000, 128_000), response_tokens: int = 256) -> None:
    """Peak memory of an IM-RM training step, beyond weights, gradients and AdamW's two moments, by vocabulary.

    The models are random and of one shape but for their vocabulary: whole-vocabulary logits grow with it, logits taken in
    blocks do not. Each contender runs alone, a warm-up step and a measured one. Where the plain recipe keeps a reference
    model in memory, that counts. Linux only.
    """
    print("| vocabulary | contender | beyond the training state, GB | peak, GB | state, GB |")
    print("|---|---|---:|---:|---:|", flush=True)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    for vocabulary in vocabularies:
        for name in (OURS, "naive"):
            with tempfile.TemporaryDirectory() as folder:
                config, lengths = {"vocab_size": vocabulary, **shape}, (32, response_tokens, response_tokens)
                drawn = random_draw(Path(folder), config, lengths, 2 * EFFECTIVE_BATCH)
                job = Job(contender=name, task="train", kind="im_rm", drawn=drawn)
                found = measure([job], repetitions=1)[name]
            state = _TENSORS_PER_WEIGHT * found.parameter_bytes
            peak = found.peak_bytes - found.before_model_bytes
            sizes = " | ".join(f"{size / 1e9:.3f}" for size in (peak - state, peak, state))
            print(f"| {vocabulary:,} | {name} | {sizes} |", flush=True)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "score": score, "memory": memory})
