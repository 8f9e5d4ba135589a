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
from pathlib import Path
from typing import Any

from orchestrator.cli.analyses import main
from orchestrator.cli.session import Session
from orchestrator.report.scored import (
    ScoredOptions,
    declare_scored,
    rests_on,
    results_of,
    write_analysis,
    write_figure,
)
from orchestrator.spec.analyses import AnalyseStage, AnalysisInputs
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
    return declare_scored(options, session, analysis="margins", version=VERSION)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """The curves of best of n, and variances, by training set, evaluation set, model and reward type."""
    results = [item for item in results_of(stage.parameters, inputs.store) if item.learned]
    curves, variances, unknown = [], [], set[str]()
    for trials in _groups(results):
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
    paragraphs = [rests_on(stage.parameters, inputs.store), SCOPE]
    if unknown:
        paragraphs.append(f"Not in the store, so left out: the rows of {', '.join(sorted(unknown))}.")
    write_analysis(attempt.directory, "margins", paragraphs, tables)
    plain = {
        "best_of": [{**row, "quality": asdict(row["quality"])} for row in curves],
        "variance": variances,
    }
    (attempt.directory / "results.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False))
    write_figure(attempt.directory, "margins", lambda: _draw(curves))
    attempt.info.update(results=plain)


def _groups(results: Sequence[Any]) -> list[list[Any]]:
    """The seeds of each training set, model and reward type."""
    found: dict[tuple[str, str, str], list[Any]] = {}
    for item in results:
        found.setdefault((item.record.train_set, item.record.model, item.record.reward), []).append(item)
    return list(found.values())


def _labels(record: Any) -> dict[str, Any]:
    return {"train_set": record.train_set, "model": record.model, "reward": record.reward}


def _metric(trial: Any, dataset: str, metric: str) -> float:
    (found,) = [item.metrics[metric] for item in trial.final if item.dataset == dataset]
    return float(found)


def _candidates(trial: Any, dataset: str, store: Store) -> list[Any]:
    from orchestrator.report.best_of import candidates
    from orchestrator.spec.datasets import pairs_of

    (scores,) = [item.scores for item in trial.final if item.dataset == dataset]
    digest = next(item.dataset_digest for item in trial.record.evaluations if item.dataset == dataset)
    pairs = pairs_of(store, digest)
    return candidates(pairs, scores) if pairs else []


def _curve(seeds: Sequence[Sequence[Any]], labels: dict[str, Any]) -> list[dict[str, Any]]:
    """By n: expected quality of the pick, resampled over prompts and seeds; what chance and the best pick would have."""
    import numpy as np

    from orchestrator.report.best_of import best_of
    from orchestrator.report.statistics import DRAWS, accuracy_estimate, generator, pair_counts, seed_weights

    where = (labels["train_set"], labels["evaluation_set"])
    weights_BS = seed_weights(len(seeds), DRAWS, generator("seeds", labels["train_set"], labels["model"]))
    rows = []
    for n in DRAWN:
        kept = [number for number, item in enumerate(seeds[0]) if len(item.reward) >= n]
        if not kept:
            break
        picked_SQ = np.array(
            [[best_of(found[q].reward, found[q].quality, n) for q in kept] for found in seeds]
        )
        counts_BQ = pair_counts(len(kept), DRAWS, generator("prompts", *where, str(n)))
        drawn_B = (weights_BS * (counts_BQ @ picked_SQ.T / len(kept))).sum(axis=1)
        by_seed = picked_SQ.mean(axis=1).tolist()
        first = [seeds[0][q] for q in kept]
        rows.append(
            {
                "n": n,
                "prompts": len(kept),
                # Rounded, as equal qualities may differ in their last bit, and their interval then has no width.
                "quality": accuracy_estimate(
                    round(float(np.mean(by_seed)), 12), np.round(drawn_B, 12), len(kept), by_seed
                ),
                "chance": float(np.mean([item.quality.mean() for item in first])),
                "best": float(np.mean([best_of(item.quality, item.quality, n) for item in first])),
            }
        )
    return rows


def _variance(seeds: Sequence[Sequence[Any]], margins: Sequence[float]) -> dict[str, Any]:
    """How much of a reward's variance lies within prompts, and whether prompts that it spreads are those it picks well on."""
    import numpy as np
    from scipy.stats import spearmanr

    from orchestrator.report.best_of import best_of, share_within, spreads

    spread_Q = np.mean([spreads(found) for found in seeds], axis=0)
    picked_Q = np.mean(
        [[best_of(item.reward, item.quality, len(item.reward)) for item in found] for found in seeds], axis=0
    )
    varies = len(spread_Q) > 2 and np.ptp(spread_Q) > 0 and np.ptp(picked_Q) > 0
    return {
        "candidates": float(np.mean([len(item.reward) for item in seeds[0]])),
        "within": float(np.mean([share_within(found) for found in seeds])),
        "abs_margin": float(np.mean(margins)),
        "spread_with_pick": float(spearmanr(spread_Q, picked_Q).statistic) if varies else None,
    }


def _curve_table(rows: Sequence[dict[str, Any]]) -> Any:
    from orchestrator.report.summary import reward_title
    from orchestrator.report.tables import Table, columns

    return Table(
        name="best_of",
        title="Best of n by each reward",
        note="Expected quality of the pick over all draws of n of a prompt's candidates, mean over prompts and seeds ± standard "
        "deviation over seeds, 95 % intervals over prompts and seeds, without width where all prompts agree. "
        "A chosen response has quality 1, a rejected one 0.",
        columns=columns(
            ("train_set", "trained on"),
            ("evaluation_set", "candidates of"),
            ("model", "model"),
            ("reward", "chosen by"),
            ("n", "n"),
            ("prompts", "prompts"),
            ("quality", "quality"),
            ("chance", "by chance"),
            ("best", "best possible"),
        ),
        rows=tuple(
            (
                row["train_set"],
                row["evaluation_set"],
                row["model"],
                reward_title(row["reward"]),
                row["n"],
                row["prompts"],
                row["quality"],
                row["chance"],
                row["best"],
            )
            for row in rows
        ),
    )


def _variance_table(rows: Sequence[dict[str, Any]]) -> Any:
    from orchestrator.report.summary import reward_title
    from orchestrator.report.tables import Table, columns

    return Table(
        name="variance",
        title="Reward variance within a prompt",
        note="The share of the variance of all candidates' rewards that lies within prompts, beside the absolute margin of the "
        "report; and the rank correlation, over prompts, of a reward's spread with the quality of its best of all candidates, "
        "– where one of them does not vary.",
        columns=columns(
            ("train_set", "trained on"),
            ("evaluation_set", "candidates of"),
            ("model", "model"),
            ("reward", "reward"),
            ("candidates", "candidates a prompt", ".1f"),
            ("within", "variance within prompts"),
            ("abs_margin", "absolute margin"),
            ("spread_with_pick", "spread with quality of the pick", "+.3f"),
        ),
        rows=tuple(
            (
                row["train_set"],
                row["evaluation_set"],
                row["model"],
                reward_title(row["reward"]),
                row["candidates"],
                row["within"],
                row["abs_margin"],
                row["spread_with_pick"],
            )
            for row in rows
        ),
    )


def _draw(rows: Sequence[dict[str, Any]]) -> Any:
    """A panel per evaluation set and model, for those whose prompts have more than two candidates."""
    from orchestrator.report.house_style import look, panels
    from orchestrator.report.summary import reward_title

    several = {(row["train_set"], row["evaluation_set"], row["model"]) for row in rows if row["n"] > 2}
    where = list(dict.fromkeys((row["train_set"], row["evaluation_set"], row["model"]) for row in rows))
    where = [place for place in where if place in several]
    if not where:
        return None
    kinds = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = panels(1, len(where), 3.4, 2.8)
    for axis, place in zip(axes, where, strict=True):
        here = [row for row in rows if (row["train_set"], row["evaluation_set"], row["model"]) == place]
        for kind in kinds:
            found = [row for row in here if row["reward"] == kind]
            drawn, at = look(kind, kinds), [row["n"] for row in found]
            axis.fill_between(
                at,
                [row["quality"].low for row in found],
                [row["quality"].high for row in found],
                color=drawn.colour,
                alpha=0.2,
            )
            axis.plot(
                at,
                [row["quality"].value for row in found],
                drawn.line,
                marker=drawn.marker,
                color=drawn.colour,
                label=reward_title(kind),
            )
        first = [row for row in here if row["reward"] == here[0]["reward"]]
        axis.plot(
            [row["n"] for row in first],
            [row["best"] for row in first],
            ":",
            color="#555555",
            label="best possible",
        )
        axis.set_ylim(-0.05, 1.05)
        axis.set_xlabel("n candidates")
        axis.set_title(f"{place[1]}, {place[2]}")
    axes[0].set_ylabel("expected quality of the pick")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    main(MarginsOptions, "margins", declare, compute, Path(__file__).parent)
