"""Why the reward types differ under domain shift, pair by pair, and when to prefer which; nothing is trained.

The paper sees IM-RMs ahead under domain shift and does not explain it. EX−IM of each test pair, over all models and seeds of
a finished sweep, against what the pair is like: by how much chosen is longer, how much of its tokens the nearest training
pair has, how alike chosen and rejected are, and whether training has seen it. And whether a lead survives matched lengths.

python sweeps/domain_shift.py                       of the sweep full_grid in this storage
python sweeps/domain_shift.py --sweep NAME
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from orchestrator.cli.analyses import Analyses, ScoredOptions, declare_scored
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.analysis_files import Rows, write_analysis
from orchestrator.report.comparison import (
    Analysis,
    Controlled,
    SetOutcomes,
    by_category,
    controlled,
    drawn_pairs,
    regression,
    set_outcomes,
)
from orchestrator.report.conclusions import PREFERENCE, preference
from orchestrator.report.house_style import GREY, panels, whiskers
from orchestrator.report.results import results_of
from orchestrator.report.tables import Table
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store
from trainers.data.texts import bag, nearest_overlap, similarity, words
from trainers.errors import DataError

# Raise when the analysis computes something else from the same scores.
VERSION = 4
FEATURES = ("length_difference", "overlap_with_training", "similarity", "leaked")
Features = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DomainShiftOptions(ScoredOptions):
    """EX−IM per pair against length, overlap with training, similarity and leaks."""


def declare(options: DomainShiftOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis of the sweep."""
    return declare_scored(options, session, analysis="domain_shift", version=VERSION, compute=compute)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Controls, regressions, what they advise, and the pairs themselves."""
    scored, basis = results_of(stage.parameters, inputs.store)
    outcomes = set_outcomes(scored)
    if not outcomes:
        raise DataError(
            "no model and seed of this sweep has learned with both EX-RM and IM-RM; train both, or look at its report."
        )
    features = {(item.train_set, item.dataset): _features(item, inputs.store) for item in outcomes}
    lacking = [
        f"{dataset} after {train_set} lacks {', '.join(missing).replace('_', ' ')}"
        for (train_set, dataset), known in features.items()
        if (missing := [name for name in FEATURES if name not in known])
    ]
    unknown = f"Rows that are not in the store leave features unknown: {'; '.join(lacking)}."
    controls = controlled(Analysis(scored))
    regressions = [
        row
        for found in by_category(outcomes)
        for row in _regressions(found, [features[item.train_set, item.dataset] for item in found])
    ]
    advice = preference(controls)
    write_analysis(
        attempt,
        "domain_shift",
        [basis, *([unknown] if lacking else []), f"{PREFERENCE}. {advice}"],
        (_control_table(controls), _regression_table(regressions)),
        results={"preference": advice, "controls": controls, "regressions": regressions},
        rows={"pairs": [row for item in outcomes for row in _rows(item, features)]},
        figures={"domain_shift": lambda: _draw(regressions)},
    )


def _features(item: SetOutcomes, store: Store) -> Features:
    """Each feature of each pair; those that need rows are left out where the store does not hold them."""
    found: dict[str, Any] = {"length_difference": item.longer}
    trained, texts = pairs_of(store, item.train_digest), pairs_of(store, item.dataset_digest)
    asked = [texts[row] for row in item.index] if texts else []
    if asked and trained:
        ours, theirs = (
            [bag(words(pair.chosen), words(pair.rejected)) for pair in pairs] for pairs in (asked, trained)
        )
        found["overlap_with_training"] = nearest_overlap(ours, theirs)
    if asked:
        found["similarity"] = np.array([similarity(pair.chosen, pair.rejected) for pair in asked])
    if item.leaked is not None:
        found["leaked"] = item.leaked.astype(np.float64)
    return found


def _rows(item: SetOutcomes, features: Mapping[tuple[str, str], Features]) -> Rows:
    known = features[item.train_set, item.dataset]
    return [
        {
            "train_set": item.train_set,
            "evaluation_set": item.dataset,
            "category": item.category,
            "index": int(index),
            "gap": float(item.gap[place]),
            "margin_gap": float(item.margin_gap[place]),
            **{name: float(known[name][place]) if name in known else None for name in FEATURES},
        }
        for place, index in enumerate(item.index)
    ]


def _regressions(found: Sequence[SetOutcomes], features: Sequence[Features]) -> Rows:
    """Both outcomes of a category's pairs on the features that all of its sets have, sets told apart."""
    of_set = np.repeat(np.arange(len(found)), [len(item.index) for item in found])
    terms = {
        name: np.concatenate([known[name] for known in features])
        for name in FEATURES
        if all(name in known for known in features)
    }
    terms |= {f"set {item.dataset}": 1.0 * (of_set == number) for number, item in enumerate(found) if number}
    outcomes = {
        "accuracy": np.concatenate([item.gap for item in found]),
        "margin": np.concatenate([item.margin_gap for item in found]),
    }
    counts_BP = np.concatenate(drawn_pairs(found), axis=1)
    place = {"train_set": found[0].train_set, "category": found[0].category}
    return [
        {**place, "outcome": outcome, "fitted": fitted}
        for outcome, values in outcomes.items()
        if (fitted := regression(values, terms, counts_BP)) is not None
    ]


def _control_table(controls: Sequence[Controlled]) -> Table:
    return Table(
        name="controls",
        title="Difference of accuracy and its controls",
        note="Mean over a category's sets, 95 % intervals over test pairs and seeds. Matched lengths: docs/report.md. "
        "Not seen: pairs whose prompt and long responses stand nowhere in the training split.",
        columns="train_set category baseline other pairs plain length unseen leak_free",
        titles={
            "pairs": "pairs a set",
            "plain": "baseline − other",
            "length": "at matched lengths",
            "unseen": "pairs not seen",
            "leak_free": "on those",
        },
        rows=[{field.name: getattr(item, field.name) for field in fields(item)} for item in controls],
        forms=dict.fromkeys(("plain", "length", "leak_free"), "+.3f"),
    )


def _regression_table(rows: Rows) -> Table:
    return Table(
        name="regressions",
        title="EX−IM per pair by what the pair is like",
        note="Least squares with an intercept for each set: the change of EX−IM by one standard deviation of a feature, the others "
        "held; – where a feature does not vary or follows from the others. Margins are in standard deviations of a set's rewards.",
        columns=f"train_set category outcome {' '.join(FEATURES)} explained pairs",
        titles={"outcome": "EX−IM of", "explained": "R²"},
        rows=[
            {**row, **fitted.coefficients, "explained": fitted.explained, "pairs": fitted.pairs}
            for row in rows
            if (fitted := row["fitted"])
        ],
        forms=dict.fromkeys(FEATURES, "+.3f"),
    )


def _draw(rows: Rows) -> Any:
    """Coefficients of accuracy with their intervals, a panel per training set and category."""
    rows = [row for row in rows if row["outcome"] == "accuracy"]
    if not rows:
        return None
    figure, axes = panels(len(rows), 1, 5.0, 1.7)
    for axis, row in zip(axes, rows, strict=True):
        coefficients = row["fitted"].coefficients
        known = {place: coefficients[name] for place, name in enumerate(FEATURES) if name in coefficients}
        if known:
            values = list(known.values())
            middle = [value.value for value in values]
            axis.errorbar(middle, list(known), xerr=whiskers(values), fmt="o", color="black", markersize=5)
        axis.axvline(0, color=GREY, linewidth=0.9, linestyle=":")
        axis.set_yticks(range(len(FEATURES)), [name.replace("_", " ") for name in FEATURES])
        axis.set_ylim(len(FEATURES) - 0.5, -0.5)
        axis.set_title(f"{row['train_set']}: {row['category']}")
    axes[-1].set_xlabel("change of EX−IM by one standard deviation")
    return figure


if __name__ == "__main__":
    main(Analyses(options=DomainShiftOptions, declare=declare), __file__, __doc__)
