"""What margins are worth: best of n over candidates that exist, chosen by each reward, and reward variance within a prompt.

The candidates of a prompt are all responses that an evaluation set holds of it (rewardbench2 has several, a plain set of
pairs two). Expected quality of the pick is exact over all draws of n, not sampled. RL itself is out of scope: this says how
well a reward chooses, and how much its choices differ, not what a policy trained on it would become. Nothing is trained.

python sweeps/full_grid.py --name best_of_grid --profile laptop --only train=tiny_world --eval-sets tiny_world \\
    tiny_world_candidates --category "tiny_world/tiny_world_candidates=token-level shift"
python sweeps/margins.py --sweep best_of_grid
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.cli.analyses import Analyses, ScoredOptions, declare_scored
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.house_style import write_figure
from orchestrator.report.results import by_seeds, results_of
from orchestrator.report.tables import Table, reward_title, write_summary
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store
from trainers.errors import DataError

# Raise when the analysis computes something else from the same scores.
VERSION = 2
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
    curves, variances, unknown = [], [], set[str]()
    for trials in by_seeds([item for item in results if item.learned]):
        for dataset in [item.dataset for item in trials[0].final]:
            found = [_candidates(trial, dataset, inputs.store) for trial in trials]
            known = [item for item in found if item]
            if len(known) < len(found):
                unknown.add(dataset)
                continue
            labels = {**_labels(trials[0].record), "evaluation_set": dataset, "seeds": len(trials)}
            curves += [{**labels, **row} for row in _curve(known, labels)]
            margins = [_metric(trial, dataset, "abs_margin") for trial in trials]
            variances.append({**labels, **_variance(known, margins)})
    if not curves:
        raise DataError(
            "no trial of this sweep has learned and has the rows of its evaluation sets in the store; run the sweep again."
        )
    tables = (_curve_table(curves), _variance_table(variances))
    paragraphs = [basis, SCOPE]
    if unknown:
        paragraphs.append(f"Not in the store, so left out: the rows of {', '.join(sorted(unknown))}.")
    write_summary(attempt.directory, "margins", paragraphs, tables)
    plain = {
        "best_of": [{**row, "quality": asdict(row["quality"])} for row in curves],
        "variance": variances,
    }
    (attempt.directory / "results.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False))
    write_figure(attempt.directory, "margins", lambda: _draw(curves))
    attempt.info.update(results=plain)


def _labels(record: Any) -> dict[str, Any]:
    return {"train_set": record.train_set, "model": record.model, "reward": record.reward}


def _metric(trial: Any, dataset: str, metric: str) -> float:
    (found,) = [item.metrics[metric] for item in trial.final if item.dataset == dataset]
    return float(found)


def _candidates(trial: Any, dataset: str, store: Store) -> list[Any]:
    from orchestrator.report.statistics import candidates
    from orchestrator.spec.datasets import pairs_of

    (found,) = [item for item in trial.final if item.dataset == dataset]
    pairs = pairs_of(store, found.dataset_digest)
    return candidates(pairs, found.scores) if pairs else []


def _curve(seeds: Sequence[Sequence[Any]], labels: dict[str, Any]) -> list[dict[str, Any]]:
    """By n: expected quality of the pick, resampled over prompts and seeds; what chance and the best pick would have."""
    import numpy as np

    from orchestrator.report.statistics import accuracy_estimate, best_of, generator, over_seeds

    where = (labels["train_set"], labels["evaluation_set"])
    rows = []
    for n in DRAWN:
        kept = [number for number, item in enumerate(seeds[0]) if len(item.reward) >= n]
        if not kept:
            break
        picked_SQ = np.array(
            [[best_of(found[q].reward, found[q].quality, n) for q in kept] for found in seeds]
        )
        value, draws_B, by_seed = over_seeds(
            picked_SQ,
            generator("prompts", *where, str(n)),
            generator("seeds", labels["train_set"], labels["model"]),
        )
        first = [seeds[0][q] for q in kept]
        rows.append(
            {
                "n": n,
                "prompts": len(kept),
                "quality": accuracy_estimate(value, draws_B, len(kept), by_seed),
                "chance": float(np.mean([item.quality.mean() for item in first])),
                "best": float(np.mean([best_of(item.quality, item.quality, n) for item in first])),
            }
        )
    return rows


def _variance(seeds: Sequence[Sequence[Any]], margins: Sequence[float]) -> dict[str, Any]:
    """How much of a reward's variance lies within prompts, and whether prompts that it spreads are those it picks well on."""
    import numpy as np

    from orchestrator.report.statistics import best_of, rank_correlation, share_within, spreads

    spread_Q = np.mean([spreads(found) for found in seeds], axis=0)
    picked_Q = np.mean(
        [[best_of(item.reward, item.quality, len(item.reward)) for item in found] for found in seeds], axis=0
    )
    return {
        "candidates": float(np.mean([len(item.reward) for item in seeds[0]])),
        "within": float(np.mean([share_within(found) for found in seeds])),
        "abs_margin": float(np.mean(margins)),
        "spread_with_pick": rank_correlation(spread_Q, picked_Q),
    }


def _curve_table(rows: Sequence[dict[str, Any]]) -> Table:
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


def _variance_table(rows: Sequence[dict[str, Any]]) -> Table:
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


def _draw(rows: Sequence[dict[str, Any]]) -> Any:
    """A panel per evaluation set and model, for those whose prompts have more than two candidates."""
    from orchestrator.report.house_style import GREY, legend, panels, points

    where: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        where.setdefault((row["train_set"], row["evaluation_set"], row["model"]), []).append(row)
    where = {place: here for place, here in where.items() if any(row["n"] > 2 for row in here)}
    if not where:
        return None
    kinds = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = panels(1, len(where), 3.4, 2.8)
    for axis, ((_, dataset, model), here) in zip(axes, where.items(), strict=True):
        for kind in kinds:
            found = [row for row in here if row["reward"] == kind]
            points(axis, [row["n"] for row in found], [row["quality"] for row in found], kind, kinds)
        best = {row["n"]: row["best"] for row in here}
        axis.plot(list(best), list(best.values()), ":", color=GREY, label="best possible")
        axis.set_ylim(-0.05, 1.05)
        axis.set_xlabel("n candidates")
        axis.set_title(f"{dataset}, {model}")
    axes[0].set_ylabel("expected quality of the pick")
    legend(figure, axes)
    return figure


if __name__ == "__main__":
    main(Analyses(options=MarginsOptions, declare=declare), __file__, __doc__)
