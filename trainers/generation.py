"""Answers that a causal language model writes: left-padded batches, keys and values cached, seeded row by row.

Shapes: B rows of a batch, T tokens of the longest prompt, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.layouts import padded_attention
from trainers.memory import memory_named
from trainers.models import device, make_rows_for
from trainers.ropes import separate_rows
from trainers.specs import Precision, Trust
from trainers.templates import load_tokenizer, padding_token

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_generator(location: str, *, revision: str | None, precision: Precision, trust: Trust) -> Any:
    """A causal language model as transformers has it, on a GPU where there is one, with its tokenizer's pad id."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(location, revision, trust)
    options = {"revision": revision, "trust_remote_code": trust.trust_remote_code}
    config = AutoConfig.from_pretrained(location, **options)
    model = AutoModelForCausalLM.from_pretrained(
        location,
        dtype=_DTYPES[precision],
        attn_implementation=padded_attention(config),
        use_safetensors=None if trust.allow_pickle else True,
        weights_only=True,
        **options,
    )
    make_rows_for(model, tokenizer)
    separate_rows(model)
    model.config.pad_token_id = padding_token(tokenizer)
    return model.eval().to(device())


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch: int = 64,
) -> list[list[list[int]]]:
    """`samples` answers to each prompt, each without its `end` token; one that does not end is cut and kept whole.

    Temperature 0 takes the likeliest token. What is drawn depends on a prompt's place in `prompts`, the sample's number and
    the seed, not on `batch`. Raises OutOfMemory.
    """
    rows = [(number, sample) for number in range(len(prompts)) for sample in range(samples)]
    # Prompts of like length together: padding is computed, too.
    rows.sort(key=lambda row: len(prompts[row[0]]))
    found: dict[tuple[int, int], list[int]] = {}
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        draws_BN = np.stack([_draws(seed, number, sample, max_new_tokens) for number, sample in some])
        with torch.inference_mode(), memory_named(f"{len(some)} answers at once do not fit in memory."):
            tokens = _generate_batch(
                model, [prompts[number] for number, _ in some], draws_BN, end, temperature
            )
        found.update(zip(some, tokens, strict=True))
    return [[found[number, sample] for sample in range(samples)] for number in range(len(prompts))]


def _draws(seed: int, number: int, sample: int, count: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Uniform numbers of one row, one for each token."""
    return np.random.default_rng([seed, number, sample]).random(count)


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    draws_BN: "np.ndarray[Any, np.dtype[np.float64]]",
    end: int,
    temperature: float,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    padded = [[model.config.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    ids_BT = torch.tensor(padded, device=model.device)
    mask_BT = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    steps = []
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    for token_B in _decode(model, ids_BT, mask_BT, torch.from_numpy(draws_BN).to(model.device), temperature):
        steps.append(token_B)
        ended_B |= token_B == end
        if ended_B.all():
            break
    return [
        list(itertools.takewhile(lambda token: token != end, row))
        for row in torch.stack(steps, dim=1).tolist()
    ]


def _decode(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, draws_BN: Tensor, temperature: float
) -> Iterator[Tensor]:
    """Endless in principle, one column of tokens a step; rows that have ended go on, and are cut later."""
    cache = None
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    for column in range(draws_BN.shape[1]):
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        token_B = choose(output.logits[:, -1], draws_BN[:, column], temperature)
        yield token_B
        ids_BT = token_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
        positions_BT = positions_BT[:, -1:] + 1


def choose(logits_BV: Tensor, draw_B: Tensor, temperature: float) -> Tensor:
    """A token for each row: the likeliest at temperature 0, else that in which the draw falls of softmax(logits / T)."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    below_BV = (logits_BV.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # The last sum may miss 1 by rounding.
    below_BV[:, -1] = 1.0
    found_B1 = torch.searchsorted(below_BV, draw_B.double()[:, None].contiguous(), right=True)
    return found_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)
