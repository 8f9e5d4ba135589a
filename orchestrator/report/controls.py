"""EX−IM pair by pair with what could account for it taken away: length, leaks; and what it goes with, by regression.

Intervals are of a bootstrap over test pairs, given the models and seeds that were run. A set and its rewritings share
their pairs. Shapes: P pairs, U different pairs, B draws, K terms of a regression.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.report.per_pair import SetOutcomes
from orchestrator.report.statistics import (
    DRAWS,
    Estimate,
    Floats,
    difference_estimate,
    estimate,
    generator,
    pair_counts,
    unanimous_bound,
)
from orchestrator.spec.trials import CATEGORIES, Category
from trainers.metrics import length_strata

# A draw whose normal equations are worse conditioned says nothing.
_SINGULAR = 1e10


@dataclass(frozen=True, slots=True, kw_only=True)
class Controlled:
    """EX−IM of accuracy over the sets of a category: as it is, at matched lengths, and on pairs that training has not seen.

    None where it cannot be estimated: a set whose chosen responses are all longer, or all of whose pairs leaked.
    """

    train_set: str
    category: Category
    sets: tuple[str, ...]
    models: tuple[str, ...]
    pairs: int
    unseen: int | None
    plain: Estimate
    length: Estimate | None
    leak_free: Estimate | None


def controlled(outcomes: Sequence[SetOutcomes]) -> list[Controlled]:
    """One per training set and category, in the report's order; the mean over a category's sets."""
    return [_controlled(found) for found in by_category(outcomes)]


def by_category(outcomes: Sequence[SetOutcomes]) -> list[list[SetOutcomes]]:
    """The sets of each training set and category."""
    groups: dict[tuple[str, Category], list[SetOutcomes]] = {}
    for item in outcomes:
        groups.setdefault((item.train_set, item.category), []).append(item)
    return sorted(groups.values(), key=lambda found: CATEGORIES.index(found[0].category))


def drawn_pairs(outcomes: Sequence[SetOutcomes], draws: int = DRAWS) -> list[Floats]:
    """How often each pair of each set is drawn, [B, P]: the same pairs of a set and of its rewritings."""
    groups: dict[str, list[SetOutcomes]] = {}
    for item in outcomes:
        groups.setdefault(_unit_of(item), []).append(item)
    units = {
        name: np.unique(np.concatenate([item.index for item in found])) for name, found in groups.items()
    }
    counts = {
        name: pair_counts(len(found_U), draws, generator("pairs", name)) for name, found_U in units.items()
    }
    return [
        counts[_unit_of(item)][:, np.searchsorted(units[_unit_of(item)], item.index)] for item in outcomes
    ]


def _unit_of(item: SetOutcomes) -> str:
    own = item.category not in ("in-distribution", "token-level shift")
    return item.dataset if own else item.train_set


def _controlled(found: Sequence[SetOutcomes]) -> Controlled:
    counts = drawn_pairs(found)
    first, pairs = found[0], max(len(item.index) for item in found)
    known = [item.leaked for item in found if item.leaked is not None]
    unseen = None if len(known) < len(found) else int(sum((~leaked).sum() for leaked in known))

    def over_sets(values: Sequence[Floats | None]) -> Estimate | None:
        """Of [1 + B] values by set, the first of which is that of all pairs."""
        whole = [value for value in values if value is not None and np.isfinite(value[0])]
        if len(whole) < len(found):
            return None
        mean = np.mean(whole, axis=0)
        return gap_estimate(float(mean[0]), mean[1:], pairs)

    weighted = [
        np.vstack([np.ones(len(item.index)), drawn]) for item, drawn in zip(found, counts, strict=True)
    ]
    both = list(zip(found, weighted, strict=True))
    plain = over_sets([_mean(item.gap, drawn) for item, drawn in both])
    assert plain is not None
    return Controlled(
        train_set=first.train_set,
        category=first.category,
        sets=tuple(item.dataset for item in found),
        models=first.models,
        pairs=pairs,
        unseen=unseen,
        plain=plain,
        length=over_sets([length_controlled(item.gap, item.longer, drawn) for item, drawn in both]),
        leak_free=over_sets([_leak_free(item, drawn) for item, drawn in both]),
    )


def gap_estimate(value: float, draws_B: Floats, pairs: int, seed_values: Sequence[float] = ()) -> Estimate:
    """A difference of accuracies, with `unanimous_bound` where all pairs agree: on no difference, or on one type alone."""
    # Equal means may differ in their last bit.
    found = difference_estimate(round(value, 12), np.round(draws_B, 12), pairs, seed_values)
    if abs(found.value) < 1.0:
        return found
    inner = found.value * (1.0 - unanimous_bound(pairs))
    return replace(found, low=min(found.low, inner), high=max(found.high, inner))


def _mean(values_P: Floats, counts_BP: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        found: Floats = counts_BP @ values_P / counts_BP.sum(axis=1)
    return found


def _leak_free(item: SetOutcomes, counts_BP: Floats) -> Floats | None:
    if item.leaked is None or item.leaked.all():
        return None
    return _mean(item.gap[~item.leaked], counts_BP[:, ~item.leaked])


def length_controlled(values_P: Floats, longer_P: Floats, counts_BP: Floats) -> Floats | None:
    """The mean of `values_P` in each draw, [B], with the weights of `metrics.accuracy_length_controlled`.

    The strata are those of all pairs. None where length and preference cannot be told apart.
    """
    if not longer_P.any():
        return _mean(values_P, counts_BP)
    strata_P = length_strata(longer_P)
    if strata_P is None:
        return None
    equal_P = longer_P == 0
    total_B = counts_BP[:, equal_P] @ values_P[equal_P]
    for stratum in np.unique(strata_P[~equal_P]):
        here_P = (strata_P == stratum) & ~equal_P
        sides = [
            _mean(values_P[here_P & side_P], counts_BP[:, here_P & side_P])
            for side_P in (longer_P > 0, longer_P < 0)
        ]
        total_B = total_B + counts_BP[:, here_P].sum(axis=1) * (sides[0] + sides[1]) / 2
    found: Floats = total_B / counts_BP.sum(axis=1)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """Least squares of a number that each pair has: its change by one standard deviation of each feature.

    `left_out` are features that do not vary, or that others say already. `explained` is R².
    """

    coefficients: dict[str, Estimate]
    left_out: tuple[str, ...]
    explained: float
    pairs: int


def regression(values_P: Floats, features: Mapping[str, Floats], counts_BP: Floats) -> Regression | None:
    """Intercept and features by their standard deviation, in every draw; None where fewer pairs than terms are there."""
    columns, kept, left_out = [np.ones(len(values_P))], list[str](), list[str]()
    for name, feature_P in features.items():
        spread = float(feature_P.std())
        if spread > 0:
            column_P = (feature_P - feature_P.mean()) / spread
            if np.linalg.matrix_rank(np.stack([*columns, column_P], axis=1)) == len(columns) + 1:
                columns.append(column_P)
                kept.append(name)
                continue
        left_out.append(name)
    terms_PK = np.stack(columns, axis=1)
    if len(values_P) <= terms_PK.shape[1]:
        return None
    all_P = np.ones((1, len(values_P)))
    (value_K,), draws_BK = (_least_squares(values_P, terms_PK, weights) for weights in (all_P, counts_BP))
    left_P = values_P - terms_PK @ value_K
    total = float(((values_P - values_P.mean()) ** 2).sum())
    return Regression(
        coefficients={
            name: estimate(float(value_K[number]), draws_BK[:, number])
            for number, name in enumerate(("intercept", *kept))
        },
        left_out=tuple(left_out),
        explained=1.0 - float((left_P**2).sum()) / total if total > 0 else 0.0,
        pairs=len(values_P),
    )


def _least_squares(values_P: Floats, terms_PK: Floats, weights_BP: Floats) -> Floats:
    """Coefficients under each row of weights, [B, K]; not a number where a row leaves them open."""
    pairs, terms = terms_PK.shape
    products = (terms_PK[:, :, None] * terms_PK[:, None, :]).reshape(pairs, terms * terms)
    normal_BKK = (weights_BP @ products).reshape(-1, terms, terms)
    right_BK = weights_BP @ (terms_PK * values_P[:, None])
    sound_B: NDArray[np.bool_] = np.linalg.cond(normal_BKK) < _SINGULAR
    found = np.full((len(weights_BP), terms), np.nan)
    found[sound_B] = np.linalg.solve(normal_BKK[sound_B], right_BK[sound_B][:, :, None])[:, :, 0]
    return found
