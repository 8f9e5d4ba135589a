"""The model and the pairs of a measurement: drawn from a data set, or random."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainers.data import worlds
from trainers.data.records import Pair, user_prompt
from trainers.data.sources import read_pairs
from trainers.errors import DataError
from trainers.models.tiny import build_tokenizer
from trainers.pairs.tokens import TokenPair, tokenize_pairs
from trainers.specs import DatasetSpec, DrawSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A model's folder; pairs as tokens, and the records they came from, in the same order."""

    model: str
    pairs: list[TokenPair]
    records: list[Pair]


def draw(model: str, data: Path, count: int) -> Drawn:
    """Draw `count` random test pairs that fit 512 + 512 tokens. Raises DataError where there are fewer."""
    records = read_pairs(DatasetSpec(name=data.name, source=str(data)), "test")
    found = _tokenized(model, records, count)
    if len(found.pairs) < count:
        raise DataError(f"{data}, split test: only {len(found.pairs)} pairs fit, {count} are needed.")
    return found


def random_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a model of random weights and the tiny world's tokenizer into `folder`."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(**config, pad_token_id=0)
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def random_draw(folder: Path, config: dict[str, Any], lengths: tuple[int, int, int], count: int) -> Drawn:
    """A llama of random weights, written into `folder`, and pairs of about so many random words a part."""
    random_model(folder, {"model_type": "llama", "tie_word_embeddings": True, **config})
    random = np.random.default_rng(0)

    def text(tokens: int) -> str:
        return " ".join(random.choice(worlds.VOCABULARY, random.integers(tokens // 2, 3 * tokens // 2)))

    parts = [[text(tokens) for tokens in lengths] for _ in range(count)]
    records = [
        Pair(prompt=user_prompt(prompt), chosen=chosen, rejected=rejected)
        for prompt, chosen, rejected in parts
    ]
    return _tokenized(str(folder), records, count)


def _tokenized(model: str, records: Sequence[Pair], count: int) -> Drawn:
    limits = DrawSpec(max_pairs=count, seed=0, max_prompt_tokens=512, max_response_tokens=512)
    pairs, _ = tokenize_pairs(records, AutoTokenizer.from_pretrained(model), limits)
    return Drawn(model=model, pairs=pairs, records=[records[pair.index] for pair in pairs])
