"""Micro-batches: pairs laid end to end with no padding, or as two padded rows each for models that need them.

Packed, a pair is `[prompt | chosen | rejected]` in one row: the prompt is computed once, the responses are blind
to each other (attention.py), and the positions of the rejected response restart after the prompt.

Shapes: P pairs, R = 2P responses (chosen ones first, then rejected), T tokens of a row, B rows, M response tokens.
Positions named `_R` and `_M` index the B × T tokens of the batch laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trainers.pairs import TokenPair

Layout = Literal["packed", "rows"]
References = dict[int, tuple[float, float]]

PROMPT, CHOSEN, REJECTED = 0, 1, 2


class Span(NamedTuple):
    """Where a packed pair starts, and how many tokens its three parts have."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def rejected_start(self) -> int:
        """Where the rejected response starts."""
        return self.start + self.prompt + self.chosen

    @property
    def end(self) -> int:
        """One past its last token."""
        return self.rejected_start + self.rejected


@dataclass(frozen=True, slots=True)
class PairLayout:
    """Which tokens of a packed row belong together; travels through the model's forward as a keyword argument.

    `masks` keeps what attention derives from the spans, so that every layer of a forward shares it.
    """

    spans: tuple[Span, ...]
    masks: dict[object, object] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What a forward needs. `reference_R` holds the reference model's log-prob sums, where a reward has one.

    `same_P` says whose two responses are the same tokens.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor | None
    attention_mask_BT: Tensor | None
    layout: PairLayout | None
    last_R: Tensor
    response_M: Tensor
    predictor_M: Tensor
    target_M: Tensor
    owner_M: Tensor
    weight_P: Tensor
    same_P: Tensor
    reference_R: Tensor | None
    indices: tuple[int, ...]
    tokens: int


class _Response(NamedTuple):
    """Where a response stands in the batch: the position before its first token, its first position, its tokens."""

    before: int
    start: int
    ids: list[int]


def collate(
    pairs: Sequence[TokenPair],
    *,
    layout: Layout = "packed",
    shared_tokens: int | None = None,
    pad_id: int = 0,
    weight: float = 1.0,
    reference: References | None = None,
    device: str = "cpu",
) -> MicroBatch:
    """One micro-batch; `reference` maps a pair's index to its (chosen, rejected) log-prob sums.

    Packed, a prompt stands once before both responses, unless one of them ends after `shared_tokens`.
    """
    inputs, responses = _packed(pairs, shared_tokens) if layout == "packed" else _rows(pairs, pad_id)
    counts = torch.tensor([len(response.ids) for response in responses])
    starts_M = torch.repeat_interleave(torch.tensor([response.start for response in responses]), counts)
    within_M = torch.cat([torch.arange(len(response.ids)) for response in responses])
    before_M = torch.repeat_interleave(torch.tensor([response.before for response in responses]), counts)
    response_M = starts_M + within_M
    fields = {
        "last_R": torch.tensor([response.start + len(response.ids) - 1 for response in responses]),
        "response_M": response_M,
        "predictor_M": torch.where(within_M == 0, before_M, response_M - 1),
        "target_M": torch.tensor([token for response in responses for token in response.ids]),
        "owner_M": torch.repeat_interleave(torch.arange(len(responses)), counts),
        "weight_P": torch.full((len(pairs),), weight),
        "same_P": torch.tensor([pair.chosen == pair.rejected for pair in pairs]),
        "reference_R": None if reference is None else _reference_sums(pairs, reference),
    }
    moved: dict[str, Any] = {
        name: None if value is None else value.to(device)
        for name, value in {**inputs.tensors, **fields}.items()
    }
    return MicroBatch(
        **moved,
        layout=inputs.layout,
        indices=tuple(pair.index for pair in pairs),
        tokens=inputs.tokens,
    )


class _Inputs(NamedTuple):
    tensors: dict[str, Tensor | None]
    layout: PairLayout | None
    tokens: int


def _packed(pairs: Sequence[TokenPair], shared_tokens: int | None) -> tuple[_Inputs, list[_Response]]:
    ids: list[int] = []
    positions: list[Tensor] = []
    spans: list[Span] = []

    def lay(prompt: list[int], chosen: list[int], rejected: list[int]) -> Span:
        span = Span(len(ids), len(prompt), len(chosen), len(rejected))
        ids.extend([*prompt, *chosen, *rejected])
        positions.append(torch.arange(span.prompt + span.chosen))
        positions.append(torch.arange(span.prompt, span.prompt + span.rejected))
        spans.append(span)
        return span

    chosen: list[_Response] = []
    rejected: list[_Response] = []
    for pair in pairs:
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if shared_tokens is None or longest <= shared_tokens:
            first = second = lay(pair.prompt, pair.chosen, pair.rejected)
        else:
            first, second = lay(pair.prompt, pair.chosen, []), lay(pair.prompt, [], pair.rejected)
        before = first.start + first.prompt - 1
        chosen.append(_Response(before, before + 1, pair.chosen))
        rejected.append(_Response(second.start + second.prompt - 1, second.rejected_start, pair.rejected))
    tensors: dict[str, Tensor | None] = {
        "input_ids_BT": torch.tensor([ids]),
        "position_ids_BT": torch.cat(positions)[None],
        "attention_mask_BT": None,
    }
    return _Inputs(tensors, PairLayout(tuple(spans)), len(ids)), chosen + rejected


def _rows(pairs: Sequence[TokenPair], pad_id: int) -> tuple[_Inputs, list[_Response]]:
    halves = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(response) for prompt, response in halves)
    input_ids = torch.full((len(halves), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(halves), width), dtype=torch.long)
    responses = []
    for number, (prompt, response) in enumerate(halves):
        row = prompt + response
        input_ids[number, : len(row)] = torch.tensor(row)
        attention_mask[number, : len(row)] = 1
        start = number * width + len(prompt)
        responses.append(_Response(start - 1, start, response))
    tensors: dict[str, Tensor | None] = {
        "input_ids_BT": input_ids,
        "position_ids_BT": None,
        "attention_mask_BT": attention_mask,
    }
    return _Inputs(tensors, None, int(attention_mask.sum())), responses


def _reference_sums(pairs: Sequence[TokenPair], reference: References) -> Tensor:
    sums = [reference[pair.index] for pair in pairs]
    return torch.tensor([c for c, _ in sums] + [r for _, r in sums], dtype=torch.float64)
