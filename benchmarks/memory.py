"""Peak memory of an IM-RM training step, beyond weights, gradients and AdamW's two moments, by vocabulary.

    python -m benchmarks.memory
    python -m benchmarks.memory --model MODEL

Without a model, random ones of one shape are built, whose vocabularies grow: whole-vocabulary logits grow with
them, logits taken in blocks do not. (Blocks have 2²⁴ logits: responses must be long enough to fill one at the
smallest vocabulary.) Each contender runs alone, a warm-up step and a measured one. Where
the plain recipe keeps a reference model in memory, that counts. Linux only.
"""

import random
import tempfile
from pathlib import Path

import tyro

from benchmarks.data import Drawn, Inputs, prepared, save
from benchmarks.interleave import OURS, measure
from benchmarks.turns import EFFECTIVE_BATCH
from trainers.pairs.tokens import TokenPair

_TENSORS_PER_WEIGHT = 4
_STEPS = 2
_PROMPT_TOKENS = 32


def main(
    model: Path | None = None,
    data: Path = Path("../shared/data/ultrafeedback"),
    contenders: tuple[str, ...] = (OURS, "naive"),
    vocabularies: tuple[int, ...] = (8_000, 32_000, 128_000),
    response_tokens: int = 256,
) -> None:
    """Print a table: one row for each model and contender."""
    print("| model | contender | beyond the training state, GB | peak, GB | state, GB |")
    print("|---|---|---:|---:|---:|", flush=True)
    if model is not None:
        with prepared(model, data, split="test", count=EFFECTIVE_BATCH * _STEPS, seed=0) as inputs:
            _measure(model.name, inputs, contenders)
        return
    for vocabulary in vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            inputs = _random_inputs(Path(folder), vocabulary, response_tokens)
            _measure(f"random, vocabulary {vocabulary:,}", inputs, contenders)


def _measure(title: str, inputs: Inputs, contenders: tuple[str, ...]) -> None:
    for name in contenders:
        found = measure([inputs.job(name, "train", "im_rm")], repetitions=1)[name]
        state = _TENSORS_PER_WEIGHT * found.ready["parameter_bytes"]
        peak = found.turns[0]["peak_bytes"] - found.ready["resident_before_model"]
        cells = (title, name, *(f"{bytes_ / 1e9:.3f}" for bytes_ in (peak - state, peak, state)))
        print("| " + " | ".join(cells) + " |", flush=True)


def _random_inputs(folder: Path, vocabulary: int, response_tokens: int) -> Inputs:
    """A random llama with that vocabulary, and random pairs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainers.models.tiny import build_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    draws = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draws.randrange(1, vocabulary) for _ in range(count)]

    pairs = [
        TokenPair(
            index=number,
            prompt=tokens(_PROMPT_TOKENS),
            chosen=tokens(response_tokens),
            rejected=tokens(response_tokens),
        )
        for number in range(EFFECTIVE_BATCH * _STEPS)
    ]
    save(Drawn(pairs=pairs, records=[]), folder)
    return Inputs(model=folder, folder=folder, count=len(pairs))


if __name__ == "__main__":
    tyro.cli(main)
