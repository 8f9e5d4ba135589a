"""Preference pairs → tokens.

A response is what the chat template adds after the generation prompt, its end-of-turn token included (paper §3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from trainers.data.records import Message, Pair
from trainers.errors import DataError, ModelError
from trainers.rewards import Rendering
from trainers.specs import DrawSpec, ValidationSpec
from trainers.templates import render


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Token ids of one pair; `index` is its row in the source split."""

    index: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of the packed pair, its prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def draw_order(count: int, draw: DrawSpec) -> list[int]:
    """Row numbers in the order in which they are tried: as stored, or a seeded permutation."""
    if draw.max_pairs is None:
        return list(range(count))
    return [int(row) for row in np.random.Generator(np.random.PCG64(draw.seed)).permutation(count)]


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: Any, draw: DrawSpec, rendering: Rendering = "response"
) -> tuple[list[TokenPair], int]:
    """The drawn pairs as tokens, and how many were left out for their length. Raises DataError, ModelError.

    The limits are on prompt and response whatever the rendering, so that every reward type draws the same pairs.
    """
    kept: list[TokenPair] = []
    too_long = 0
    for row in draw_order(len(pairs), draw):
        tokens = _tokenize(pairs[row], row, tokenizer)
        longest_response = max(len(tokens.chosen), len(tokens.rejected))
        if len(tokens.prompt) > draw.max_prompt_tokens or longest_response > draw.max_response_tokens:
            too_long += 1
            continue
        kept.append(tokens if rendering == "response" else _verification(pairs[row], row, tokenizer))
        if len(kept) == draw.max_pairs:
            break
    if not kept:
        raise DataError(
            f"all {too_long} pairs are over the limit of {draw.max_prompt_tokens} prompt and "
            f"{draw.max_response_tokens} response tokens; nothing is left to use."
        )
    return kept, too_long


def held_out(
    pairs: Sequence[TokenPair], validation: ValidationSpec | None
) -> tuple[list[TokenPair], list[TokenPair]]:
    """(pairs to train on, pairs to validate with), each in the order given. Raises DataError where one is empty."""
    if validation is None:
        return list(pairs), []
    order = np.random.Generator(np.random.PCG64(validation.seed)).permutation(len(pairs))
    outside = {int(row) for row in order[: round(validation.share * len(pairs))]}
    if not 0 < len(outside) < len(pairs):
        raise DataError(
            f"a validation share of {validation.share} of {len(pairs)} pairs leaves one side empty."
        )
    return (
        [pair for row, pair in enumerate(pairs) if row not in outside],
        [pair for row, pair in enumerate(pairs) if row in outside],
    )


def _tokenize(pair: Pair, row: int, tokenizer: Any) -> TokenPair:
    prompt = render(tokenizer, pair.prompt, add_generation_prompt=True)
    # The template writes the begin-of-sequence token itself, so the tokenizer must not add another.
    prompt_ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not prompt_ids:
        raise DataError(f"row {row}: its prompt has no tokens under {tokenizer.name_or_path}.")
    chosen, rejected = (
        _response(pair.prompt, prompt, prompt_ids, text, row, tokenizer)
        for text in (pair.chosen, pair.rejected)
    )
    return TokenPair(index=row, prompt=prompt_ids, chosen=chosen, rejected=rejected)


def _response(
    messages: Sequence[Message], prompt: str, prompt_ids: list[int], response: str, row: int, tokenizer: Any
) -> list[int]:
    whole = render(tokenizer, (*messages, Message("assistant", response)), add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} does not begin a finished conversation with its own "
            "generation prompt, so a response cannot be told from its prompt; use a tokenizer whose template does."
        )
    whole_ids: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    ids = whole_ids[len(prompt_ids) :]
    if whole_ids[: len(prompt_ids)] != prompt_ids:
        # The boundary merges: the response's own tokens, which follow the prompt when it is generated.
        ids = tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"row {row}: a response has no tokens under {tokenizer.name_or_path}.")
    return ids


def _verification(pair: Pair, row: int, tokenizer: Any) -> TokenPair:
    """The question whether each response is correct, answered "Yes" for the chosen and "No" for the other (paper §3).

    What both conversations begin with is the prompt; the answers are one token each, the last.
    """
    *before, last = pair.prompt

    def asked(response: str, answer: str) -> list[int]:
        question = (
            f"Question: {last.content}\nAnswer: {response}\nVerification: Is the answer correct (Yes/No)?"
        )
        messages = (*before, Message("user", question))
        prompt = render(tokenizer, messages, add_generation_prompt=True)
        ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [*ids, _response(messages, prompt, ids, answer, row, tokenizer)[0]]

    chosen, rejected = asked(pair.chosen, "Yes"), asked(pair.rejected, "No")
    if chosen[-1] == rejected[-1]:
        raise ModelError(f'{tokenizer.name_or_path} has one token for "Yes" and "No"; ex_grm needs two.')
    # At least the answer is left on each side.
    shortest = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(shortest) if chosen[n] != rejected[n]), shortest)
    return TokenPair(index=row, prompt=chosen[:shared], chosen=chosen[shared:], rejected=rejected[shared:])


def write_tokens(tokens: Sequence[TokenPair], file: Path) -> None:
    """Write pairs as parquet: index, prompt, chosen, rejected."""
    ids = pa.list_(pa.int32())
    table = pa.table(
        {
            "index": pa.array([pair.index for pair in tokens], pa.int64()),
            "prompt": pa.array([pair.prompt for pair in tokens], ids),
            "chosen": pa.array([pair.chosen for pair in tokens], ids),
            "rejected": pa.array([pair.rejected for pair in tokens], ids),
        }
    )
    parquet.write_table(table, file)


def read_tokens(file: Path) -> list[TokenPair]:
    """The pairs that `write_tokens` wrote."""
    return [TokenPair(**row) for row in parquet.read_table(file).to_pylist()]
