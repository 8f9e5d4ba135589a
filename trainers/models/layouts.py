"""Which layout a model gets: packed pairs if it is exact with them, else two padded rows a pair.

Both are tried on a tiny random model of the same class and config: loaded weights could hide an error, and the windows
of real configs are too long for a quick trial.

Shapes: R = 2P rows of the P trial pairs (chosen ones first), L tokens of a row, N of a batch, M of responses.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainers.errors import ModelError
from trainers.models import attention
from trainers.models.attention import backbone, separate_rows, shared_tokens
from trainers.models.reward_parts import hidden_states, token_log_probs
from trainers.models.tiny_copy import ORDINARY_TOKENS, Wide, tiny_copy
from trainers.models.unembedding import Unembedding
from trainers.pairs.packing import Layout, collate
from trainers.pairs.templates import first_line
from trainers.pairs.tokens import TokenPair

logger = logging.getLogger(__name__)

# Per element, in float64.
_TOLERANCE = 1e-8
_OTHER_STATES = "it gives other hidden states than each row alone"
# Tokens of prompt, chosen and rejected: rows longer than a tiny model's windows, and on both sides of its rope's length.
_LENGTHS = ((9, 7, 4), (5, 3, 8), (4, 3, 2), (6, 6, 1))


class Verdict(NamedTuple):
    """The layout of a kind of model (None: it may not be used), and why it is not packed.

    `alone` says that its rows must not be padded.
    """

    layout: Layout | None
    why: str
    alone: bool = False


def layout_of(model: Any) -> Layout:
    """Return how pairs are laid out for `model`."""
    return "packed" if model.config._attn_implementation == attention.PACKED_PAIRS else "rows"


def padded_attention(config: Any) -> str | None:
    """Return transformers' attention for padded rows: its default, or eager if scores are soft-capped."""
    return None if getattr(config, "attn_logit_softcapping", None) is None else "eager"


def settle_layout(model: Any, location: str) -> None:
    """Give `model` the packed layout if its kind is exact with it, else log why not. Raises ModelError."""
    layout, why, alone = _verdict(model)
    kind = type(model).__name__
    if layout is None:
        raise ModelError(f"{location}: a {kind} with this config.json cannot be scored or trained: {why}.")
    separate_rows(model)
    if isinstance(model.get_output_embeddings(), Unembedding):
        _settle_logits(model)
    if layout == "packed":
        _pack(model)
        return
    model.rows_alone = alone
    rows = "two rows a pair, each computed alone" if alone else "two padded rows a pair"
    logger.warning("%s (%s) gets %s, not packed pairs: %s.", location, kind, rows, why)


def tokens_are_rows(model: Any) -> bool:
    """Whether `model` knows a token only by its row of the embeddings, so that rows can be added. Raises ModelError."""
    one, other, *_ = ORDINARY_TOKENS
    try:
        with torch.inference_mode(), Wide():
            tiny = tiny_copy(model)
            weight = tiny.get_input_embeddings().weight
            weight[other] = weight[one]
            return _close(_row(tiny, [one] * 3), _row(tiny, [one, other, one]))
    # An unknown architecture's code may raise anything.
    except Exception as error:
        raise ModelError(
            f"a {type(model).__name__} with this config.json cannot be given its tokenizer's new tokens: "
            f"{_not_tried(error)}."
        ) from error


def _pack(model: Any) -> None:
    attention.register()
    model.set_attn_implementation(attention.PACKED_PAIRS)


# Class, config and whether its log-probabilities are asked for → what was found.
_verdicts: dict[tuple[type, str, bool], Verdict] = {}


def _verdict(model: Any) -> Verdict:
    gives_log_probs = isinstance(model.get_output_embeddings(), Unembedding)
    name = (type(model), repr(model.config.to_dict()), gives_log_probs)
    if name not in _verdicts:
        with torch.inference_mode():
            _verdicts[name] = _tried(model, gives_log_probs)
    return _verdicts[name]


def _tried(model: Any, gives_log_probs: bool) -> Verdict:
    # An unknown architecture's code may raise anything.
    try:
        tiny = tiny_copy(model)
        with Wide():
            refusal = _why_refused(tiny, gives_log_probs)
            expected = [_by_row(tiny, pairs) for pairs in _variants()]
    except Exception as error:
        return Verdict(None, _not_tried(error))
    if refusal:
        return Verdict(None, refusal)
    separate_rows(tiny)
    rows = _why_not(tiny, "rows", expected)
    packed, plain = "its attention is its own", tiny.config._attn_implementation
    if model._supports_attention_backend:
        _pack(tiny)
        packed = _why_not(tiny, "packed", expected)
    if not packed:
        return Verdict("packed", "")
    if not rows:
        return Verdict("rows", packed)
    tiny.rows_alone = True
    tiny.set_attn_implementation(plain)
    alone = _why_not(tiny, "rows", expected)
    why = f"with padded rows {rows}; with packed pairs {packed}"
    return Verdict(None if alone else "rows", f"{why}; row by row {alone}" if alone else why, not alone)


def _not_tried(error: Exception) -> str:
    return f"a tiny model of its kind, on which that is tried, does not run ({_said(error)})"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _variants() -> list[list[TokenPair]]:
    """Return trial pairs, and variants with other tokens in one part of each, or in all parts of some."""
    pairs = [
        TokenPair(
            index=number,
            prompt=_tokens(prompt, 3 * number),
            chosen=_tokens(chosen, 3 * number + 1),
            rejected=_tokens(rejected, 3 * number + 2),
        )
        for number, (prompt, chosen, rejected) in enumerate(_LENGTHS)
    ]
    others = [_other(_other(_other(pair, "prompt"), "chosen"), "rejected") for pair in pairs]
    return [
        pairs,
        [_other(pair, "chosen") for pair in pairs],
        [_other(pair, "rejected") for pair in pairs],
        pairs[:1] + others[1:],
    ]


def _tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ORDINARY_TOKENS), (count,), generator=generator)
    return [ORDINARY_TOKENS[number] for number in drawn.tolist()]


def _other(pair: TokenPair, part: str) -> TokenPair:
    """Return the pair with other tokens in one part."""
    first, span = ORDINARY_TOKENS[0], len(ORDINARY_TOKENS)
    moved: dict[str, Any] = {part: [first + (token - first + 1) % span for token in getattr(pair, part)]}
    return dataclasses.replace(pair, **moved)


def _fresh(model: Any) -> Any:
    """Return the model without state of earlier rows: some keep the frequencies of the longest."""
    return model if shared_tokens(model) is None else copy.deepcopy(model)


def _row(model: Any, row: list[int]) -> Tensor:
    """Return the hidden states of one row as transformers gives them, [L, D]."""
    return backbone(_fresh(model))(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]


def _by_row(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """Return the states of response tokens, then of the tokens that predict them, computed row by row: [2M, D]."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    states = [(len(prompt), _row(model, prompt + response)) for prompt, response in rows]
    return torch.cat(
        [row_LD[start:] for start, row_LD in states] + [row_LD[start - 1 : -1] for start, row_LD in states]
    )


def _why_refused(model: Any, gives_log_probs: bool) -> str:
    """Return why a kind of model may not be used at all; "" if it may."""
    pair, other = (variant[0] for variant in _variants()[:2])
    start, row, other_row = len(pair.prompt), pair.prompt + pair.chosen, pair.prompt + other.chosen
    row_LD = _row(model, row)
    if not _close(row_LD, _row(model, row)):
        return "it does not give the same hidden states twice"
    if not _close(row_LD[:start], _row(model, other_row)[:start]):
        return "it looks ahead: the hidden states of a prompt change with the response, so it is no causal language model"
    if _close(row_LD[start:], _row(model, other_row)[start:]):
        return "its hidden states do not depend on its tokens"
    if not gives_log_probs:
        return ""
    model.get_output_embeddings().__class__ = Unembedding
    _settle_logits(model)
    target_L = torch.tensor(row[1:])
    logits_LV = _fresh(model)(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
    expected_L = logits_LV.log_softmax(-1).gather(1, target_L[:, None])[:, 0]
    if not _close(token_log_probs(model, row_LD[:-1], target_L), expected_L):
        return (
            "its logits are not its unembedding applied to its hidden states, scaled or soft-capped, so its "
            "log-probabilities would be wrong. It can be ex_rm, but not im_rm or ex_grm"
        )
    return ""


class _Given:
    """The output of a backbone: given hidden states, and None for any other attribute."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: Any) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None


def _settle_logits(model: Any) -> None:
    """Find the scale and soft-cap of the logits from what the model makes of given outputs of its unembedding.

    Its weights and layers are not used. A model that does anything else with the outputs keeps plain logits.
    """
    body, layer = backbone(model), model.get_output_embeddings()
    given_T = torch.tensor([2.0**-16, 2.0**40, 0.5, -1.0, 4.0, -32.0], dtype=torch.float64)
    hidden_1TD = given_T[None, :, None].repeat(1, 1, layer.in_features)
    try:
        body.forward = lambda *others, **named: _Given(hidden_1TD)
        layer.forward = lambda hidden_1TD: hidden_1TD[..., :1].repeat(1, 1, layer.out_features)
        with torch.inference_mode(), Wide():
            ids = torch.zeros(1, len(given_T), dtype=torch.long)
            logits_T = model(input_ids=ids, use_cache=False).logits[0, :, 0].double()
            scale, limit = float(logits_T[0] / given_T[0]), float(logits_T[1])
    # After any error, _why_refused compares the log-probabilities.
    except Exception:
        return
    finally:
        vars(body).pop("forward", None)
        vars(layer).pop("forward", None)
    linear = math.isclose(limit, scale * float(given_T[1]), rel_tol=0.1)
    expected_T = scale * given_T if linear else limit * torch.tanh(scale / limit * given_T)
    # Some models (OPT) use only a part of their base model.
    if scale and torch.allclose(logits_T, expected_T, rtol=0.01):
        layer.scale, layer.softcap = scale, None if linear else limit


def _why_not(model: Any, layout: Layout, expected: Sequence[Tensor]) -> str:
    """Return why `layout` does not give the hidden states of single rows; "" if it does."""
    try:
        with Wide():
            for pairs, states in zip(_variants(), expected, strict=True):
                batch = collate(pairs, layout=layout, shared_tokens=shared_tokens(model))
                hidden_ND = hidden_states(model, batch)
                if not _close(torch.cat([hidden_ND[batch.response_M], hidden_ND[batch.predictor_M]]), states):
                    return _OTHER_STATES
    except Exception as error:
        return f"it does not run ({_said(error)})"
    return ""


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
