"""Which pairs make the reward types differ under domain shift, and when to prefer which type? Nothing is trained.

In the paper IM-RMs are ahead under domain shift, without an explanation. This regresses the lead of a sweep's first reward
type over each other type, on each test pair over all models and seeds, on features of the pair: how much longer chosen is,
the share of its tokens in the nearest training pair, how alike chosen and rejected are, and whether training has seen it.
It also says whether a lead survives matched lengths.

python sweeps/domain_shift.py                       of the sweep full_grid in this storage
python sweeps/domain_shift.py --sweep NAME
"""

from collections.abc import Sequence

from orchestrator.cli.analyses import analyses_of
from orchestrator.cli.main import main
from orchestrator.report import summary
from orchestrator.report.comparison import CONTROLS, Analysis
from orchestrator.report.conclusions import PREFERENCE, preference
from orchestrator.report.results import TrialResult
from orchestrator.report.studies import FEATURES, Findings, Rows, Study, by_features, feature_rows
from orchestrator.report.tables import Table
from orchestrator.spec.stages import AnalysisInputs
from trainers.errors import DataError


def find(results: Sequence[TrialResult], inputs: AnalysisInputs) -> Findings:
    """Return controls, regressions, the advice that follows, and the pairs themselves."""
    analysis = Analysis(results)
    pairs, lacking = feature_rows(analysis, inputs.store)
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


# 7: a pair and its rewritings are one unit in every category; intervals over sets of unequal sizes as in the report.
EXPERIMENT = analyses_of(Study(name="domain_shift", version=7, find=find))
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
