"""Studies of a finished sweep's scores: their common frame, and the computations of each.

A study reads the complete trials of one sweep, on the pairs that all of them have, computes values of each pair or prompt,
and shows them as tables. A file in sweeps/ defines its question and its presentation.
Shapes: P pairs, S seeds, Q prompts.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orchestrator.report.analysis_files import Rows, write_analysis
from orchestrator.report.comparison import (
    Analysis,
    SetOutcomes,
    regression,
    set_outcomes,
)
from orchestrator.report.results import (
    ScoredTrials,
    TrialResult,
    by_seeds,
    results_of,
    scored,
)
from orchestrator.report.statistics import (
    Floats,
    by_decile,
    rank_correlation,
    right,
)
from orchestrator.report.tables import Table, reward_title
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store
from orchestrator.store.records import read_declaration
from trainers.data.texts import bag, nearest_overlap, similarity, words
from trainers.errors import DataError, SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The findings of a study: sentences, tables, the content of results.json, and rows by file name."""

    said: Sequence[str] = ()
    tables: Sequence[Table]
    results: Mapping[str, Any]
    rows: Mapping[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A question to the scores of a sweep. Raise `version` when `find` gives other results for the same scores.

    `sweep` is the default of --sweep.
    """

    name: str
    version: int
    find: Callable[[list[TrialResult], AnalysisInputs], Findings]
    sweep: str = "full_grid"

    def compute(self, stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
        """Compute the findings and write them, below sentences about the data."""
        results, basis = results_of(stage.parameters, inputs.store)
        found = self.find(results, inputs)
        write_analysis(
            attempt,
            inputs.name,
            [basis, *found.said],
            found.tables,
            results=found.results,
            rows=found.rows,
        )


def titled(rows: Rows) -> list[dict[str, Any]]:
    """Return the rows with the reward types as the field writes them."""
    return [{**row, "reward": reward_title(row["reward"])} for row in rows]


def learned_cells(results: Sequence[TrialResult]) -> Iterator[tuple[dict[str, Any], list[TrialResult]]]:
    """Yield the learned trials that differ only in their seed, and the labels of their rows."""
    for trials in by_seeds([item for item in results if item.learned]):
        record = trials[0].record
        names = {"train_set": record.train_set, "model": record.model, "reward": record.reward}
        yield {**names, "seeds": len(trials)}, trials


def scored_of(store: Store, sweep: str, model: str, train_set: str) -> tuple[ScoredTrials, Mapping[str, Any]]:
    """Return a model's complete trials on a training set, and the parameters of the first. Raises SpecError if there is none."""
    complete = scored(store, sweep)
    trials = tuple(item for item in complete.trials if (item.model, item.train_set) == (model, train_set))
    if not trials:
        raise SpecError(
            f"--sweep {sweep} has no complete trial of {model} on {train_set}; give its --models and --train-set."
        )
    declared = {item.name: item.parameters for item in read_declaration(sweep, store).trials}
    return replace(complete, trials=trials), declared[trials[0].name]


# Pair by pair: which features does the difference of two reward types correlate with?

FEATURES = ("length_difference", "overlap_with_training", "similarity", "leaked")
Features = Mapping[str, Floats]


def pair_features(item: SetOutcomes, store: Store) -> Features:
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


def differences(
    analysis: Analysis, store: Store
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Return each pair's differences with its features, their regressions, and the unknown features.

    Differences are baseline − each other reward type.
    """
    pairs = list[dict[str, Any]]()
    features: dict[tuple[str, str], Features] = {}
    for other in analysis.others:
        names = {"baseline": analysis.baseline, "other": other}
        for item in set_outcomes(analysis, tuple(names.values())):
            place = item.train_set, item.dataset
            if place not in features:
                features[place] = pair_features(item, store)
            pairs += [{**names, **row} for row in pair_rows(item, features[place])]
    lacking = [
        f"{dataset} after {train_set} lacks {', '.join(missing).replace('_', ' ')}"
        for (train_set, dataset), known in features.items()
        if (missing := [name for name in FEATURES if name not in known])
    ]
    return pairs, by_features(pairs), lacking


def pair_rows(item: SetOutcomes, known: Features) -> Iterator[dict[str, Any]]:
    """Yield each pair with both of its differences and its features."""
    for at, index in enumerate(item.index):
        yield {
            "train_set": item.train_set,
            "evaluation_set": item.dataset,
            "category": item.category,
            "index": int(index),
            "gap": float(item.gap[at]),
            "margin_gap": float(item.margin_gap[at]),
            **{name: float(known[name][at]) if name in known else None for name in FEATURES},
        }


def by_features(pairs: Rows) -> list[dict[str, Any]]:
    """Regress both differences of each category's pairs on the features that all of its sets have, with an intercept per set."""
    import pandas as pd

    rows = []
    labels = ["baseline", "other", "train_set", "category"]
    for place, group in pd.DataFrame(pairs).groupby(labels, sort=False) if pairs else ():
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


# Pair by pair: how near is it to training?

TOGETHER = "together"
Nearness = Mapping[int, Mapping[str, float]]


def by_nearness(
    outcomes: Sequence[SetOutcomes], near: Mapping[str, Nearness], measures: Sequence[str]
) -> tuple[Rows, Rows, Rows]:
    """Return the pairs, accuracy by tenths of each measure, and its rank correlation, for each set and all sets together.

    `near` holds by set and row the measures of a pair; other pairs do not count. Raises DataError if there are none.
    """
    pairs: list[dict[str, Any]] = [
        {"set": name, "index": index, **near[name][index]}
        | {kind: float(right_P[at]) for kind, right_P in item.right.items()}
        for item in outcomes
        for name in [item.dataset]
        for at, index in enumerate(item.index.tolist())
        if index in near[name]
    ]
    if not pairs:
        raise DataError(
            "no pair that was scored is among those drawn here; give the sweep's --max-eval-pairs."
        )
    kinds = list(outcomes[0].right)
    sets = list(dict.fromkeys(row["set"] for row in pairs))
    deciles, relations = list[dict[str, Any]](), list[dict[str, Any]]()
    for name in [*sets, *([TOGETHER] if len(sets) > 1 else [])]:
        here = [row for row in pairs if name in (TOGETHER, row["set"])]
        for measure, kind in itertools.product(measures, kinds):
            labels = {"set": name, "measure": measure, "reward": kind}
            # Cosines of equal states differ only by rounding.
            nearness_P, right_P = (np.round([row[side] for row in here], 9) for side in (measure, kind))
            deciles += [{**labels, **row} for row in by_decile(nearness_P, right_P)]
            relations.append(
                {
                    **labels,
                    "pairs": len(here),
                    "correlation": rank_correlation(nearness_P, right_P),
                }
            )
    return pairs, deciles, relations


# Prompt by prompt.


def right_by_prompt(trial: TrialResult, dataset: str, store: Store) -> Floats:
    """Return the accuracy on each prompt's pairs, [Q], in the order of the prompts' first pairs."""
    result = next(item for item in trial.final if item.dataset == dataset)
    pairs, scores = pairs_of(store, result.dataset_digest), result.scores
    # Without the rows, every pair counts as a prompt of its own.
    asked = [pairs[row].prompt if pairs else row for row in scores.index]
    numbers: dict[Any, int] = {}
    prompt_P = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in asked])
    return np.bincount(prompt_P, right(scores.chosen, scores.rejected)) / np.bincount(prompt_P)
