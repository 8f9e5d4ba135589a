"""Why the reward types differ under domain shift, pair by pair, and when to prefer which; nothing is trained.

The paper sees IM-RMs ahead under domain shift and does not explain it. EX−IM of each test pair, over all models and seeds of
a finished sweep, against what the pair is like: by how much chosen is longer, how much of its tokens the nearest training
pair has, how alike chosen and rejected are, and whether training has seen it. And whether a lead survives matched lengths.

python sweeps/domain_shift.py                       of the sweep full_grid in this storage
python sweeps/domain_shift.py --sweep NAME
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.cli.analyses import Analyses, ScoredOptions, declare_scored
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.house_style import write_figure
from orchestrator.report.results import results_of
from orchestrator.report.tables import Table, write_summary
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store

# Raise when the analysis computes something else from the same scores.
VERSION = 2
FEATURES = ("length difference", "overlap with training", "similarity", "leaked")
OUTCOMES = (("accuracy", "gap"), ("margin", "margin_gap"))


@dataclass(frozen=True, kw_only=True)
class DomainShiftOptions(ScoredOptions):
    """EX−IM per pair against length, overlap with training, similarity and leaks."""


def declare(options: DomainShiftOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis of the sweep."""
    return declare_scored(options, session, analysis="domain_shift", version=VERSION)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Controls, regressions, what they advise, and the pairs themselves."""
    import pyarrow as pa
    from pyarrow import parquet

    from orchestrator.report.comparison import by_category, controlled, set_outcomes
    from orchestrator.report.conclusions import PREFERENCE, preference
    from trainers.errors import DataError

    scored, basis = results_of(stage.parameters, inputs.store)
    outcomes = set_outcomes(scored)
    if not outcomes:
        raise DataError(
            "no model and seed of this sweep has learned with both EX-RM and IM-RM; train both, or look at its report."
        )
    described = {id(item): _features(item, inputs.store) for item in outcomes}
    rows = [row for item in outcomes for row in _rows(item, described[id(item)])]
    parquet.write_table(pa.Table.from_pylist(rows), attempt.directory / "pairs.parquet")
    controls = controlled(outcomes)
    regressions = [
        row
        for found in by_category(outcomes)
        for row in _regressions(found, [described[id(item)] for item in found])
    ]
    advice = preference(controls)
    tables = (_control_table(controls), _regression_table(regressions))
    paragraphs = [
        basis,
        *_unknown(outcomes, described),
        f"{PREFERENCE}. {advice}",
    ]
    write_summary(attempt.directory, "domain_shift", paragraphs, tables)
    results = {
        "preference": advice,
        "controls": [asdict(item) for item in controls],
        "regressions": [_plain_row(row) for row in regressions],
    }
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    write_figure(attempt.directory, "domain_shift", lambda: _draw(regressions))
    attempt.info.update(results=results)


def _features(item: Any, store: Store) -> dict[str, Any]:
    """Each feature of each pair; those that need rows are left out where the store does not hold them."""
    import numpy as np

    from orchestrator.spec.datasets import pairs_of
    from trainers.data.texts import bag, nearest_overlap, similarity, words

    found: dict[str, Any] = {"length difference": item.longer}
    trained, texts = pairs_of(store, item.train_digest), pairs_of(store, item.dataset_digest)
    asked = [texts[row] for row in item.index] if texts else []
    if asked and trained:
        ours, theirs = (
            [bag(words(pair.chosen), words(pair.rejected)) for pair in pairs] for pairs in (asked, trained)
        )
        found["overlap with training"] = nearest_overlap(ours, theirs)
    if asked:
        found["similarity"] = np.array([similarity(pair.chosen, pair.rejected) for pair in asked])
    if item.leaked is not None:
        found["leaked"] = item.leaked.astype(np.float64)
    return found


def _rows(item: Any, features: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "train_set": item.train_set,
            "evaluation_set": item.dataset,
            "category": item.category,
            "index": int(item.index[place]),
            "gap": float(item.gap[place]),
            "margin_gap": float(item.margin_gap[place]),
            **{name: float(features[name][place]) if name in features else None for name in FEATURES},
        }
        for place in range(len(item.index))
    ]


def _regressions(found: Sequence[Any], features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both outcomes of a category's pairs on the features that all of its sets have, sets told apart."""
    import numpy as np

    from orchestrator.report.comparison import drawn_pairs, regression

    counts = np.concatenate(drawn_pairs(found), axis=1)
    names = [name for name in FEATURES if all(name in here for here in features)]
    terms = {name: np.concatenate([here[name] for here in features]) for name in names}
    for number, item in enumerate(found[1:], start=1):
        terms[f"set {item.dataset}"] = np.concatenate(
            [np.full(len(other.index), float(place == number)) for place, other in enumerate(found)]
        )
    rows = []
    for outcome, attribute in OUTCOMES:
        fitted = regression(np.concatenate([getattr(item, attribute) for item in found]), terms, counts)
        if fitted is not None:
            rows.append(
                {
                    "train_set": found[0].train_set,
                    "category": found[0].category,
                    "outcome": outcome,
                    "fitted": fitted,
                }
            )
    return rows


def _control_table(controls: Sequence[Any]) -> Table:
    return Table(
        name="controls",
        title="EX−IM of accuracy and its controls",
        note="Mean over a category's sets, 95 % intervals over test pairs. Matched lengths: docs/report.md. "
        "Not seen: pairs whose prompt and long responses stand nowhere in the training split.",
        columns="train_set category pairs difference length_controlled unseen leak_free",
        titles={
            "pairs": "pairs a set",
            "length_controlled": "at matched lengths",
            "unseen": "pairs not seen",
            "leak_free": "on those",
        },
        rows=[
            {
                **{
                    name: getattr(item, name)
                    for name in ("train_set", "category", "pairs", "unseen", "leak_free")
                },
                "difference": item.plain,
                "length_controlled": item.length,
            }
            for item in controls
        ],
        forms=dict.fromkeys(("difference", "length_controlled", "leak_free"), "+.3f"),
    )


def _regression_table(rows: Sequence[dict[str, Any]]) -> Table:
    names = {name: name.replace(" ", "_") for name in FEATURES}
    return Table(
        name="regressions",
        title="EX−IM per pair by what the pair is like",
        note="Least squares with an intercept for each set: the change of EX−IM by one standard deviation of a feature, the others "
        "held; – where a feature does not vary or follows from the others. Margins are in standard deviations of a set's rewards.",
        columns=f"train_set category outcome {' '.join(names.values())} explained pairs",
        titles={"outcome": "EX−IM of", "explained": "R²"},
        rows=[
            {
                **row,
                **{column: row["fitted"].coefficients.get(name) for name, column in names.items()},
                "explained": row["fitted"].explained,
                "pairs": row["fitted"].pairs,
            }
            for row in rows
        ],
        forms=dict.fromkeys(names.values(), "+.3f"),
    )


def _unknown(outcomes: Sequence[Any], described: dict[int, dict[str, Any]]) -> list[str]:
    """Say which feature is unknown for which set."""
    lacking = [
        f"{item.dataset} after {item.train_set} lacks {', '.join(missing)}"
        for item in outcomes
        if (missing := [name for name in FEATURES if name not in described[id(item)]])
    ]
    return (
        [f"Rows that are not in the store leave features unknown: {'; '.join(lacking)}."] if lacking else []
    )


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "fitted": asdict(row["fitted"])}


def _draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Coefficients of accuracy with their intervals, a panel per training set and category."""
    from orchestrator.report.house_style import GREY, panels, whiskers

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
        axis.set_yticks(range(len(FEATURES)), FEATURES)
        axis.set_ylim(len(FEATURES) - 0.5, -0.5)
        axis.set_title(f"{row['train_set']}: {row['category']}")
    axes[-1].set_xlabel("change of EX−IM by one standard deviation")
    return figure


if __name__ == "__main__":
    main(Analyses(options=DomainShiftOptions, declare=declare, compute=compute), __file__, __doc__)
