"""Pairs that length limits leave out: which pairs models are compared on, and what is said of the others.

A model's tokenizer decides which pairs are over the limits, so that models may have scored different pairs of one set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.report.results import EvaluationResult, TrialResult, pair_metrics
from orchestrator.report.tables import Table, columns
from trainers.scores import PairScores

# Training set, evaluation set, digest of its rows.
_Place = tuple[str, str, str]


def on_common_pairs(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The results with every set's numbers over the pairs that all trials of its training set have of it.

    A set of which they have no pair in common is in none of them.
    """
    common: dict[_Place, NDArray[np.int64]] = {}
    for result in results:
        for place, item in _placed(result):
            known = common.get(place, item.scores.index)
            if not np.array_equal(known, item.scores.index):
                known = np.intersect1d(known, item.scores.index)
            common[place] = known
    return [_restricted(result, common) for result in results]


def _placed(result: TrialResult) -> list[tuple[_Place, EvaluationResult]]:
    digests = {item.dataset: item.dataset_digest for item in result.record.evaluations}
    return [
        ((result.record.train_set, item.dataset, digests[item.dataset]), item) for item in result.evaluations
    ]


def _restricted(result: TrialResult, common: dict[_Place, NDArray[np.int64]]) -> TrialResult:
    placed = _placed(result)
    if all(len(common[place]) == len(item.scores.index) for place, item in placed):
        return result
    nothing = {item.dataset for place, item in placed if not len(common[place])}
    wanted = tuple(item for item in result.record.evaluations if item.dataset not in nothing)
    return replace(
        result,
        record=replace(result.record, evaluations=wanted),
        evaluations=tuple(_of(item, common[place]) for place, item in placed if len(common[place])),
    )


def _of(item: EvaluationResult, rows: NDArray[np.int64]) -> EvaluationResult:
    kept = np.isin(item.scores.index, rows)
    if kept.all():
        return item
    scores = PairScores(
        chosen=item.scores.chosen[kept],
        rejected=item.scores.rejected[kept],
        index=item.scores.index[kept],
        longer=item.scores.longer[kept],
    )
    leaked = None if item.leaked is None else item.leaked[kept]
    return replace(item, scores=scores, leaked=leaked, metrics=pair_metrics(scores, leaked))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairUse:
    """What a model uses of a set, and what was left out for length. `compared` is None of the pairs trained on."""

    train_set: str
    dataset: str
    model: str
    pairs: int
    left_out: int
    compared: int | None


def pair_uses(results: Sequence[TrialResult]) -> list[PairUse]:
    """Every model's use of each set of which any pair was left out for length, or of which models have other pairs."""
    found: dict[tuple[str, str, str], PairUse] = {}
    for result, shared in zip(results, on_common_pairs(results), strict=True):
        record = result.record
        if result.trained:
            found[record.train_set, "", record.model] = PairUse(
                train_set=record.train_set,
                dataset="",
                model=record.model,
                pairs=result.train_pairs,
                left_out=result.train_left_out,
                compared=None,
            )
        counts = {item.dataset: len(item.scores.index) for item in shared.evaluations}
        for item in result.evaluations:
            found[record.train_set, item.dataset, record.model] = PairUse(
                train_set=record.train_set,
                dataset=item.dataset,
                model=record.model,
                pairs=len(item.scores.index),
                left_out=item.left_out,
                compared=counts.get(item.dataset, 0),
            )
    told = {
        (use.train_set, use.dataset)
        for use in found.values()
        if use.left_out or use.compared not in (None, use.pairs)
    }
    places = dict.fromkeys((use.train_set, use.dataset) for use in found.values())
    return [
        use
        for place in places
        if place in told
        for use in found.values()
        if (use.train_set, use.dataset) == place
    ]


def left_out_lines(results: Sequence[TrialResult]) -> list[str]:
    """Say for each set how many pairs each model lacks, and on how many all models are compared."""
    groups: dict[tuple[str, str], list[PairUse]] = {}
    for use in pair_uses(results):
        groups.setdefault((use.train_set, use.dataset), []).append(use)
    trained_on: dict[str, list[str]] = {}
    for (train_set, _), uses in groups.items():
        trained_on.setdefault(_line(uses), []).append(train_set)
    # What is evaluated after every training set alike is said once.
    several = len({result.record.train_set for result in results}) > 1
    return [
        f"{line} (trained on {', '.join(names)})" if several and not line.startswith(_TRAINED) else line
        for line, names in trained_on.items()
    ]


_TRAINED = "left out for length, trained on"


def _line(uses: Sequence[PairUse]) -> str:
    first = uses[0]
    counts = {use.model: f"{use.left_out} of {use.pairs + use.left_out} pairs" for use in uses}
    said = ", ".join(f"{count} for {model}" for model, count in counts.items())
    if len(uses) > 1 and len(set(counts.values())) == 1:
        said = f"{counts[first.model]} for every model"
    if first.compared is None:
        return f"{_TRAINED} {first.train_set}: {said}"
    line = f"left out for length, evaluated on {first.dataset}: {said}"
    if all(use.compared == use.pairs for use in uses):
        return line
    if not first.compared:
        return f"{line}; no pair is left that all have, so this set is in no comparison"
    having = ", ".join(f"{use.model} has {use.pairs}" for use in uses)
    return f"{line}; compared on the {first.compared} pairs that all have ({having})"


def left_out_table(results: Sequence[TrialResult]) -> Table:
    """The same as a table."""
    return Table(
        name="left_out",
        title="Pairs left out for length",
        note="Over --max-prompt-tokens or --max-response-tokens, by each model's own tokenizer. Tables that set models side by "
        "side are of the pairs that all of them have.",
        columns=columns(
            ("train_set", "trained on"),
            ("evaluation_set", "evaluated on"),
            ("model", "model"),
            ("pairs", "pairs"),
            ("left_out", "left out"),
            ("compared", "compared on"),
        ),
        rows=tuple(
            (use.train_set, use.dataset or "–", use.model, use.pairs, use.left_out, use.compared)
            for use in pair_uses(results)
        ),
    )
