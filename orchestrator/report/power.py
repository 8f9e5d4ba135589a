"""The power of a sweep's design: the difference that it detects in 80 % of such sweeps, and the variances behind it.

Shapes: U pairs, S seeds of a model.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.report import statistics
from orchestrator.report.by_axis import reward_without
from orchestrator.report.comparison import Analysis, Mean, Scope
from orchestrator.report.statistics import LEVEL, Floats
from orchestrator.report.tables import Table, Value
from orchestrator.store.records import CATEGORIES

POWER = 0.80


def asked(analysis: Analysis) -> dict[tuple[Scope, str], Mean]:
    """Return the differences that a sweep is about: baseline − first other reward type, by training set and category.

    A type that differs from the baseline only in the value of an axis counts only where there is no other type.
    """
    records = (result.record for result in analysis.results)
    types = {record.reward: reward_without(record, *record.axes) for record in records}
    first = [kind for kind in analysis.others if types[kind] != types[analysis.baseline]] or analysis.others
    return {place: found for place, found in analysis.differences().items() if place[1] == first[0]}


def half_width(found: Mean) -> float:
    """Return the half-width of its interval; if a bound cuts one side off, that of the other side."""
    return max(found.estimate.high - found.estimate.value, found.estimate.value - found.estimate.low)


def detectable(found: Mean) -> float | None:
    """Return the difference that is detected with 80 % power; None if there is one training of each model."""
    from scipy.special import stdtrit

    if not found.spread.trainings:
        return None
    # If no training differs from another, the interval is that of the pairs.
    degrees = found.spread.degrees if found.spread.variance else found.pairs
    most, power = (float(stdtrit(degrees, quantile)) for quantile in ((1 + LEVEL) / 2, POWER))
    return half_width(found) * (1 + power / most)


def components(strata: Sequence[Floats], groups_U: NDArray[np.int64]) -> dict[str, float | None]:
    """Estimate by moments the variances that models, trainings and pairs contribute to a mean over models.

    Each of `strata`, [U, S], holds what each pair adds in the trainings of a model. A variance is None if it needs a second
    model, or a second seed. Together they make up the variance of `statistics.crossed`.
    """
    each = sum(1 / values_US.shape[1] for values_US in strata) / len(strata)
    trainings, within, both_seeds = statistics.of_trainings(strata, groups_U)
    seeds = max(0.0, within - both_seeds)
    means_UM = np.stack([values_US.mean(axis=1) for values_US in strata], axis=1)
    others, between, both = statistics.of_trainings([means_UM], groups_U)
    both_models = max(0.0, both - both_seeds * each)
    pairs = statistics.of_pairs(means_UM.mean(axis=1, keepdims=True), groups_U)
    return {
        "models": max(0.0, between - both - seeds * each) if others else None,
        "seeds": seeds if trainings else None,
        "pairs": max(0.0, pairs - (both_models + both_seeds * each) / len(strata)),
        "pairs_models": both_models,
        "pairs_seeds": both_seeds if trainings else None,
    }


def power_table(analysis: Analysis) -> Table:
    """Return the half-width of each difference, the difference that the design detects, and the variances behind it."""
    rows: list[dict[str, Value]] = [
        {
            "train_set": scope.train_set,
            "category": scope.category,
            "difference": analysis.title(other),
            "over": found.over,
            "half_width": half_width(found),
            "detectable": detectable(found),
            **{name: part and part**0.5 for name, part in components(*found.columns).items()},
        }
        for (scope, other), found in asked(analysis).items()
    ]
    return Table(
        name="power",
        title="What this design can tell apart",
        note="Half-width of the 95 % interval, and the difference that a sweep of this design detects with 80 % power. Beside them the standard "
        "deviations of the difference over models, over seeds of a model, and over draws of as many test pairs. How many seeds and "
        "pairs it takes: docs/design.md.",
        columns="train_set category difference over half_width detectable models seeds pairs",
        titles={"half_width": "± half", "detectable": "detected with 80 % power"}
        | {name: f"SD, {name}" for name in ("models", "seeds", "pairs")},
        rows=sorted(rows, key=lambda row: CATEGORIES.index(row["category"])),
    )
