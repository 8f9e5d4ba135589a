"""Metrics of an evaluation set from its per-pair rewards: pure numpy in float64.

Shapes: P pairs, M models.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]

METRICS = ("accuracy", "loss", "abs_margin", "chosen_reward", "rejected_reward", "n")
# Derived when scores are read; a value that cannot be estimated is left out.
CONTROLLED = ("accuracy_length_controlled", "longer_wins", "accuracy_leak_free", "n_leak_free")

# The length-controlled accuracy: strata by the difference in length, and pairs that each needs on either side.
STRATA = 5
PAIRS_PER_SIDE = 5


def accuracy(chosen_P: Rewards, rejected_P: Rewards) -> float:
    """Return the share of pairs that are ranked right; a tie counts one half."""
    return float(np.mean((chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)))


def loss(chosen_P: Rewards, rejected_P: Rewards) -> float:
    """Return the mean of −ln σ(r⁺ − r⁻), computed without overflow."""
    return float(np.mean(np.logaddexp(0.0, rejected_P - chosen_P)))


def absolute_margin(chosen_P: Rewards, rejected_P: Rewards) -> float:
    """Return the mean |r⁺ − r⁻| over the unbiased standard deviation of all 2P rewards (paper §4).

    Rewards that are independent and Gaussian give 2/√π.
    """
    spread = float(np.std(np.concatenate([chosen_P, rejected_P]), ddof=1))
    gap = float(np.mean(np.abs(chosen_P - rejected_P)))
    return gap / spread if spread > 0 else 0.0


def summary(chosen_P: Rewards, rejected_P: Rewards) -> dict[str, float]:
    """Return every metric of one evaluation set."""
    values = (
        accuracy(chosen_P, rejected_P),
        loss(chosen_P, rejected_P),
        absolute_margin(chosen_P, rejected_P),
        float(np.mean(chosen_P)),
        float(np.mean(rejected_P)),
        float(len(chosen_P)),
    )
    return dict(zip(METRICS, values, strict=True))


class Ensemble(NamedTuple):
    """An ensemble of reward models: their mean rewards, and how much the models differ, per pair and overall."""

    chosen: Rewards
    rejected: Rewards
    spreads: dict[str, Rewards]
    summary: dict[str, float]


def ensemble(chosen_MP: Rewards, rejected_MP: Rewards) -> Ensemble:
    """Average the rewards of M ≥ 2 models (Coste et al., 2023) without scaling: all are log-odds.

    Spreads are standard deviations over the models. A constant that is added to all rewards of a model changes no
    preference, so each model's mean reward is subtracted first. `accuracy_alone` is the mean of the models' own accuracies.
    """
    level_M1 = (chosen_MP + rejected_MP).mean(axis=1, keepdims=True) / 2
    apart = {
        "chosen_spread": chosen_MP - level_M1,
        "rejected_spread": rejected_MP - level_M1,
        "margin_spread": chosen_MP - rejected_MP,
    }
    spreads = {name: np.std(values_MP, axis=0, ddof=1) for name, values_MP in apart.items()}
    accuracies = [accuracy(*both) for both in zip(chosen_MP, rejected_MP, strict=True)]
    numbers = {
        "models": float(len(accuracies)),
        "accuracy_alone": float(np.mean(accuracies)),
        "accuracy_spread": float(np.std(accuracies, ddof=1)),
        "margin_spread": float(np.mean(spreads["margin_spread"])),
    }
    return Ensemble(chosen_MP.mean(axis=0), rejected_MP.mean(axis=0), spreads, numbers)


def accuracy_length_controlled(
    chosen_P: Rewards, rejected_P: Rewards, longer_P: NDArray[np.int64]
) -> float | None:
    """Return the accuracy as if the longer response were as often the chosen as the rejected one, by matched strata.

    `longer_P` is by how much the chosen response is longer, in tokens. Pairs of unequal lengths are sorted by
    |difference| into strata (five, or fewer, so that each holds five pairs whose chosen response is longer and five
    whose chosen response is shorter); a stratum counts the mean of its accuracies on the two sides, by its pairs.
    Pairs of equal length count as they are. Any reward that is monotone in length alone gets exactly ½ from pairs
    of unequal lengths. None where one side has under five pairs: then length and preference cannot be told apart.
    """
    wins_P = (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)
    found = length_controlled(wins_P, longer_P, np.ones((1, len(wins_P))))
    return None if found is None else float(found[0])


def length_controlled(
    values_P: Rewards, longer_P: NDArray[Any], weights_BP: Rewards
) -> NDArray[np.float64] | None:
    """Return that mean of any values of pairs, [B], one for each row of weights.

    The strata are those of all pairs; NaN where a row has weights on only one side of a stratum.
    """
    parts = [longer_P == 0]
    if longer_P.any():
        strata_P = length_strata(longer_P)
        if strata_P is None:
            return None
        parts += [(strata_P == stratum) & (longer_P != 0) for stratum in np.unique(strata_P[longer_P != 0])]
    total_B = weights_BP[:, parts[0]] @ values_P[parts[0]]
    with np.errstate(invalid="ignore"):
        for here_P in parts[1:]:
            sides = [here_P & (longer_P > 0), here_P & (longer_P < 0)]
            means = [
                weights_BP[:, side_P] @ values_P[side_P] / weights_BP[:, side_P].sum(axis=1)
                for side_P in sides
            ]
            total_B = total_B + weights_BP[:, here_P].sum(axis=1) * (means[0] + means[1]) / 2
        found: NDArray[np.float64] = total_B / weights_BP.sum(axis=1)
    return found


def length_strata(longer_P: NDArray[Any]) -> NDArray[np.int64] | None:
    """Return the stratum of each pair by |difference|, or None where not even one has enough pairs of both sides."""
    size_P = np.abs(longer_P)
    for parts in range(STRATA, 0, -1):
        inner = np.quantile(size_P[longer_P != 0], np.arange(1, parts) / parts)
        strata_P = np.digitize(size_P, np.unique(inner), right=True)
        sides = [np.unique(strata_P[side_P], return_counts=True) for side_P in (longer_P > 0, longer_P < 0)]
        wanted = len(np.unique(strata_P[longer_P != 0]))
        if all(len(found) == wanted and counts.min() >= PAIRS_PER_SIDE for found, counts in sides):
            return strata_P
    return None


def controlled(
    chosen_P: Rewards,
    rejected_P: Rewards,
    longer_P: NDArray[np.int64],
    leaked_P: NDArray[np.bool_] | None,
) -> dict[str, float]:
    """Return accuracies that length and leaks do not help; `leaked_P` is None where training rows are not known.

    Values that cannot be estimated are left out.
    """
    found: dict[str, float | None] = {
        "accuracy_length_controlled": accuracy_length_controlled(chosen_P, rejected_P, longer_P),
        # The accuracy of the rule that the longer response wins.
        "longer_wins": accuracy(longer_P.astype(float), np.zeros(len(longer_P))),
    }
    if leaked_P is not None:
        unseen = ~leaked_P
        found["n_leak_free"] = float(unseen.sum())
        if unseen.any():
            found["accuracy_leak_free"] = accuracy(chosen_P[unseen], rejected_P[unseen])
    return {name: value for name, value in found.items() if value is not None}


def chance_bound(pairs: float) -> float:
    """Return the accuracy on `pairs` training pairs up to which nothing counts as learned: two standard errors above ½.

    With four pairs or fewer, all of them must be right.
    """
    return min(0.999, 0.5 + 2.0 * (0.25 / pairs) ** 0.5)
