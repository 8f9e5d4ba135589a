"""How one gradient step on one pair changes the rewards of other pairs (paper §5): by formula, and measured in a model.

The formulas hold the hidden states fixed. The measured step is plain gradient descent through the trainer's own scoring
and loss, on the output layer alone as in the formulas or on all weights, and is undone afterwards.

Shapes: P pairs, K tokens of the response that is looked at, L tokens of one that is trained on, D hidden, V vocabulary.
A response of an IM-RM is the hidden states before each of its tokens, and the tokens; of an EX-RM, its last hidden
state. g = σ(r⁻ − r⁺) of the pair that is trained on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from trainers.theory.representations import PairStates, differences, pair_states, plain_unembedding


class Tokens(NamedTuple):
    """A response to an IM-RM: the hidden state before each token, the token, and e_token − π."""

    hidden_KD: Tensor
    target_K: Tensor
    residual_KV: Tensor


def tokens_of(unembedding_VD: Tensor, hidden_KD: Tensor, target_K: Tensor) -> Tokens:
    """The response under π = softmax(U h)."""
    residual_KV = -torch.softmax(hidden_KD @ unembedding_VD.T, dim=1)
    residual_KV[torch.arange(len(target_K)), target_K] += 1
    return Tokens(hidden_KD, target_K, residual_KV)


def explicit_change(
    hidden_PD: Tensor, chosen_D: Tensor, rejected_D: Tensor, *, weight: float, step_size: float
) -> Tensor:
    """EX-RM, exact: η g ⟨h, h⁺ − h⁻⟩ for each hidden state h, [P]."""
    return step_size * weight * hidden_PD @ (chosen_D - rejected_D)


def rho(left: Tokens, right: Tokens) -> Tensor:
    """ρ_kl = ⟨e_k − π_k, e_l − π_l⟩ ∈ [−2, 2], [K, L]; at least 0 for equal tokens, at most 1 for different ones."""
    return left.residual_KV @ right.residual_KV.T


def implicit_change(
    response: Tokens, chosen: Tokens, rejected: Tokens, *, beta: float, weight: float, step_size: float
) -> Tensor:
    """IM-RM, to first order in η: η β² g [Σ ρ_kl(y⁺) ⟨h_k, h_l⁺⟩ − Σ ρ_kl(y⁻) ⟨h_k, h_l⁻⟩].

    Returns two summands, [2]: that of pairs of equal tokens, and that of pairs of different ones.
    """
    parts_2 = torch.zeros(2, dtype=response.hidden_KD.dtype)
    for sign, trained in ((1.0, chosen), (-1.0, rejected)):
        term_KL = rho(response, trained) * (response.hidden_KD @ trained.hidden_KD.T)
        equal_KL = response.target_K[:, None] == trained.target_K[None, :]
        parts_2 += sign * torch.stack([term_KL[equal_KL].sum(), term_KL[~equal_KL].sum()])
    return step_size * beta**2 * weight * parts_2


def implicit_changes(
    unseen: Sequence[PairStates], trained: PairStates, unembedding_VD: Tensor, **how: float
) -> Tensor:
    """Return the summands of the change of an IM-RM's r⁺ − r⁻ for each unseen pair, [P, 2]."""
    chosen, rejected = (
        tokens_of(unembedding_VD, *tokens) for tokens in (trained.chosen_tokens, trained.rejected_tokens)
    )
    return torch.stack(
        [
            implicit_change(tokens_of(unembedding_VD, *item.chosen_tokens), chosen, rejected, **how)
            - implicit_change(tokens_of(unembedding_VD, *item.rejected_tokens), chosen, rejected, **how)
            for item in unseen
        ]
    )


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


def margins(reward: RewardModule, sets: Mapping[str, Sequence[TokenPair]]) -> dict[str, NDArray[np.float64]]:
    """Return r⁺ − r⁻ of every pair of every set, without the reference's part, which no step changes."""
    found = {}
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
