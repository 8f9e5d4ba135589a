"""What margins are worth: best of n over candidates that exist, chosen by each reward, and reward variance within a prompt.

The candidates of a prompt are all responses that an evaluation set holds of it (rewardbench2 has several, a plain set of
pairs two). Expected quality of the pick is exact over all draws of n, not sampled. RL itself is out of scope: this says how
well a reward chooses, and how much its choices differ, not what a policy trained on it would become. Nothing is trained.

python sweeps/full_grid.py --name best_of_grid --profile laptop --only train=tiny_world --eval-sets tiny_world \\
    tiny_world_candidates --category "tiny_world/tiny_world_candidates=token-level shift"
python sweeps/margins.py --sweep best_of_grid
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.cli.analyses import Analyses, ScoredOptions, declare_scored
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.analysis_files import Rows, draw_lines, write_analysis
from orchestrator.report.house_style import GREY, legend
from orchestrator.report.results import by_seeds, results_of
from orchestrator.report.statistics import (
    Candidates,
    best_of,
    candidates,
    over_seeds,
    rank_correlation,
    share_within,
    spreads,
)
from orchestrator.report.tables import Table, reward_title
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.errors import DataError

# Raise when the analysis computes something else from the same scores.
VERSION = 3
# Of candidates drawn; each for the prompts that have as many.
DRAWN = (1, 2, 4, 8, 12, 16, 32, 64)
SCOPE = "RL is out of scope: these numbers say how well a reward chooses among responses that exist."


@dataclass(frozen=True, kw_only=True)
class MarginsOptions(ScoredOptions):
    """Best of n over existing candidates, and reward variance within a prompt."""


def declare(options: MarginsOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis of the sweep."""
    return declare_scored(options, session, analysis="margins", version=VERSION, compute=compute)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """The curves of best of n, and variances, by training set, evaluation set, model and reward type."""
    results, basis = results_of(stage.parameters, inputs.store)
    curves: list[dict[str, Any]] = []
    variances: list[dict[str, Any]] = []
    unknown = set[str]()
    for trials in by_seeds([item for item in results if item.learned]):
        record = trials[0].record
        by_set = [{item.dataset: item for item in trial.final} for trial in trials]
        for dataset in by_set[0]:
            evaluations = [of_trial[dataset] for of_trial in by_set]
            texts = pairs_of(inputs.store, evaluations[0].dataset_digest)
            if not texts:
                unknown.add(dataset)
                continue
            found = [candidates(texts, item.scores) for item in evaluations]
            labels = {
                "train_set": record.train_set,
                "model": record.model,
                "reward": record.reward,
                "evaluation_set": dataset,
                "seeds": len(trials),
            }
            abs_margin = float(np.mean([item.metrics["abs_margin"] for item in evaluations]))
            curves += [{**labels, **row} for row in _curve(found)]
            variances.append({**labels, "abs_margin": abs_margin, **_variance(found)})
    if not curves:
        raise DataError(
            "no trial of this sweep has learned and has the rows of its evaluation sets in the store; run the sweep again."
        )
    left_out = f"Not in the store, so left out: the rows of {', '.join(sorted(unknown))}."
    write_analysis(
        attempt,
        "margins",
        [basis, SCOPE, *([left_out] if unknown else [])],
        (_curve_table(curves), _variance_table(variances)),
        results={"best_of": curves, "variance": variances},
        figures={"margins": lambda: _draw(curves)},
    )


def _curve(seeds: Sequence[Sequence[Candidates]]) -> Rows:
    """By n: expected quality of the pick, over prompts and seeds; what chance and the best pick would have."""
    rows = []
    for n in DRAWN:
        kept = [number for number, item in enumerate(seeds[0]) if len(item.reward) >= n]
        if not kept:
            break
        picked_SQ = np.array(
            [[best_of(found[q].reward, found[q].quality, n) for q in kept] for found in seeds]
        )
        first = [seeds[0][q] for q in kept]
        rows.append(
            {
                "n": n,
                "prompts": len(kept),
                "quality": over_seeds(picked_SQ),
                "chance": float(np.mean([item.quality.mean() for item in first])),
                "best": float(np.mean([best_of(item.quality, item.quality, n) for item in first])),
            }
        )
    return rows


def _variance(seeds: Sequence[Sequence[Candidates]]) -> dict[str, Any]:
    """How much of a reward's variance lies within prompts, and whether prompts that it spreads are those it picks well on."""
    spread_Q = np.mean([spreads(found) for found in seeds], axis=0)
    picked_Q = np.mean(
        [[best_of(item.reward, item.quality, len(item.reward)) for item in found] for found in seeds], axis=0
    )
    return {
        "candidates": float(np.mean([len(item.reward) for item in seeds[0]])),
        "within": float(np.mean([share_within(found) for found in seeds])),
        "spread_with_pick": rank_correlation(spread_Q, picked_Q),
    }


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
        rows=[{**row, "reward": reward_title(row["reward"])} for row in rows],
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
        rows=[{**row, "reward": reward_title(row["reward"])} for row in rows],
        forms={"candidates": ".1f", "spread_with_pick": "+.3f"},
    )


def _draw(rows: Rows) -> Any:
    """A panel per evaluation set and model, for those whose prompts have more than two candidates."""
    where = ("train_set", "evaluation_set", "model")
    many = {tuple(row[name] for name in where) for row in rows if row["n"] > 2}
    if not many:
        return None
    shown = [row for row in rows if tuple(row[name] for name in where) in many]
    figure, axes = draw_lines(shown, where, "n", "quality", columns=len(many), width=3.4, height=2.8)
    for place, axis in axes.items():
        best = {row["n"]: row["best"] for row in shown if tuple(row[name] for name in where) == place}
        axis.plot(list(best), list(best.values()), ":", color=GREY, label="best possible")
        axis.set_xlabel("n candidates")
    next(iter(axes.values())).set_ylabel("expected quality of the pick")
    legend(figure, axes.values())
    return figure


if __name__ == "__main__":
    main(Analyses(options=MarginsOptions, declare=declare), __file__, __doc__)
