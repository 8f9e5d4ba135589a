"""What margins are worth: best of n over candidates that exist, chosen by each reward, and reward variance within a prompt.

The candidates of a prompt are all responses that an evaluation set holds of it (rewardbench2 has several, a plain set of
pairs two). Expected quality of the pick is exact over all draws of n, not sampled. RL itself is out of scope: this says how
well a reward chooses, and how much its choices differ, not what a policy trained on it would become. Nothing is trained.

python sweeps/full_grid.py --name best_of_grid --profile laptop --only train=tiny_world --eval-sets tiny_world \\
    tiny_world_candidates --category "tiny_world/tiny_world_candidates=token-level shift"
python sweeps/margins.py --sweep best_of_grid
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.cli.analyses import analyses_of
from orchestrator.cli.main import main
from orchestrator.report.analysis_files import Rows, draw_lines
from orchestrator.report.house_style import GREY, legend
from orchestrator.report.results import TrialResult
from orchestrator.report.statistics import candidates
from orchestrator.report.studies import Found, Study, best_of_curve, learned_cells, titled, variance_within
from orchestrator.report.tables import Table
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalysisInputs
from trainers.errors import DataError

# Of candidates drawn; each for the prompts that have as many.
DRAWN = (1, 2, 4, 8, 12, 16, 32, 64)
PLACE = ("train_set", "evaluation_set", "model")
SCOPE = "RL is out of scope: these numbers say how well a reward chooses among responses that exist."


def find(results: Sequence[TrialResult], inputs: AnalysisInputs) -> Found:
    """The curves of best of n, and variances, by training set, evaluation set, model and reward type."""
    curves, variances, unknown = list[dict[str, Any]](), list[dict[str, Any]](), set[str]()
    for labels, trials in learned_cells(results):
        by_set = [{item.dataset: item for item in trial.final} for trial in trials]
        for dataset in by_set[0]:
            evaluations = [of_trial[dataset] for of_trial in by_set]
            texts = pairs_of(inputs.store, evaluations[0].dataset_digest)
            if not texts:
                unknown.add(dataset)
                continue
            found = [candidates(texts, item.scores) for item in evaluations]
            place = {**labels, "evaluation_set": dataset}
            abs_margin = float(np.mean([item.metrics["abs_margin"] for item in evaluations]))
            curves += [{**place, **row} for row in best_of_curve(found, DRAWN)]
            variances.append({**place, "abs_margin": abs_margin, **variance_within(found)})
    if not curves:
        raise DataError(
            "no trial of this sweep has learned and has the rows of its evaluation sets in the store; run the sweep again."
        )
    return Found(
        said=[SCOPE, *(f"Not in the store, so left out: the rows of {name}." for name in sorted(unknown))],
        tables=(_curve_table(curves), _variance_table(variances)),
        results={"best_of": curves, "variance": variances},
        draw=lambda: _draw(curves),
    )


def _curve_table(rows: Rows) -> Table:
    return Table(
        name="best_of",
        title="Best of n by each reward",
        note="Expected quality of the pick over all draws of n of a prompt's candidates, mean over prompts and seeds ± standard "
        "deviation over seeds, 95 % intervals over prompts and seeds, without width where all prompts agree. "
        "A chosen response has quality 1, a rejected one 0.",
        columns="train_set evaluation_set model reward n prompts quality chance best",
        titles={
            "evaluation_set": "candidates of",
            "reward": "chosen by",
            "chance": "by chance",
            "best": "best possible",
        },
        rows=titled(rows),
    )


def _variance_table(rows: Rows) -> Table:
    return Table(
        name="variance",
        title="Reward variance within a prompt",
        note="The share of the variance of all candidates' rewards that lies within prompts, beside the absolute margin of the "
        "report; and the rank correlation, over prompts, of a reward's spread with the quality of its best of all candidates, "
        "– where one of them does not vary.",
        columns="train_set evaluation_set model reward candidates within abs_margin spread_with_pick",
        titles={
            "evaluation_set": "candidates of",
            "candidates": "candidates a prompt",
            "within": "variance within prompts",
            "spread_with_pick": "spread with quality of the pick",
        },
        rows=titled(rows),
        forms={"candidates": ".1f", "spread_with_pick": "+.3f"},
    )


def _draw(rows: Rows) -> Any:
    """A panel per evaluation set and model, for those whose prompts have more than two candidates."""
    place = operator.itemgetter(*PLACE)
    many = {place(row) for row in rows if row["n"] > 2}
    if not many:
        return None
    shown = [row for row in rows if place(row) in many]
    figure, axes = draw_lines(shown, PLACE, "n", "quality", columns=len(many), width=3.4, height=2.8)
    for here, axis in axes.items():
        best = {row["n"]: row["best"] for row in shown if place(row) == here}
        axis.plot(list(best), list(best.values()), ":", color=GREY, label="best possible")
        axis.set(xlabel="n candidates", ylabel="expected quality of the pick")
    legend(figure, axes.values())
    return figure


EXPERIMENT = analyses_of(Study(name="margins", version=3, find=find))
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
