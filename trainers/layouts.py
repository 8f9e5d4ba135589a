"""Which layout a model can take: packed pairs where it is exact with them, else two padded rows a pair."""

import logging
from typing import Any

import torch
from torch import Tensor

from trainers import attention
from trainers.errors import ModelError
from trainers.packing import Layout, MicroBatch, collate
from trainers.pairs import TokenPair
from trainers.scoring import hidden_states, token_log_probs
from trainers.templates import first_line
from trainers.unembedding import Unembedding

logger = logging.getLogger(__name__)

# Tested to be exact with packed pairs; other architectures are tried on a probe when they are loaded.
PACKABLE = ("llama", "qwen2", "gemma2", "gpt_neox", "mistral")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_PROBE = (
    TokenPair(index=0, prompt=[1, 2, 3], chosen=[4, 5], rejected=[6, 7, 8]),
    TokenPair(index=1, prompt=[5, 3], chosen=[2, 4, 6, 1], rejected=[9]),
)


def layout_of(model: Any) -> Layout:
    """How pairs are laid out for `model`."""
    return "packed" if model.config._attn_implementation == attention.PACKED_PAIRS else "rows"


def padded_attention(config: Any) -> str:
    """transformers' attention for padded rows: only the eager one applies Gemma 2's soft-capping."""
    return "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"


def settle_layout(model: Any, location: str) -> None:
    """Give `model` the packed layout if it is exact with it, else say why not. Raises ModelError."""
    if model.config.model_type in PACKABLE:
        _pack(model)
        return
    with torch.inference_mode():
        _require_plain_logits(model, location)
        reason = _why_not_packed(model)
    if reason:
        model.set_attn_implementation(padded_attention(model.config))
        kind = model.config.model_type
        logger.warning("%s (%s) gets two padded rows a pair, not packed pairs: %s.", location, kind, reason)


def _pack(model: Any) -> None:
    attention.register()
    model.set_attn_implementation(attention.PACKED_PAIRS)


def _why_not_packed(model: Any) -> str | None:
    """The reason, or None with the model left packed."""
    if not model._supports_attention_backend:
        return "its attention is its own"
    if _windowed(model.config):
        return "it is not known whether its window is the attention function's or a mask's"
    expected = _response_states(model, collate(_PROBE, layout="rows"))
    _pack(model)
    try:
        found = _response_states(model, collate(_PROBE, layout="packed"))
    except (ValueError, TypeError, RuntimeError) as error:
        return f"it cannot run them ({first_line(error)})"
    close = (found - expected).norm() <= _TOLERANCE[found.dtype] * expected.norm()
    return None if close else "its hidden states differ with them"


def _windowed(config: Any) -> bool:
    """Whether some layer sees only a part of what is before it; the probe is too short to show how."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window is not None or getattr(config, "attention_chunk_size", None) is not None


def _response_states(model: Any, batch: MicroBatch) -> Tensor:
    """What a layout must not change: hidden states of response tokens, and those that predict them."""
    hidden_ND = hidden_states(model, batch)
    return torch.cat([hidden_ND[batch.response_M], hidden_ND[batch.predictor_M]])


def _require_plain_logits(model: Any, location: str) -> None:
    """Refuse a causal LM whose logits are more than its unembedding applied to its hidden states."""
    if not isinstance(model.get_output_embeddings(), Unembedding):
        return
    batch = collate(_PROBE, layout="rows")
    logits_NV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits.flatten(
        0, 1
    )
    expected_M = logits_NV[batch.predictor_M].float().log_softmax(-1).gather(1, batch.target_M[:, None])[:, 0]
    found_M = token_log_probs(model, hidden_states(model, batch)[batch.predictor_M], batch.target_M)
    if (found_M - expected_M).norm() > _TOLERANCE[logits_NV.dtype] * expected_M.norm():
        raise ModelError(
            f"{location}: the logits of a {type(model).__name__} are scaled or shifted in a way that rmsweep does not "
            "know, so its log-probabilities would be wrong. Only models whose logits are their unembedding applied "
            "to their hidden states can be im_rm or ex_grm."
        )
