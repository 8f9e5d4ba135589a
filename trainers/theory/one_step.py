"""One gradient step of a real model on one pair, undone afterwards: what it changed for others, beside the formulas.

A step is plain gradient descent through the trainer's own scoring and loss: on the output layer alone, as the formulas
have it (hidden states fixed), or on all weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers.evaluate.scoring import score_pairs
from trainers.models.attention import shared_tokens
from trainers.models.layouts import layout_of
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import References, collate
from trainers.pairs.tokens import TokenPair

Margins = dict[str, NDArray[np.float64]]


def margins(reward: RewardModule, sets: Mapping[str, Sequence[TokenPair]]) -> Margins:
    """r⁺ − r⁻ of every pair of every set. The reference's part, which no step changes, is left out."""
    found: Margins = {}
    for name, pairs in sets.items():
        chosen, rejected = score_pairs(
            reward, pairs, reference=_nothing(pairs) if reward.spec.uses_reference else None, report=_silent
        )
        found[name] = chosen - rejected
    return found


def _nothing(pairs: Sequence[TokenPair]) -> References:
    return {pair.index: (0.0, 0.0) for pair in pairs}


def _silent(row: dict[str, Any]) -> None:
    """Take a progress row and ignore it."""


@contextmanager
def stepped(
    reward: RewardModule, pair: TokenPair, weights: Sequence[Tensor], step_size: float
) -> Iterator[float]:
    """The model after one step of `weights` on `pair`, from which its reference is what it is now; yields g.

    So the rewards of an IM-RM start at 0, and g at ½.
    """
    model = reward.model
    batch = collate(
        [pair],
        layout=layout_of(model),
        shared_tokens=shared_tokens(model),
        reference=_own(reward, pair),
        device=str(model.device),
    )
    reward.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    scores = reward(batch)
    gradients = torch.autograd.grad(scores.loss_P.sum(), list(weights), allow_unused=True)
    pull = float(torch.sigmoid(scores.rejected_P - scores.chosen_P).detach())
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight -= step_size * gradient
    try:
        yield pull
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def _own(reward: RewardModule, pair: TokenPair) -> References | None:
    from trainers.evaluate.scoring import compute_reference

    return compute_reference(reward.model, [pair], report=_silent) if reward.spec.uses_reference else None
