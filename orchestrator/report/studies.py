"""What every analysis is made of: its files, the frame of a study of a finished sweep's scores, and what each study computes.

A study reads the complete trials of one sweep, on the pairs that all of them have, and shows what it finds as tables. A file in
sweeps/ asks its question and shows the answer. An analysis is written as results.json, rows and tables as parquet,
summary.md and figures. Shapes: P pairs, Q prompts.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from orchestrator.report.comparison import Analysis, SetOutcomes, regression, set_outcomes
from orchestrator.report.house_style import rendered
from orchestrator.report.results import ScoredTrials, TrialResult, by_seeds, results_of, scored
from orchestrator.report.statistics import Floats, by_decile, rank_correlation, right
from orchestrator.report.tables import Table, reward_title
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store
from orchestrator.store.records import read_declaration
from trainers.data.texts import bag, nearest_overlap, similarity, words
from trainers.errors import DataError, SpecError

Rows = Sequence[Mapping[str, Any]]


def write_analysis(
    attempt: Attempt,
    title: str,
    paragraphs: Sequence[str],
    tables: Sequence[Table] = (),
    *,
    results: Mapping[str, Any],
    rows: Mapping[str, Rows] | None = None,
    figures: Mapping[str, Callable[[], Any]] | None = None,
) -> None:
    """Write the findings of an analysis into its folder, and `results` into its manifest as well.

    `results` may hold dataclasses, such as estimates. `rows` and `figures` are by file name; a figure's function returns None if
    there is nothing to draw.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, default=asdict)
    (attempt.directory / "results.json").write_text(text)
    attempt.info.update(results=json.loads(text))
    for name, found in (rows or {}).items():
        (attempt.directory / f"{name}.parquet").write_bytes(as_parquet(found))
    for table in tables:
        (attempt.directory / f"{table.name}.parquet").write_bytes(table.parquet())
    (attempt.directory / "summary.md").write_text(as_markdown(title, paragraphs, tables))
    for name, draw in (figures or {}).items():
        if drawn := rendered(name, name, "", draw):
            (attempt.directory / "figures").mkdir(exist_ok=True)
            (attempt.directory / "figures" / f"{name}.png").write_bytes(drawn.png)
            (attempt.directory / "figures" / f"{name}.svg").write_bytes(drawn.svg)


def as_parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return bytes(sink.getvalue().to_pybytes())


def as_markdown(
    title: str, paragraphs: Iterable[str], tables: Sequence[Table], ending: Iterable[str] = ()
) -> str:
    shown = (text for table in tables for text in (f"{table.title}. {table.note}", table.markdown()))
    return "\n\n".join([f"# {title}", *paragraphs, *shown, *ending]) + "\n"


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


def feature_rows(analysis: Analysis, store: Store) -> tuple[list[dict[str, Any]], list[str]]:
    """Return each pair's differences, baseline − each other reward type, with its features; and which features are unknown."""
    pairs = list[dict[str, Any]]()
    features: dict[tuple[str, str], Mapping[str, Floats]] = {}
    for other in analysis.others:
        for item in set_outcomes(analysis, (analysis.baseline, other)):
            place = item.train_set, item.dataset
            known = features[place] = features.get(place) or pair_features(item, store)
            gap_P, margin_gap_P = (
                of_kind[analysis.baseline] - of_kind[other] for of_kind in (item.right, item.margin)
            )
            pairs += [
                {
                    "baseline": analysis.baseline,
                    "other": other,
                    "train_set": item.train_set,
                    "evaluation_set": item.dataset,
                    "category": item.category,
                    "pairs_of": analysis.groups[item.dataset],
                    "index": index,
                    "gap": float(gap_P[at]),
                    "margin_gap": float(margin_gap_P[at]),
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
        # The rewritings of a pair are no other pairs.
        units_P = group.groupby(["pairs_of", "index"]).ngroup().to_numpy().astype(np.int64)
        for outcome, name in (("accuracy", "gap"), ("margin", "margin_gap")):
            if (fitted := regression(group[name].to_numpy(), terms, units_P)) is not None:
                rows.append({**dict(zip(labels, place, strict=True)), "outcome": outcome, "fitted": fitted})
    return rows


# Pair by pair: how near is it to training?

TOGETHER = "together"
# By row, the measures of a pair.
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
            correlation = rank_correlation(nearness_P, right_P)
            relations.append({**labels, "pairs": len(here), "correlation": correlation})
    return pairs, deciles, relations


# Prompt by prompt.


def right_by_prompt(trial: TrialResult, dataset: str) -> Floats:
    """Return the accuracy on each prompt's pairs, [Q], in the order of the prompts' first rows."""
    scores = next(item.scores for item in trial.final if item.dataset == dataset)
    _, prompt_P = np.unique(scores.units, return_inverse=True)
    return np.bincount(prompt_P, right(scores.chosen, scores.rejected)) / np.bincount(prompt_P)
