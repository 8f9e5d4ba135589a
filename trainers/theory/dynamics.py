"""How one gradient step on one pair changes the reward of another response (paper §5), hidden states fixed.

Shapes: K tokens of the response that is looked at, L tokens of one that is trained on, D hidden, V vocabulary.
A response of an IM-RM is the hidden states before each of its tokens, and the tokens; of an EX-RM, its last hidden
state. g = σ(r⁻ − r⁺) of the pair that is trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainers.theory.states import PairStates, differences


class Tokens(NamedTuple):
    """A response to an IM-RM: the hidden state before each token, the token, and e_token − π."""

    hidden_KD: Tensor
    target_K: Tensor
    residual_KV: Tensor


class Change(NamedTuple):
    """A predicted change of reward: the part from pairs of equal tokens, and the part from pairs of different ones."""

    matches: float
    others: float

    @property
    def total(self) -> float:
        """The sum of both parts."""
        return self.matches + self.others


def tokens_of(unembedding_VD: Tensor, hidden_KD: Tensor, target_K: Tensor) -> Tokens:
    """The response under π = softmax(U h)."""
    residual_KV = -torch.softmax(hidden_KD @ unembedding_VD.T, dim=1)
    residual_KV[torch.arange(len(target_K)), target_K] += 1
    return Tokens(hidden_KD, target_K, residual_KV)


def explicit_change(
    hidden_D: Tensor, chosen_D: Tensor, rejected_D: Tensor, *, weight: float, step_size: float
) -> float:
    """EX-RM, exact: η g ⟨h, h⁺ − h⁻⟩."""
    return step_size * weight * float(hidden_D @ (chosen_D - rejected_D))


def rho(left: Tokens, right: Tokens) -> Tensor:
    """ρ_kl = ⟨e_k − π_k, e_l − π_l⟩ ∈ [−2, 2], [K, L]; at least 0 for equal tokens, at most 1 for different ones."""
    return left.residual_KV @ right.residual_KV.T


def implicit_change(
    response: Tokens, chosen: Tokens, rejected: Tokens, *, beta: float, weight: float, step_size: float
) -> Change:
    """IM-RM, to first order in η: η β² g [Σ ρ_kl(y⁺) ⟨h_k, h_l⁺⟩ − Σ ρ_kl(y⁻) ⟨h_k, h_l⁻⟩]."""
    matches = others = 0.0
    for sign, trained in ((1.0, chosen), (-1.0, rejected)):
        term_KL = rho(response, trained) * (response.hidden_KD @ trained.hidden_KD.T)
        equal_KL = response.target_K[:, None] == trained.target_K[None, :]
        matches += sign * float(term_KL[equal_KL].sum())
        others += sign * float(term_KL[~equal_KL].sum())
    scale = step_size * beta**2 * weight
    return Change(scale * matches, scale * others)


def explicit_changes(
    unseen: Sequence[PairStates], trained: PairStates, *, weight: float, step_size: float
) -> list[Change]:
    """Return the change of an EX-RM's r⁺ − r⁻ for each unseen pair; it does not depend on tokens."""
    how = {"weight": weight, "step_size": step_size}
    return [
        Change(0.0, explicit_change(hidden_D, trained.chosen_D, trained.rejected_D, **how))
        for hidden_D in differences(unseen)
    ]


def implicit_changes(
    unseen: Sequence[PairStates],
    trained: PairStates,
    unembedding_VD: Tensor,
    *,
    beta: float,
    weight: float,
    step_size: float,
) -> list[Change]:
    """Return the change of an IM-RM's r⁺ − r⁻ for each unseen pair."""
    sides = [
        tokens_of(unembedding_VD, *tokens) for tokens in (trained.chosen_tokens, trained.rejected_tokens)
    ]
    found = []
    for item in unseen:
        chosen, rejected = (
            implicit_change(
                tokens_of(unembedding_VD, *tokens), *sides, beta=beta, weight=weight, step_size=step_size
            )
            for tokens in (item.chosen_tokens, item.rejected_tokens)
        )
        found.append(Change(chosen.matches - rejected.matches, chosen.others - rejected.others))
    return found
