"""Which pairs make the reward types differ under domain shift, and when to prefer which type? Nothing is trained.

In the paper IM-RMs are ahead under domain shift, without an explanation. This regresses the lead of a sweep's first reward
type over each other type, on each test pair over all models and seeds, on features of the pair: how much longer chosen is,
the share of its tokens in the nearest training pair, how alike chosen and rejected are, and whether training has seen it.
It also says whether a lead survives matched lengths.

python sweeps/domain_shift.py                       of the sweep full_grid in this storage
python sweeps/domain_shift.py --sweep NAME
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.cli.analyses import analyses_of
from orchestrator.cli.main import main
from orchestrator.report import summary
from orchestrator.report.comparison import CONTROLS, Analysis, SetOutcomes, regression, set_outcomes
from orchestrator.report.conclusions import PREFERENCE, preference
from orchestrator.report.results import TrialResult
from orchestrator.report.statistics import Floats
from orchestrator.report.studies import Findings, Rows, Study
from orchestrator.report.tables import Table
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalysisInputs
from orchestrator.store.artifacts import Store
from trainers.data.texts import bag, nearest_overlap, similarity, words
from trainers.errors import DataError

FEATURES = ("length_difference", "overlap_with_training", "similarity", "leaked")


def find(results: Sequence[TrialResult], inputs: AnalysisInputs) -> Findings:
    """Return controls, regressions, the advice that follows, and the pairs themselves."""
    analysis = Analysis(results)
    pairs, lacking = pair_rows(analysis, inputs.store)
    if not pairs:
        raise DataError(
            "no model and seed of this sweep has learned with two reward types; train both, or look at its report."
        )
    regressions = by_features(pairs)
    advice, controls = preference(analysis), summary.differences(analysis, CONTROLS)
    unknown = f"Rows that are not in the store leave features unknown: {'; '.join(lacking)}."
    return Findings(
        said=[*([unknown] if lacking else []), f"{PREFERENCE}. {advice}"],
        tables=(controls, _regression_table(regressions)),
        results={"preference": advice, "controls": controls.rows, "regressions": regressions},
        rows={"pairs": pairs},
    )


def pair_rows(analysis: Analysis, store: Store) -> tuple[list[dict[str, Any]], list[str]]:
    """Return each pair's differences, baseline − each other reward type, with its features; and which features are unknown."""
    pairs = list[dict[str, Any]]()
    features: dict[tuple[str, str], Mapping[str, Floats]] = {}
    for other in analysis.others:
        for item in set_outcomes(analysis, (analysis.baseline, other)):
            place = item.train_set, item.dataset
            known = features[place] = features.get(place) or pair_features(item, store)
            right_P, other_right_P = item.right.values()
            margin_P, other_margin_P = item.margin.values()
            pairs += [
                {
                    "baseline": analysis.baseline,
                    "other": other,
                    "train_set": item.train_set,
                    "evaluation_set": item.dataset,
                    "category": item.category,
                    "index": index,
                    "gap": float(right_P[at] - other_right_P[at]),
                    "margin_gap": float(margin_P[at] - other_margin_P[at]),
                    **{name: float(known[name][at]) if name in known else None for name in FEATURES},
                }
                for at, index in enumerate(item.index.tolist())
            ]
    lacking = [
        f"{dataset} after {train_set} lacks {', '.join(missing).replace('_', ' ')}"
        for (train_set, dataset), known in features.items()
        if (missing := [name for name in FEATURES if name not in known])
    ]
    return pairs, lacking


def pair_features(item: SetOutcomes, store: Store) -> Mapping[str, Floats]:
    """Return each feature of each pair, without those that need rows which the store lacks."""
    found = {"length_difference": item.longer}
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


def by_features(pairs: Rows) -> list[dict[str, Any]]:
    """Regress both differences of each category's pairs on the features that all of its sets have, with an intercept per set."""
    import pandas as pd

    rows = []
    labels = ["baseline", "other", "train_set", "category"]
    for place, group in pd.DataFrame(pairs).groupby(labels, sort=False):
        terms = {name: group[name].to_numpy(float) for name in FEATURES if group[name].notna().all()}
        _, *sets = group["evaluation_set"].unique()
        terms |= {f"set {name}": (group["evaluation_set"] == name).to_numpy(float) for name in sets}
        # The rewritings of a pair are no other pairs; other sets hold pairs of their own.
        unit = ["evaluation_set", "index"] if place[-1] == "domain shift" else ["index"]
        units_P = group.groupby(unit).ngroup().to_numpy().astype(np.int64)
        for outcome, name in (("accuracy", "gap"), ("margin", "margin_gap")):
            if (fitted := regression(group[name].to_numpy(), terms, units_P)) is not None:
                rows.append({**dict(zip(labels, place, strict=True)), "outcome": outcome, "fitted": fitted})
    return rows


def _regression_table(rows: Rows) -> Table:
    return Table(
        name="regressions",
        title="Baseline − other per pair by what the pair is like",
        note="Least squares with an intercept for each set: the change of the difference by one standard deviation of a "
        "feature, the others held; – where a feature does not vary or follows from the others. Margins are in standard deviations of a set's rewards.",
        columns=f"train_set category baseline other outcome {' '.join(FEATURES)} explained pairs",
        titles={"outcome": "difference of", "explained": "R²"},
        rows=[
            {**row, **fitted.coefficients, "explained": fitted.explained, "pairs": fitted.pairs}
            for row in rows
            if (fitted := row["fitted"])
        ],
        forms=dict.fromkeys(FEATURES, "+.3f"),
    )


# 6: intervals of coefficients by a variance clustered by pairs, not by a bootstrap; controls as in the report.
EXPERIMENT = analyses_of(Study(name="domain_shift", version=6, find=find))
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
