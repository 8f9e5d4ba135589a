"""Metrics of an evaluation set from its per-pair rewards: pure numpy in float64.

Shapes: P pairs.
"""

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]

METRICS = ("accuracy", "loss", "abs_margin", "chosen_reward", "rejected_reward", "n")


def accuracy(chosen_P: Rewards, rejected_P: Rewards) -> float:
    """Share of pairs ranked right; a tie counts one half."""
    return float(np.mean((chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)))


def loss(chosen_P: Rewards, rejected_P: Rewards) -> float:
    """Mean of −ln σ(r⁺ − r⁻), computed without overflow."""
    return float(np.mean(np.logaddexp(0.0, rejected_P - chosen_P)))


def absolute_margin(chosen_P: Rewards, rejected_P: Rewards) -> float:
    """Mean |r⁺ − r⁻| over the unbiased standard deviation of all 2P rewards (paper §4: iid Gaussian gives 2/√π)."""
    spread = float(np.std(np.concatenate([chosen_P, rejected_P]), ddof=1))
    gap = float(np.mean(np.abs(chosen_P - rejected_P)))
    return gap / spread if spread > 0 else 0.0


def summary(chosen_P: Rewards, rejected_P: Rewards) -> dict[str, float]:
    """Every metric of one evaluation set."""
    values = (
        accuracy(chosen_P, rejected_P),
        loss(chosen_P, rejected_P),
        absolute_margin(chosen_P, rejected_P),
        float(np.mean(chosen_P)),
        float(np.mean(rejected_P)),
        float(len(chosen_P)),
    )
    return dict(zip(METRICS, values, strict=True))


def chance_bound(pairs: int) -> float:
    """Accuracy on `pairs` training pairs up to which a model counts as not learned: two standard errors above ½.

    With four pairs or fewer only all right is learned.
    """
    return min(0.999, 0.5 + 2.0 * (0.25 / pairs) ** 0.5)
