"""From pairs to micro-batches: which pairs a forward computes, and how their tokens are laid out for the model.

Packed, a pair is `[prompt | chosen | rejected]` in one row: the prompt is computed once, the responses are blind
to each other (attention.py), and the positions of the rejected response restart after the prompt. Nothing is padded.
A model that cannot take this gets two padded rows a pair.

Shapes: P pairs, R = 2P responses (chosen ones first, then rejected), T tokens of a row, B rows, M response tokens.
Positions named `_R` and `_M` index the B × T tokens of the batch laid end to end.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainers.pairs.tokens import TokenPair

Layout = Literal["packed", "rows"]
# Row of a pair in its source split → log-prob sums of (chosen, rejected) under the reference model.
References = dict[int, tuple[float, float]]

PROMPT, CHOSEN, REJECTED = 0, 1, 2

# Tokens of a scoring forward: enough to fill a device, and few enough for the activations of an 8B model.
_SCORING_TOKENS = 4096


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch's pairs, which is the same for every reward type at one seed."""
    return [int(i) for i in np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)]


def steps_of_epoch(order: Sequence[int], effective_batch: int) -> list[list[int]]:
    """Divide an epoch into effective batches. The last may be short; no pair is dropped."""
    return [list(order[start : start + effective_batch]) for start in range(0, len(order), effective_batch)]


def forward_cost(pair: TokenPair, layout: Layout, shared_tokens: int | None) -> int:
    """Return the tokens that a forward computes for a pair, without the padding of rows beside longer ones."""
    if layout == "rows":
        return 2 * pair.longest
    apart = shared_tokens is not None and pair.longest > shared_tokens
    return pair.tokens + apart * len(pair.prompt)


def split_step(
    step: Sequence[int],
    costs: Mapping[int, int],
    *,
    world_size: int,
    forward_tokens: int,
    padded: bool = False,
) -> list[list[list[int]]]:
    """Return [rank][forward] → positions: the fewest forwards of at most `forward_tokens`, filled evenly.

    A longer pair is a forward by itself. Pairs are taken longest first, each into the forward with the fewest tokens.
    Every rank gets the same number of forwards, so that collectives match; one may be empty. With `padded`, a pair
    costs as much as the longest one in its forward.
    """
    longest_first = sorted(step, key=lambda position: (-costs[position], position))
    least = sum(min(costs[position], forward_tokens) for position in step) / (world_size * forward_tokens)
    for laps in range(math.ceil(least), len(step) + 1):
        groups: list[list[int]] = [[] for _ in range(world_size * laps)]
        tokens = [0] * len(groups)
        for position in longest_first:
            lightest = min(range(len(groups)), key=tokens.__getitem__)
            groups[lightest].append(position)
            width = costs[groups[lightest][0]]
            tokens[lightest] = width * len(groups[lightest]) if padded else tokens[lightest] + costs[position]
        if all(len(group) < 2 or size <= forward_tokens for group, size in zip(groups, tokens, strict=True)):
            break
    # Ranks wait for each other in each lap, so forwards of similar size run together. Every second lap is reversed, so
    # that no rank always gets the longest one.
    order = sorted(range(len(groups)), key=lambda number: (-tokens[number], number))
    rounds = [order[start : start + world_size] for start in range(0, len(order), world_size)]
    rounds = [lap if number % 2 == 0 else lap[::-1] for number, lap in enumerate(rounds)]
    return [[groups[lap[rank]] for lap in rounds] for rank in range(world_size)]


def scoring_groups(pairs: Sequence[TokenPair], tokens: int = _SCORING_TOKENS) -> Iterator[list[TokenPair]]:
    """Yield groups of about `tokens` tokens, longest pairs first: what does not fit in memory fails at once."""
    group: list[TokenPair] = []
    size = 0
    for pair in sorted(pairs, key=lambda pair: (-pair.tokens, pair.index)):
        if group and size + pair.tokens > tokens:
            yield group
            group, size = [], 0
        group.append(pair)
        size += pair.tokens
    if group:
        yield group


class Span(NamedTuple):
    """Where a packed pair starts, and how many tokens its three parts have."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def rejected_start(self) -> int:
        """The place of the rejected response's first token."""
        return self.start + self.prompt + self.chosen

    @property
    def end(self) -> int:
        """The place after the pair's last token."""
        return self.rejected_start + self.rejected


@dataclass(frozen=True, slots=True)
class PairLayout:
    """Which tokens of a packed row belong together; it travels through the model's forward as a keyword argument.

    `masks` keeps what attention derives from the spans, so that every layer of a forward shares it.
    """

    spans: tuple[Span, ...]
    masks: dict[object, object] = field(default_factory=dict, compare=False, repr=False)

    def once(self, name: object, make: Callable[[], Any]) -> Any:
        """Return what `make` returned when it was first asked for by this name."""
        if name not in self.masks:
            self.masks[name] = make()
        return self.masks[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The pairs of one forward as tensors.

    `last_R` is the place of each response's last token. The M response tokens that are scored are `target_M`, at places `response_M`,
    each predicted at `predictor_M`, in response `owner_M`. `same_P` marks pairs whose two responses are the same
    tokens. `reference_R` holds the reference model's log-prob sums, where the reward has one; `margin_P` the pairs' own
    margins, where all of them have one, and `tie_P` marks ties, where there are any. With `rewritings`, the second half
    of the pairs are the rewritings of the first half, in their order.
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
    same_P: Tensor
    reference_R: Tensor | None
    margin_P: Tensor | None
    tie_P: Tensor | None
    rewritings: bool
    indices: tuple[int, ...]
    tokens: int


class _Response(NamedTuple):
    """A response in the batch: the place before its first token, the place of its first token, its tokens."""

    before: int
    start: int
    ids: list[int]


def collate(
    pairs: Sequence[TokenPair],
    *,
    layout: Layout = "packed",
    shared_tokens: int | None = None,
    pad_id: int = 0,
    reference: References | None = None,
    device: str = "cpu",
) -> MicroBatch:
    """Make one micro-batch. Packed, a pair shares its prompt unless one of its rows is longer than `shared_tokens`."""
    ids, positions, mask, spans, responses = (
        _packed(pairs, shared_tokens) if layout == "packed" else _rows(pairs, pad_id)
    )
    unscored = [pair.unscored[side] for side in (0, 1) for pair in pairs]
    responses = [
        _Response(start + count - 1, start + count, ids[count:]) if count else _Response(before, start, ids)
        for (before, start, ids), count in zip(responses, unscored, strict=True)
    ]
    half = len(pairs) // 2
    counts = torch.tensor([len(response.ids) for response in responses])
    owner_M = torch.repeat_interleave(torch.arange(len(responses)), counts)
    within_M = torch.cat([torch.arange(len(response.ids)) for response in responses])
    before_M = torch.tensor([response.before for response in responses])[owner_M]
    response_M = torch.tensor([response.start for response in responses])[owner_M] + within_M
    reference_R = None
    if reference is not None:
        reference_P2 = torch.tensor([reference[pair.index] for pair in pairs], dtype=torch.float64)
        reference_R = reference_P2.T.flatten().to(device)
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    margin_P = torch.tensor(margins, dtype=torch.float64).to(device) if len(margins) == len(pairs) else None
    return MicroBatch(
        input_ids_BT=ids.to(device),
        position_ids_BT=None if positions is None else positions.to(device),
        attention_mask_BT=None if mask is None else mask.to(device),
        layout=spans,
        last_R=torch.tensor([response.start + len(response.ids) - 1 for response in responses]).to(device),
        response_M=response_M.to(device),
        predictor_M=torch.where(within_M == 0, before_M, response_M - 1).to(device),
        target_M=torch.tensor([token for response in responses for token in response.ids]).to(device),
        owner_M=owner_M.to(device),
        same_P=torch.tensor([pair.chosen == pair.rejected for pair in pairs]).to(device),
        reference_R=reference_R,
        margin_P=margin_P,
        tie_P=torch.tensor(ties).to(device) if any(ties := [pair.tie for pair in pairs]) else None,
        rewritings=[pair.rewriting for pair in pairs[:half]] == [*pairs[half:]],
        indices=tuple(pair.index for pair in pairs),
        tokens=ids.numel() if mask is None else int(mask.sum()),
    )


# Ids, positions and padding mask, [B, T], which tokens are a pair, and the responses.
_Laid = tuple[Tensor, Tensor | None, Tensor | None, PairLayout | None, list[_Response]]


def _packed(pairs: Sequence[TokenPair], shared_tokens: int | None) -> _Laid:
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []

    def lay(prompt: list[int], chosen: list[int], rejected: list[int]) -> Span:
        span = Span(len(ids), len(prompt), len(chosen), len(rejected))
        ids.extend([*prompt, *chosen, *rejected])
        positions.extend(
            [*range(span.prompt + span.chosen), *range(span.prompt, span.prompt + span.rejected)]
        )
        spans.append(span)
        return span

    chosen: list[_Response] = []
    rejected: list[_Response] = []
    for pair in pairs:
        if shared_tokens is None or pair.longest <= shared_tokens:
            first = second = lay(pair.prompt, pair.chosen, pair.rejected)
        else:
            first, second = lay(pair.prompt, pair.chosen, []), lay(pair.prompt, [], pair.rejected)
        before = first.start + first.prompt - 1
        chosen.append(_Response(before, before + 1, pair.chosen))
        rejected.append(_Response(second.start + second.prompt - 1, second.rejected_start, pair.rejected))
    return torch.tensor([ids]), torch.tensor([positions]), None, PairLayout(tuple(spans)), chosen + rejected


def _rows(pairs: Sequence[TokenPair], pad_id: int) -> _Laid:
    halves = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(response) for prompt, response in halves)
    rows = [prompt + response for prompt, response in halves]
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    starts = [number * width + len(prompt) for number, (prompt, _) in enumerate(halves)]
    responses = [_Response(start - 1, start, half[1]) for start, half in zip(starts, halves, strict=True)]
    return ids, None, mask, None, responses
