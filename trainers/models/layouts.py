"""Which layout a model gets: packed pairs if it is exact with them, else two padded rows a pair.

Both are tried on a tiny random model of the same class and config: loaded weights could hide an error, and the windows
of real configs are too long for a quick trial.

Shapes: R = 2P rows of the P trial pairs (chosen ones first), L tokens of a row, N of a batch, M of responses.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainers.errors import ModelError
from trainers.models import attention
from trainers.models.attention import backbone
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
# Tokens of prompt, chosen and rejected: rows longer than a tiny model's windows, and shorter ones.
_LENGTHS = ((9, 7, 4), (5, 3, 8), (4, 3, 2), (6, 6, 1), (7, 2, 9), (3, 12, 5), (8, 4, 4), (11, 1, 6))
# Names in configs of a scale of the logits, by its value and the width, and of their soft-cap.
_SCALES: dict[str, Callable[[float, int], float]] = {
    "logit_scale": lambda value, width: value,
    "lm_head_multiplier": lambda value, width: value,
    "logits_scaling": lambda value, width: 1 / value,
    "dim_model_base": lambda value, width: value / width,
}
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


# The layout of a kind of model (None: it may not be used), and why it is not packed.
Verdict = tuple[Layout | None, str]


def layout_of(model: Any) -> Layout:
    """Return how pairs are laid out for `model`."""
    return "packed" if model.config._attn_implementation == attention.PACKED_PAIRS else "rows"


def padded_attention(config: Any) -> str | None:
    """Return transformers' attention for padded rows: its default, or eager if scores are soft-capped."""
    return None if getattr(config, "attn_logit_softcapping", None) is None else "eager"


def settle_layout(model: Any, location: str) -> None:
    """Give `model` the packed layout if its kind is exact with it, else log why not. Raises ModelError."""
    layout, why = _verdict(model)
    kind = type(model).__name__
    if layout is None:
        raise ModelError(f"{location}: a {kind} with this config.json cannot be scored or trained: {why}.")
    if isinstance(model.get_output_embeddings(), Unembedding):
        _settle_logits(model)
    if layout == "packed":
        _pack(model)
        return
    logger.warning("%s (%s) gets two padded rows a pair, not packed pairs: %s.", location, kind, why)


def tokens_are_rows(model: Any) -> bool:
    """Whether `model` knows a token only by its row of the embeddings, so that rows can be added."""
    one, other, *_ = ORDINARY_TOKENS
    try:
        with torch.inference_mode(), Wide():
            tiny = tiny_copy(model)
            weight = tiny.get_input_embeddings().weight
            weight[other] = weight[one]
            return _close(_row(tiny, [one] * 3), _row(tiny, [one, other, one]))
    # An unknown architecture's code may raise anything; settle_layout then refuses the model, and says why.
    except Exception:
        return True


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
    pairs = _trial_pairs()
    # An unknown architecture's code may raise anything.
    try:
        tiny = tiny_copy(model)
        with Wide():
            refusal = _why_refused(tiny, pairs[0], gives_log_probs)
            expected = _by_row(tiny, pairs)
    except Exception as error:
        why = f"a tiny model of its kind, on which that is tried, does not run ({_said(error)})"
        return None, why
    if refusal:
        return None, refusal
    rows, packed = _why_not(tiny, "rows", pairs, expected), "its attention is its own"
    if model._supports_attention_backend:
        _pack(tiny)
        packed = _why_not(tiny, "packed", pairs, expected)
    if not packed:
        return "packed", ""
    if rows:
        return None, f"with padded rows {rows}; with packed pairs {packed}"
    return "rows", packed


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _trial_pairs() -> list[TokenPair]:
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[int]:
        places = torch.randint(len(ORDINARY_TOKENS), (count,), generator=generator)
        return [ORDINARY_TOKENS[place] for place in places.tolist()]

    return [
        TokenPair(index=number, prompt=drawn(prompt), chosen=drawn(chosen), rejected=drawn(rejected))
        for number, (prompt, chosen, rejected) in enumerate(_LENGTHS)
    ]


def _row(model: Any, row: list[int]) -> Tensor:
    """Return the hidden states of one row as transformers gives them, [L, D]."""
    return backbone(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]


def _by_row(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """Return the states of response tokens, then of the tokens that predict them, computed row by row: [2M, D]."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    states = [(len(prompt), _row(model, prompt + response)) for prompt, response in rows]
    return torch.cat(
        [row_LD[start:] for start, row_LD in states] + [row_LD[start - 1 : -1] for start, row_LD in states]
    )


def _why_refused(model: Any, pair: TokenPair, gives_log_probs: bool) -> str:
    """Return why a kind of model may not be used at all; "" if it may."""
    start, row, other_row = len(pair.prompt), pair.prompt + pair.chosen, pair.prompt + pair.chosen[::-1]
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
    logits_LV = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
    expected_L = logits_LV.log_softmax(-1).gather(1, target_L[:, None])[:, 0]
    if not _close(token_log_probs(model, row_LD[:-1], target_L), expected_L):
        return (
            "its logits are not its unembedding applied to its hidden states, scaled or soft-capped, so its "
            "log-probabilities would be wrong. It can be ex_rm, but not im_rm or ex_grm"
        )
    return ""


def _settle_logits(model: Any) -> None:
    """Give the unembedding the scale and soft-cap of logits that the config names; the trial compares what they give."""
    config, layer = model.config, model.get_output_embeddings()
    named = {name: getattr(config, name, None) for name in (*_SCALES, *_CAPS)}
    found = {name: value for name, value in named.items() if value and isinstance(value, int | float)}
    for name, scale in _SCALES.items():
        if name in found:
            layer.scale = float(scale(found[name], config.hidden_size))
    layer.softcap = next((float(found[name]) for name in _CAPS if name in found), None)


def _why_not(model: Any, layout: Layout, pairs: Sequence[TokenPair], expected: Tensor) -> str:
    """Return why `layout` does not give the hidden states of single rows; "" if it does."""
    try:
        with Wide():
            batch = collate(pairs, layout=layout)
            hidden_ND = hidden_states(model, batch)
    except Exception as error:
        return f"it does not run ({_said(error)})"
    found = torch.cat([hidden_ND[batch.response_M], hidden_ND[batch.predictor_M]])
    return "" if _close(found, expected) else _OTHER_STATES


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
