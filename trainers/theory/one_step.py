"""One gradient step of a real model on one pair, undone afterwards: measured changes of other pairs, beside the formulas'.

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

from trainers.evaluate.scoring import compute_reference, score_pairs
from trainers.models.attention import shared_tokens
from trainers.models.layouts import layout_of
from trainers.models.loading import freeze
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import collate
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec
from trainers.theory.dynamics import explicit_change, implicit_changes
from trainers.theory.states import differences, pair_states, plain_unembedding

Margins = dict[str, NDArray[np.float64]]


def changes(
    model: Any,
    spec: RewardSpec,
    trained_on: Sequence[TokenPair],
    unseen: Mapping[str, Sequence[TokenPair]],
    step_size: float,
) -> list[dict[str, Any]]:
    """Return the predicted and measured change of r⁺ − r⁻ of every unseen pair by a step on each training pair."""
    # Tied embeddings would take the step as well, and change the hidden states.
    freeze(model, ("backbone",))
    reward = RewardModule(model, spec)
    implicit = spec.kind == "im_rm"
    layer = model.get_output_embeddings() if implicit else model.score
    unembedding_VD = plain_unembedding(model) if implicit else None
    states = {name: pair_states(model, pairs) for name, pairs in unseen.items()}
    before = margins(reward, unseen)
    rows = []
    for pair in trained_on:
        (own,) = pair_states(model, [pair])
        with stepped(reward, pair, [layer.weight], step_size) as weight:
            measured = margins(reward, unseen)
        with stepped(reward, pair, list(model.parameters()), step_size):
            everything = margins(reward, unseen)
        for name, pairs in unseen.items():
            how = {"weight": weight, "step_size": step_size}
            if unembedding_VD is None:
                unseen_PD = differences(states[name])
                parts = explicit_change(unseen_PD, own.chosen_D, own.rejected_D, **how)[:, None]
            else:
                assert spec.beta is not None
                parts = implicit_changes(states[name], own, unembedding_VD, beta=spec.beta, **how)
            rows += [
                {
                    "trained_on": pair.index,
                    "set": name,
                    "index": other.index,
                    "predicted": sum(part),
                    "token_matches": part[0] if implicit else None,
                    "other_tokens": part[1] if implicit else None,
                    "measured": float(measured[name][place] - before[name][place]),
                    "measured_all_weights": float(everything[name][place] - before[name][place]),
                }
                for place, (other, part) in enumerate(zip(pairs, parts.tolist(), strict=True))
            ]
    return rows


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return how well changes were predicted: the error for the output layer's step, and the correlation for all weights' step.

    Error: ‖measured − predicted‖ / ‖measured‖. Rises: the share of pairs whose r⁺ − r⁻ rises.
    """
    predicted, measured, everything = (
        np.array([row[name] for row in rows]) for name in ("predicted", "measured", "measured_all_weights")
    )
    correlated = len(rows) > 1 and predicted.std() > 0 and everything.std() > 0
    share = None
    if rows[0]["token_matches"] is not None:
        matches, others = (
            np.abs([row[name] for row in rows]).sum() for name in ("token_matches", "other_tokens")
        )
        share = float(matches / (matches + others))
    return {
        "n": float(len(rows)),
        "relative_error": float(np.linalg.norm(measured - predicted) / np.linalg.norm(measured)),
        "predicted_to_rise": float(np.mean(predicted > 0)),
        "rises": float(np.mean(measured > 0)),
        "rises_all_weights": float(np.mean(everything > 0)),
        "correlation_all_weights": float(np.corrcoef(predicted, everything)[0, 1]) if correlated else None,
        "share_of_token_matches": share,
    }


def margins(reward: RewardModule, sets: Mapping[str, Sequence[TokenPair]]) -> Margins:
    """Return r⁺ − r⁻ of every pair of every set, without the reference's part, which no step changes."""
    found: Margins = {}
    for name, pairs in sets.items():
        nothing = {pair.index: (0.0, 0.0) for pair in pairs} if reward.spec.uses_reference else None
        chosen, rejected = score_pairs(reward, pairs, reference=nothing, report=lambda row: None)
        found[name] = chosen - rejected
    return found


@contextmanager
def stepped(
    reward: RewardModule, pair: TokenPair, weights: Sequence[Tensor], step_size: float
) -> Iterator[float]:
    """The model after one step of `weights` on `pair`, from which its reference is what it is now; yields g.

    So the rewards of an IM-RM start at 0, and g at ½.
    """
    model = reward.model
    own = compute_reference(model, [pair], report=lambda row: None) if reward.spec.uses_reference else None
    batch = collate(
        [pair],
        layout=layout_of(model),
        shared_tokens=shared_tokens(model),
        reference=own,
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
