"""How a language model computes packed pairs: its attention, its positions, its hidden states.

The attention is registered with transformers as `packed_pairs`. In a pair `[prompt | chosen | rejected]`, prompt and
chosen response have ordinary causal attention; the rejected response attends to the prompt and to itself. On the CPU
each pair is two calls of torch's fused kernel. On a GPU a micro-batch is one call: in bf16 of FlashAttention for rows of
different lengths; else, or where that has no kernel for the heads, of FlexAttention. Sliding windows count positions in a
token's own response, not places in the row.

Rotary positions that depend on how long a row is ("dynamic", "longrope") are computed for each row alone: transformers
takes the frequencies of the longest row of a forward for all of them, and "dynamic" ones keep those of the longest row
that they have seen.

Shapes: H query heads, K key heads, N tokens of the batch, Q queries, S keys, D width of a head or of the hidden states.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from trainers.errors import ModelError
from trainers.pairs.packing import CHOSEN, PROMPT, REJECTED, MicroBatch, PairLayout

PACKED_PAIRS = "packed_pairs"
Kernel = Callable[..., Tensor]
MayPosition = Callable[[Any, Any, Tensor, Tensor], Tensor]
# Arguments that models pass to any attention and that change nothing here: positions come from the layout, windows from
# the layer's rule, and there is no dropout.
_WITHOUT_EFFECT = ("dropout", "output_attentions", "position_ids", "sliding_window", "use_cache")

# The least width of a head that FlexAttention's kernel for GPUs takes, and the tokens of a block of its masks.
_FLEX_WIDTH, _FLEX_BLOCK = 16, 128
# Of one model there are at most eight: with a window or without, of one block or more, with gradients or without.
_FLEX_GRAPHS = 64
# The widest head of which FlashAttention has gradients on every card.
_FLASH_WIDTH = 192


def backbone(model: Any) -> Any:
    """Return the part of a model that computes hidden states; the base_model of a Llama 4 is itself."""
    return model.model if model.base_model is model else model.base_model


def hidden_states(model: Any, batch: MicroBatch) -> Tensor:
    """Return the last layer's normalised hidden states of all tokens of the batch, [N, D]."""
    # Padding would change the result (layouts.py).
    if getattr(model, "rows_alone", False):
        return _alone(model, batch)
    layout = {} if batch.layout is None else {"pair_layout": batch.layout}
    position_ids_BT = batch.position_ids_BT
    if batch.attention_mask_BT is not None and shared_tokens(model) is not None:
        # Padding gets a row's last position, so that no row counts as longer.
        position_ids_BT = batch.attention_mask_BT.cumsum(1) - 1
    mask_BT = batch.attention_mask_BT
    if batch.layout is not None:
        # Without a mask, transformers takes positions that restart for the start of a separate row.
        mask_BT = torch.ones_like(batch.input_ids_BT)
    output = backbone(model)(
        input_ids=batch.input_ids_BT,
        position_ids=position_ids_BT,
        attention_mask=mask_BT,
        use_cache=False,
        **layout,
    )
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD.flatten(0, 1)


def _alone(model: Any, batch: MicroBatch) -> Tensor:
    if hasattr(next(model.parameters()), "ds_id"):
        # Ranks have different numbers of rows, and would wait for each other.
        raise ModelError(f"a {type(model).__name__} is computed row by row, which ZeRO 3 cannot; use ZeRO 2.")
    assert batch.attention_mask_BT is not None
    lengths = batch.attention_mask_BT.sum(1).tolist()
    rows = [
        backbone(model)(input_ids=row_T[None, :length], use_cache=False).last_hidden_state[0]
        for row_T, length in zip(batch.input_ids_BT, lengths, strict=True)
    ]
    return pad_sequence(rows, batch_first=True).flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class MaskRule:
    """What a layer's queries may see, in transformers' form: (batch, head, query position, key position) → visible.

    `causal` means everything up to the query itself.
    """

    may_see: MayPosition
    causal: bool = False


def register() -> None:
    """Make `attn_implementation="packed_pairs"` known to transformers, which gives each layer its rule as its mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_PAIRS, pair_attention)
    AttentionMaskInterface.register(PACKED_PAIRS, _rule_of_layer)


def _rule_of_layer(*, mask_function: MayPosition, **others: Any) -> MaskRule:
    from transformers.masking_utils import causal_mask_function

    return MaskRule(mask_function, mask_function is causal_mask_function)


def pair_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRule | Tensor | None,
    *,
    pair_layout: PairLayout | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, H, N, D] queries over [1, K, N, D] keys and values → [1, N, H, D], contiguous. No dropout.

    `s_aux` is the score of each head's sink, which takes a share of the softmax. Raises ValueError for arguments that it
    would have to ignore.
    """
    if pair_layout is None:
        raise ValueError("packed_pairs attention was called without pair_layout")
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown or not isinstance(attention_mask, MaskRule):
        raise ValueError(f"packed_pairs attention does not know {', '.join(unknown) or 'a mask'}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    fused = fits_flex(query.device.type, min(query.shape[-1], value.shape[-1]), query.dtype)
    attend = _flex_attention if fused else _pairwise_attention
    if softcap is None and s_aux is None and fits_flash(query, value):
        name = ("window", attention_mask)
        window = pair_layout.once(name, lambda: _window(pair_layout, attention_mask, query.device))
        if window is not None:
            return _flash_attention(query, key, value, pair_layout, scale, window), None
    return attend(query, key, value, pair_layout, scale, attention_mask, softcap, s_aux), None


def fits_flex(device: str, width: int, dtype: torch.dtype) -> bool:
    """Whether FlexAttention has a kernel: on a GPU, for heads of at least 16 elements, of at most 32 bits each."""
    return device == "cuda" and width >= _FLEX_WIDTH and dtype.itemsize <= 4


def fits_flash(query: Tensor, value: Tensor) -> bool:
    """Whether torch's FlashAttention takes these heads: in bf16, on NVIDIA's cards since A100."""
    width = query.shape[-1]
    if query.device.type != "cuda" or not query.dtype == value.dtype == torch.bfloat16 or torch.version.hip:
        return False
    here = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)
    return here and width == value.shape[-1] <= _FLASH_WIDTH and width % 8 == 0


def _window(layout: PairLayout, rule: MaskRule, device: torch.device) -> int | None:
    """Return how many tokens a query sees, itself included: 0 for all before it, None where the rule is no window."""
    if rule.causal:
        return 0
    longest = max(span.prompt + max(span.chosen, span.rejected) for span in layout.spans)
    at, zero = torch.arange(longest, device=device), torch.zeros((), dtype=torch.long, device=device)
    seen = rule.may_see(zero, zero, at[:, None], at).expand(longest, longest)
    size = int(seen[-1].sum())
    window = (at <= at[:, None]) & (at > at[:, None] - size)
    return size if torch.equal(seen, window) else None


class _Rows(NamedTuple):
    """A batch as rows of keys, `[prompt | chosen]` and `[prompt | rejected]` of each pair, and their last tokens as queries.

    `key_S` is the place of each key in the batch; `own_N` where each token of the batch is among the keys, once;
    `again_I` where the prompts' tokens, at `prompt_I` of the batch, are for the second time. `lengths` say where rows
    begin, for queries and keys, and the most of each in a row.
    """

    key_S: Tensor
    own_N: Tensor
    prompt_I: Tensor
    again_I: Tensor
    lengths: tuple[Tensor, Tensor, int, int]


def _rows(layout: PairLayout, device: torch.device) -> _Rows:
    key: list[int] = []
    asks: list[bool] = []
    queries, keys = [0], [0]
    for span in layout.spans:
        whole = span.prompt + span.chosen
        key += [*range(span.start, span.rejected_start), *range(span.start, span.start + span.prompt)]
        key += range(span.rejected_start, span.end)
        asks += [True] * whole + [False] * span.prompt + [True] * span.rejected
        queries += [whole, span.rejected]
        keys += [whole, span.prompt + span.rejected]
    key_S, asks_S = torch.tensor(key), torch.tensor(asks)
    own_N, again_I = asks_S.nonzero()[:, 0], (~asks_S).nonzero()[:, 0]
    begin = [torch.tensor(lengths).cumsum(0).int().to(device) for lengths in (queries, keys)]
    return _Rows(
        key_S=key_S.to(device),
        own_N=own_N.to(device),
        prompt_I=key_S[again_I].to(device),
        again_I=again_I.to(device),
        lengths=(begin[0], begin[1], max(queries), max(keys)),
    )


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PairLayout, scale: float, window: int
) -> Tensor:
    """Compute the whole batch in one call of FlashAttention, in which a row's last query sees its last key."""
    rows = layout.once("rows", lambda: _rows(layout, query.device))
    # It counts the tokens before a query; -1 are all of them.
    options = {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}
    states = (states_1HND[0].transpose(0, 1) for states_1HND in (query, key, value))
    found: Tensor = _OverRows.apply(*states, rows, options)
    return found[None].contiguous()


class _OverRows(torch.autograd.Function):
    """FlashAttention of queries [N, H, D] over rows of keys, with gradients that are added in a fixed order."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: _Rows, options: dict[str, Any]
    ) -> Tensor:
        seen = query, key[rows.key_S], value[rows.key_S]
        causal = options["window_size_left"] < 0
        found, *kept, _ = torch.ops.aten._flash_attention_forward(
            *seen, *rows.lengths, 0.0, causal, False, **options
        )
        output: Tensor = found
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.rest = rows, causal, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums, *state = ctx.saved_tensors
        rows, causal, options = ctx.rest
        seen = query, key[rows.key_S], value[rows.key_S]
        before = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        # It asks this setting for its way that adds in a fixed order.
        torch.use_deterministic_algorithms(True)
        try:
            of_query, *of_keys = torch.ops.aten._flash_attention_backward(
                slope.contiguous(), *seen, output, sums, *rows.lengths, 0.0, causal, *state, **options
            )
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
        # No place is named twice, so that these sums have no order.
        folded = [grad[rows.own_N].index_add_(0, rows.prompt_I, grad[rows.again_I]) for grad in of_keys]
        return of_query, *folded, None, None


def _pairwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PairLayout,
    scale: float,
    rule: MaskRule,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attend = functools.partial(_attend, scale=scale, softcap=softcap, sinks=sinks)
    # One split instead of slices, each of whose gradients would be as long as the whole row.
    halves = [length for span in layout.spans for length in (span.prompt + span.chosen, span.rejected)]
    queries, keys, values = (states.split(halves, 2) for states in (query, key, value))
    outputs = []

    def suffix_mask(before: int, asked: int) -> Tensor | None:
        name = (before, asked, rule, query.dtype)
        found: Tensor | None = layout.once(name, lambda: _suffix_mask(before, asked, rule, query))
        return found

    for number, span in enumerate(layout.spans):
        chosen, rejected = 2 * number, 2 * number + 1
        mask = suffix_mask(0, span.prompt + span.chosen)
        outputs.append(attend(queries[chosen], keys[chosen], values[chosen], mask))
        mask = suffix_mask(span.prompt, span.rejected)
        seen_keys, seen_values = (
            torch.cat([states[chosen][:, :, : span.prompt], states[rejected]], 2) for states in (keys, values)
        )
        outputs.append(attend(queries[rejected], seen_keys, seen_values, mask))
    # Transposed before the parts are joined: one copy, not two.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _suffix_mask(before: int, queries: int, rule: MaskRule, like: Tensor) -> Tensor | None:
    """Return the additive [Q, S] mask of the last Q of S = before + Q tokens; None for plain causal attention."""
    if rule.causal and before == 0:
        return None
    keys = before + queries
    query_Q1 = torch.arange(before, keys, device=like.device)[:, None]
    key_S = torch.arange(keys, device=like.device)
    zero = torch.zeros((), dtype=torch.long, device=like.device)
    seen = rule.may_see(zero, zero, query_Q1, key_S).expand(queries, keys)
    # A window wider than the row hides nothing, and plain causal attention is faster.
    if before == 0 and torch.equal(seen, key_S <= query_Q1):
        return None
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention; torch's fused kernel has neither c·tanh(q·k / c) before the softmax nor sinks in it."""
    if softcap is None and sinks is None:
        causal = mask is None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )
    scores = query @ key.transpose(2, 3)
    scores = scores * scale if softcap is None else softcap * torch.tanh(scores * (scale / softcap))
    if mask is None:
        size = query.shape[2]
        mask = torch.full((size, size), -math.inf, dtype=query.dtype, device=query.device).triu(1)
    scores = scores + mask
    wide = torch.promote_types(query.dtype, torch.float32)
    if sinks is None:
        return torch.softmax(scores, -1, dtype=wide).to(query.dtype) @ value
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    spent = torch.softmax(torch.cat([scores, sink], -1), -1, dtype=wide)[..., :-1]
    return spent.to(query.dtype) @ value


def visible(layout: PairLayout, rule: MaskRule, device: torch.device) -> Callable[..., Tensor]:
    """Return FlexAttention's mask function of the packed row: (batch, head, query, key) → may the query see the key."""
    pair, part, position = [], [], []
    for number, span in enumerate(layout.spans):
        lengths = (span.prompt, span.chosen, span.rejected)
        pair.append(torch.full((sum(lengths),), number))
        for kind, length in zip((PROMPT, CHOSEN, REJECTED), lengths, strict=True):
            part.append(torch.full((length,), kind))
            position.append(torch.arange(length) + (0 if kind == PROMPT else span.prompt))
    pair_N, part_N, position_N = (torch.cat(parts).to(device) for parts in (pair, part, position))
    of_layer = rule.may_see

    def may_see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # No in-place operations: the compiler cannot lower them in a mask.
        response = (part_N[key] == PROMPT) | (part_N[key] == part_N[query])
        together = response & (pair_N[query] == pair_N[key])
        return together & of_layer(batch, head, position_N[query], position_N[key])

    return may_see


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PairLayout,
    scale: float,
    rule: MaskRule,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    kernel: Kernel | None = None,
) -> Tensor:
    """Compute the whole row in one FlexAttention call; the layers of a forward share its block mask."""
    from torch.nn.attention.flex_attention import AuxRequest

    mask = layout.once(
        ("flex", rule), lambda: block_mask(layout, visible(layout, rule, query.device), query.device)
    )

    def capped(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, of: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output, others = (kernel or compiled_flex())(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
        # torch 2.13 gives rows under 128 tokens to its decoding kernel, which has no blocks for most groups of heads.
        kernel_options={"BACKEND": "TRITON"},
    )
    if sinks is not None:
        # A sink adds exp(s) to the denominator of the softmax.
        share = torch.sigmoid(others.lse - sinks.to(others.lse.dtype)[:, None])
        output = output * share[..., None].to(output.dtype)
    found: Tensor = output.transpose(1, 2).contiguous()
    return found


def block_mask(layout: PairLayout, may_see: Kernel, device: torch.device) -> Any:
    """Return FlexAttention's block mask; `create_block_mask` makes [N, N] tensors, this one square per pair."""
    from torch.nn.attention.flex_attention import BlockMask

    size = layout.spans[-1].end
    blocks = -(-size // _FLEX_BLOCK)
    zero = torch.zeros((), dtype=torch.long, device=device)
    # For each block of queries and keys, the number of visible (query, key) pairs.
    seen = torch.zeros(blocks, blocks, dtype=torch.long, device=device)
    for span in layout.spans:
        first, last = span.start // _FLEX_BLOCK, -(-span.end // _FLEX_BLOCK)
        at = torch.arange(first * _FLEX_BLOCK, last * _FLEX_BLOCK, device=device)
        inside = (at >= span.start) & (at < span.end)
        at = at.clamp(max=size - 1)
        mask = may_see(zero, zero, at[:, None], at[None]) & inside[:, None] & inside
        tiles = mask.view(last - first, _FLEX_BLOCK, last - first, _FLEX_BLOCK)
        seen[first:last, first:last] += tiles.sum((1, 3))
    whole = seen == _FLEX_BLOCK**2
    of_part, of_whole = (_in_order(tiles) for tiles in ((seen > 0) & ~whole, whole))
    return BlockMask.from_kv_blocks(
        *of_part, *of_whole, BLOCK_SIZE=_FLEX_BLOCK, mask_mod=may_see, seq_lengths=(size, size)
    )


def _in_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return each query block's number of key blocks, [1, 1, B], and its key blocks first in order, [1, 1, B, B]."""
    order = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@functools.cache
def compiled_flex(backend: str | Callable[..., Any] = "inductor", graphs: int = _FLEX_GRAPHS) -> Kernel:
    """Return FlexAttention as a fused kernel, which raises an error instead of running unfused."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    kernel = torch.compile(flex_attention, backend=backend, fullgraph=True, dynamic=True)
    # A soft-cap must be a constant: the graph of gradients lacks its symbol.
    fused: Kernel = config.patch(specialize_float=True, recompile_limit=graphs)(kernel)
    return fused


def separate_rows(model: nn.Module) -> None:
    """Make length-dependent rotary embeddings compute each row alone; a row starts at each position 0."""
    for module in _by_length(model):
        module.forward = MethodType(_each_row_alone, module)  # type: ignore[method-assign]


def shared_tokens(model: nn.Module) -> int | None:
    """Return the length up to which rows have the same frequencies and can share a prompt; None: any length."""
    return min((length for lengths in _by_length(model).values() for length in lengths), default=None)


def _by_length(model: nn.Module) -> dict[Any, list[int]]:
    """Return the length-dependent rotary embeddings, each with the lengths from which they depend on it."""
    found: dict[Any, list[int]] = {}
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and "dynamic" in kind:
                found.setdefault(module, []).append(int(module.original_max_seq_len))  # type: ignore[arg-type]
            elif kind == "longrope":
                parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
                of_layer = parameters if layer is None else parameters[layer]
                found.setdefault(module, []).append(int(of_layer["original_max_position_embeddings"]))
    return found


def _each_row_alone(self: Any, x: Tensor, position_ids: Tensor, *others: Any, **named: Any) -> Any:
    compute = type(self).forward
    found = []
    for position_1T in position_ids.split(1):
        begins = (position_1T[0, 1:] == 0) & (position_1T[0, :-1] > 0)
        parts = []
        for position_1L in position_1T.tensor_split((begins.nonzero()[:, 0] + 1).tolist(), dim=1):
            # A row of one token resets the frequencies of longer ones.
            compute(self, x, torch.zeros_like(position_1L[:, :1]), *others, **named)
            parts.append(compute(self, x, position_1L, *others, **named))
        found.append(_joined(parts, -2))
    return _joined(found, 0)


def _joined(parts: list[Any], dim: int) -> Any:
    """Concatenate tensors, or tuples of tensors element by element."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim)
    return tuple(torch.cat(some, dim) for some in zip(*parts, strict=True))
