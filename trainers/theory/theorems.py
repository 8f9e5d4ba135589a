"""The paper's two theorems on finite sets and tiny vocabularies (paper §5), in float64.

Shapes: N responses, P pairs, D hidden, V vocabulary.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainers.evaluate.metrics import accuracy
from trainers.theory.representations import separator

_VOCABULARY = 8


def theorem_1(
    betas: Sequence[float],
    deltas: Sequence[float],
    masses: Sequence[float],
    responses: int = 500,
    correct: int = 10,
) -> list[dict[str, float]]:
    """Verify Theorem 1's policy, π ∝ π_ref exp((δ/β)·1[y ∈ C]), at every β, δ and probability that π_ref is right: one row each.

    `margin` is that of its IM-RM between correct and incorrect responses, `log_correct` is ln π(C), and `log_bound`
    ln(e^{δ/β} π_ref(C)).
    """
    generator = torch.Generator().manual_seed(0)
    correct_N = torch.arange(responses) < correct
    rows = []
    for mass in masses:
        log_reference_N = torch.randn(responses, generator=generator, dtype=torch.float64)
        for members_N, share in ((correct_N, mass), (~correct_N, 1 - mass)):
            log_reference_N[members_N] += math.log(share) - torch.logsumexp(log_reference_N[members_N], 0)
        log_reference_correct = float(torch.logsumexp(log_reference_N[correct_N], 0))
        for beta, delta in itertools.product(betas, deltas):
            log_policy_N = (log_reference_N + (delta / beta) * correct_N.double()).log_softmax(0)
            reward_N = beta * (log_policy_N - log_reference_N)
            rows.append(
                {
                    "beta": beta,
                    "delta": delta,
                    "mass": mass,
                    "margin": float(reward_N[correct_N].min() - reward_N[~correct_N].max()),
                    "log_correct": float(torch.logsumexp(log_policy_N[correct_N], 0)),
                    "log_reference_correct": log_reference_correct,
                    "log_bound": delta / beta + log_reference_correct,
                }
            )
    return rows


class TokenPairs(NamedTuple):
    """Pairs of one-token answers: the state before the answer, the two tokens, and h⁺ − h⁻ of the states after."""

    prompt_PD: Tensor
    chosen_P: Tensor
    rejected_P: Tensor
    difference_PD: Tensor


def single_token_world(
    *, pairs: int, width: int, seed: int, noise: float = 0.5
) -> tuple[TokenPairs, TokenPairs]:
    """Draw Theorem 2's setting with fixed hidden states: the pairs seen in training, and unseen ones, which share no token.

    A token moves the state after it by ± 1 along a direction, with Gaussian `noise`. Two agreeing and two disagreeing
    tokens are seen in training, as many of each are not.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    direction_D = draw(width)
    direction_D = direction_D / direction_D.norm()

    def made(first_word: int) -> TokenPairs:
        return TokenPairs(
            prompt_PD=draw(pairs, width),
            chosen_P=first_word + torch.randint(0, 2, (pairs,), generator=generator),
            rejected_P=first_word + 2 + torch.randint(0, 2, (pairs,), generator=generator),
            difference_PD=2 * direction_D + noise * draw(pairs, width),
        )

    return made(0), made(4)


def descend_explicit(
    difference_PD: Tensor, *, steps: int = 10_000, step_size: float = 0.5
) -> tuple[Tensor, float]:
    """Gradient descent of a head from u = 0 on the mean of −ln σ(⟨u, h⁺ − h⁻⟩): the head, and the logarithm of the loss.

    Each step is divided by the loss: the direction of plain steps converges with the logarithm of their number only,
    that of these with their number.
    """
    head_D = torch.zeros(difference_PD.shape[1], dtype=torch.float64)
    for _ in range(steps):
        margin_P = difference_PD @ head_D
        # Gradient over loss, by logarithms: both soon underflow.
        pull_P = (logsigmoid(-margin_P) - torch.logsumexp(_log_losses(margin_P), 0)).exp()
        head_D = head_D + step_size * (pull_P[:, None] * difference_PD).sum(0)
    log_loss_P = _log_losses(difference_PD @ head_D)
    return head_D, float(torch.logsumexp(log_loss_P, 0)) - math.log(len(log_loss_P))


def _log_losses(margin_P: Tensor) -> Tensor:
    """ln(−ln σ(m)), which tends to −m."""
    return torch.where(margin_P > 30, -margin_P, (-logsigmoid(margin_P.clamp(max=30))).log())


def descend_implicit(
    seen: TokenPairs,
    unseen: TokenPairs,
    *,
    seed: int,
    beta: float = 0.5,
    steps: int = 300,
    step_size: float = 5.0,
) -> tuple[Tensor, float]:
    """IM-RM reward differences of the unseen pairs after gradient descent on the unembedding, and the final loss.

    The unembedding starts at random values, which are the reference's.
    """
    generator = torch.Generator().manual_seed(seed)
    width = seen.prompt_PD.shape[1]
    initial_VD = torch.randn(_VOCABULARY, width, generator=generator, dtype=torch.float64)
    unembedding_VD = initial_VD.clone().requires_grad_()

    def differences(weight_VD: Tensor, pairs: TokenPairs) -> Tensor:
        log_probs_PV = torch.log_softmax(pairs.prompt_PD @ weight_VD.T, dim=1)
        chosen_P, rejected_P = (
            log_probs_PV.gather(1, token_P[:, None])[:, 0] for token_P in (pairs.chosen_P, pairs.rejected_P)
        )
        return chosen_P - rejected_P

    reference_P = differences(initial_VD, seen)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = -logsigmoid(beta * (differences(unembedding_VD, seen) - reference_P)).mean()
        (gradient_VD,) = torch.autograd.grad(loss, unembedding_VD)
        with torch.no_grad():
            unembedding_VD -= step_size * gradient_VD
    # The normaliser is the same for both tokens. Without it, differences that did not change are not rounded.
    change_VD = unembedding_VD.detach() - initial_VD
    change_P = ((change_VD[unseen.chosen_P] - change_VD[unseen.rejected_P]) * unseen.prompt_PD).sum(1)
    return beta * change_P, float(loss.detach())


def theorem_2(pairs: int, width: int, seed: int) -> dict[str, float]:
    """Train both reward models in one random world, and return the results."""
    seen, unseen = single_token_world(pairs=pairs, width=width, seed=seed)
    difference_P, loss = descend_implicit(seen, unseen, seed=seed)
    head_D, log_loss = descend_explicit(seen.difference_PD)
    separator_D = separator(seen.difference_PD)

    def ranked_right(difference_P: Tensor) -> float:
        return accuracy(difference_P.numpy(), np.zeros(len(difference_P)))

    return {
        "seed": seed,
        "im_rm_training_loss": loss,
        "im_rm_largest_unseen_difference": float(difference_P.abs().max()),
        "im_rm_unseen_accuracy": ranked_right(difference_P),
        "ex_rm_log_training_loss": log_loss,
        "ex_rm_cosine": float(head_D @ separator_D / head_D.norm()),
        "ex_rm_unseen_accuracy": ranked_right(unseen.difference_PD @ head_D),
        "separator_unseen_accuracy": ranked_right(unseen.difference_PD @ separator_D),
    }
