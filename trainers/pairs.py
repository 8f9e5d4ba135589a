"""Preference pairs → tokens → micro-batches.

Shapes: P pairs of a micro-batch, R = 2P rows (chosen rows first, then rejected), T tokens of the longest row.
A response is what the chat template adds after the generation prompt, its end-of-turn token included (paper §3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jinja2 import TemplateError
from pyarrow import parquet
from torch import Tensor

from trainers.data.records import Message, Pair
from trainers.errors import DataError, ModelError
from trainers.specs import DrawSpec

# Templates that print today's date (Llama 3) would tokenise differently every day.
TEMPLATE_DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Token ids of one pair; `index` is its row in the source split."""

    index: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two rows."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Two padded rows per pair. `reference_R` holds the reference model's log-prob sums (im_rm only)."""

    input_ids_RT: Tensor
    attention_mask_RT: Tensor
    response_mask_RT: Tensor
    last_R: Tensor
    weight_P: Tensor
    reference_R: Tensor | None
    indices: tuple[int, ...]


def draw_order(count: int, draw: DrawSpec) -> list[int]:
    """Row numbers in the order in which they are tried: as stored, or a seeded permutation."""
    if draw.max_pairs is None:
        return list(range(count))
    return [int(row) for row in np.random.Generator(np.random.PCG64(draw.seed)).permutation(count)]


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: Any, draw: DrawSpec) -> tuple[list[TokenPair], int]:
    """The drawn pairs as tokens, and how many were left out for their length. Raises DataError, ModelError."""
    kept: list[TokenPair] = []
    too_long = 0
    for row in draw_order(len(pairs), draw):
        tokens = _tokenize(pairs[row], row, tokenizer)
        longest_response = max(len(tokens.chosen), len(tokens.rejected))
        if len(tokens.prompt) > draw.max_prompt_tokens or longest_response > draw.max_response_tokens:
            too_long += 1
            continue
        kept.append(tokens)
        if len(kept) == draw.max_pairs:
            break
    if not kept:
        raise DataError(
            f"all {too_long} pairs are over the limit of {draw.max_prompt_tokens} prompt and "
            f"{draw.max_response_tokens} response tokens; nothing is left to use."
        )
    return kept, too_long


def _tokenize(pair: Pair, row: int, tokenizer: Any) -> TokenPair:
    prompt = _render(tokenizer, pair.prompt, add_generation_prompt=True)

    def response(text: str) -> list[int]:
        whole = _render(tokenizer, (*pair.prompt, Message("assistant", text)), add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path} does not begin a finished conversation with its own "
                "generation prompt, so a response cannot be told from its prompt; use a tokenizer whose template does."
            )
        ids: list[int] = tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"row {row}: a response has no tokens under {tokenizer.name_or_path}.")
        return ids

    # The template writes the begin-of-sequence token itself, so the tokenizer must not add another.
    prompt_ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return TokenPair(
        index=row, prompt=prompt_ids, chosen=response(pair.chosen), rejected=response(pair.rejected)
    )


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path} has no chat template. Use its instruction-tuned version, "
            "or add a chat_template to its tokenizer_config.json."
        )
    try:
        rendered: str = tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=TEMPLATE_DATE,
        )
    except TemplateError as error:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of the turns "
            f"{', '.join(message.role for message in messages)}: {error}"
        ) from error
    return rendered


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


def collate(
    pairs: Sequence[TokenPair],
    *,
    pad_id: int,
    weight: float = 1.0,
    reference: dict[int, tuple[float, float]] | None = None,
    device: str = "cpu",
) -> MicroBatch:
    """One micro-batch; `reference` maps a pair's index to its (chosen, rejected) log-prob sums."""
    rows = [pair.prompt + pair.chosen for pair in pairs] + [pair.prompt + pair.rejected for pair in pairs]
    prompts = [len(pair.prompt) for pair in pairs] * 2
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    response_mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[number, : len(row)] = torch.tensor(row)
        attention_mask[number, : len(row)] = 1
        response_mask[number, prompt : len(row)] = True
    reference_R = None
    if reference is not None:
        sums = [reference[pair.index] for pair in pairs]
        reference_R = torch.tensor([c for c, _ in sums] + [r for _, r in sums], dtype=torch.float64)
    return MicroBatch(
        input_ids_RT=input_ids.to(device),
        attention_mask_RT=attention_mask.to(device),
        response_mask_RT=response_mask.to(device),
        last_R=torch.tensor([len(row) - 1 for row in rows], device=device),
        weight_P=torch.full((len(pairs),), weight, device=device),
        reference_R=None if reference_R is None else reference_R.to(device),
        indices=tuple(pair.index for pair in pairs),
    )


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Order of an epoch's pairs; depends on nothing but these, so reward types at one seed are paired."""
    return [int(i) for i in np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)]


def steps_of_epoch(order: Sequence[int], effective_batch: int) -> list[list[int]]:
    """Effective batches of an epoch; the last may be short, none is dropped."""
    return [list(order[start : start + effective_batch]) for start in range(0, len(order), effective_batch)]


def split_step(
    step: Sequence[int], lengths: Sequence[int], *, world_size: int, accumulation: int
) -> list[list[list[int]]]:
    """[rank][forward] → positions: pairs of like length share a forward, token sums are even among ranks.

    Every rank gets `accumulation` forwards, so collectives match; a forward may be empty.
    """
    longest_first = sorted(step, key=lambda position: (-lengths[position], position))
    groups = [
        list(group) for group in np.array_split(np.array(longest_first, dtype=int), world_size * accumulation)
    ]
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    for number, group in enumerate(groups):
        lap, place = divmod(number, world_size)
        rank = place if lap % 2 == 0 else world_size - 1 - place
        ranks[rank].append([int(position) for position in group])
    return ranks
