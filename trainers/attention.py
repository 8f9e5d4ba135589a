"""Attention over packed pairs, registered with transformers as `packed_pairs`.

Of a pair `[prompt | chosen | rejected]` the chosen half is ordinary causal attention; the rejected response attends
to the prompt and to itself. On the CPU each pair is two calls of torch's fused kernel, on a GPU a micro-batch is one
call of FlexAttention. Sliding windows go by a token's position in its own response, not by its place in the row.

Shapes: H query heads, K key heads, N tokens of the packed row, Q queries, S keys, D head width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.packing import CHOSEN, PROMPT, REJECTED, PairLayout

PACKED_PAIRS = "packed_pairs"
Kernel = Callable[..., Tensor]
# What models hand to any attention, and what changes nothing here: positions are the layout's, there is no dropout.
_WITHOUT_EFFECT = ("dropout", "output_attentions", "position_ids", "use_cache")


def register() -> None:
    """Make `attn_implementation="packed_pairs"` known to transformers; it gets no mask, the layout says it all."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_PAIRS, pair_attention)


def pair_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pair_layout: PairLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, H, N, D] queries over [1, K, N, D] keys and values → [1, N, H, D], contiguous. No dropout.

    Raises ValueError for what it would have to ignore.
    """
    if pair_layout is None:
        raise ValueError("packed_pairs attention was called without pair_layout")
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown or attention_mask is not None:
        raise ValueError(f"packed_pairs attention does not know {', '.join(unknown) or 'a mask'}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    attend = _flex_attention if query.is_cuda else _pairwise_attention
    output = attend(query, key, value, pair_layout, scale, sliding_window, softcap)
    return output, None


def _pairwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PairLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    kernel: Kernel = _fused if softcap is None else functools.partial(_softcapped, softcap=softcap)
    # Split at once, not sliced one by one: the gradient of each slice would be as long as the whole row.
    halves = [length for span in layout.spans for length in (span.prompt + span.chosen, span.rejected)]
    queries, keys, values = (states.split(halves, 2) for states in (query, key, value))
    outputs = []
    for number, span in enumerate(layout.spans):
        chosen, rejected = 2 * number, 2 * number + 1
        mask = _suffix_mask(layout, 0, span.prompt + span.chosen, window, query)
        outputs.append(kernel(queries[chosen], keys[chosen], values[chosen], mask, scale=scale))
        mask = _suffix_mask(layout, span.prompt, span.rejected, window, query)
        seen_keys, seen_values = (
            torch.cat([states[chosen][:, :, : span.prompt], states[rejected]], 2) for states in (keys, values)
        )
        outputs.append(kernel(queries[rejected], seen_keys, seen_values, mask, scale=scale))
    # Heads go inside before the parts are joined: one copy, not two.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _suffix_mask(
    layout: PairLayout, before: int, queries: int, window: int | None, like: Tensor
) -> Tensor | None:
    """Additive [Q, S] mask of the last Q of S = before + Q tokens; None where plain causal attention is meant."""
    keys = before + queries
    if window is not None and window >= keys:
        window = None
    if before == 0 and window is None:
        return None
    name = (before, queries, window, like.dtype)
    mask = layout.masks.get(name)
    if mask is None:
        query_Q1 = torch.arange(before, keys, device=like.device)[:, None]
        key_S = torch.arange(keys, device=like.device)
        hidden = key_S > query_Q1
        if window is not None:
            hidden |= key_S <= query_Q1 - window
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
        layout.masks[name] = mask
    assert isinstance(mask, Tensor)
    return mask


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, softcap: float
) -> Tensor:
    """Written out, since the fused kernel has no soft-capping: c·tanh(q·k / c) before the softmax."""
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is None:
        size = query.shape[2]
        mask = torch.full((size, size), -math.inf, dtype=query.dtype, device=query.device).triu(1)
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.softmax(scores + mask, -1, dtype=wide).to(query.dtype) @ value


def visible(layout: PairLayout, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's mask function of the packed row: (batch, head, query, key) → may the query see the key."""
    pair, part, position = [], [], []
    for number, span in enumerate(layout.spans):
        lengths = (span.prompt, span.chosen, span.rejected)
        pair.append(torch.full((sum(lengths),), number))
        for kind, length in zip((PROMPT, CHOSEN, REJECTED), lengths, strict=True):
            part.append(torch.full((length,), kind))
            position.append(torch.arange(length) + (0 if kind == PROMPT else span.prompt))
    pair_N, part_N, position_N = (torch.cat(parts).to(device) for parts in (pair, part, position))

    def may_see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position_N[query] - position_N[key]
        seen = (pair_N[query] == pair_N[key]) & (distance >= 0)
        seen &= (part_N[key] == PROMPT) | (part_N[key] == part_N[query])
        return seen if window is None else seen & (distance < window)

    return may_see


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PairLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One FlexAttention call for the whole row; the block mask is shared by the layers of a forward."""
    from torch.nn.attention.flex_attention import create_block_mask

    name = ("flex", window)
    if name not in layout.masks:
        size = query.shape[2]
        may_see = visible(layout, window, query.device)
        layout.masks[name] = create_block_mask(may_see, None, None, size, size, device=query.device.type)

    def capped(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, of: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output: Tensor = _flex_kernel(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=layout.masks[name],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


@functools.cache
def _flex_kernel(compiled: bool) -> Any:
    """Compiled for a GPU; as plain torch operations on the CPU, where only tests call it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
