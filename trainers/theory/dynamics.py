"""How one gradient step on one pair changes the reward of another response (paper §5), hidden states fixed.

Shapes: P pairs, K tokens of the response that is looked at, L tokens of one that is trained on, D hidden, V vocabulary.
A response of an IM-RM is the hidden states before each of its tokens, and the tokens; of an EX-RM, its last hidden
state. g = σ(r⁻ − r⁺) of the pair that is trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainers.theory.states import PairStates


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
