"""The hidden states of a real model that the formulas need: those at a response's last token, and before each of its tokens.

Shapes: P pairs, K response tokens, D hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainers.errors import ModelError
from trainers.evaluate.scoring import scoring_batches
from trainers.models.reward_parts import hidden_states
from trainers.pairs.tokens import TokenPair


class PairStates(NamedTuple):
    """A pair's hidden states: the last of each response, [D], and those before its tokens with the tokens, [K, D], [K]."""

    chosen_D: Tensor
    rejected_D: Tensor
    chosen_tokens: tuple[Tensor, Tensor]
    rejected_tokens: tuple[Tensor, Tensor]


def pair_states(model: Any, pairs: Sequence[TokenPair]) -> list[PairStates]:
    """The states of each pair, in the order of `pairs`, on the CPU."""
    found: dict[int, PairStates] = {}
    for batch in scoring_batches(model, pairs):
        with torch.inference_mode():
            hidden_ND = hidden_states(model, batch)
        last_RD = hidden_ND[batch.last_R].cpu().clone()
        before_MD = hidden_ND[batch.predictor_M].cpu().clone()
        target_M, owner_M = batch.target_M.cpu(), batch.owner_M.cpu()
        count = len(batch.indices)
        for place, index in enumerate(batch.indices):
            chosen_M, rejected_M = owner_M == place, owner_M == place + count
            found[index] = PairStates(
                last_RD[place],
                last_RD[place + count],
                (before_MD[chosen_M], target_M[chosen_M]),
                (before_MD[rejected_M], target_M[rejected_M]),
            )
    return [found[pair.index] for pair in pairs]


def differences(states: Sequence[PairStates]) -> Tensor:
    """D = h⁺ − h⁻ at the last token, [P, D]."""
    return torch.stack([item.chosen_D - item.rejected_D for item in states])


def plain_unembedding(model: Any) -> Tensor:
    """U of π = softmax(U h), [V, D], on the CPU. Raises ModelError where the model's π is another function."""
    layer = model.get_output_embeddings()
    if layer.bias is not None or layer.softcap is not None or layer.scale != 1:
        raise ModelError(
            f"a {type(model).__name__} has biased, scaled or soft-capped logits, for which the formula does not hold; "
            "name a model whose π is softmax(U h)."
        )
    weight: Tensor = layer.weight.detach().cpu().clone()
    return weight
