"""What each pair of an evaluation set got from each reward type, averaged over seeds and then models.

Retraining adds no test pairs, so a pair is the unit of every statistic of why one type is ahead. Only trials that learned
count, and only cells of model and seed that have all of the reward types asked for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.report import statistics
from orchestrator.report.audit import leaked_rows
from orchestrator.report.results import TrialResult
from orchestrator.report.statistics import Floats
from orchestrator.report.summary import COMPARED
from orchestrator.spec.trials import CATEGORIES, Category
from orchestrator.store.artifacts import Store
from orchestrator.store.records import EvaluationRecord
from trainers.scores import PairScores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SetOutcomes:
    """Of the pairs of one set, P of them, after one training set; `index` are their rows in the source split.

    `right` is by reward type the share of cells that rank the pair right; `margin` the mean margin in standard deviations
    of the set's rewards; `longer` by how many tokens chosen is longer; `leaked` is None where training rows are not known.
    """

    train_set: str
    dataset: str
    category: Category
    train_digest: str
    dataset_digest: str
    index: NDArray[np.int64]
    right: Mapping[str, Floats]
    margin: Mapping[str, Floats]
    longer: Floats
    leaked: NDArray[np.bool_] | None
    models: tuple[str, ...]
    cells: int

    @property
    def gap(self) -> Floats:
        """EX−IM of the share ranked right."""
        return self.right["ex_rm"] - self.right["im_rm"]

    @property
    def margin_gap(self) -> Floats:
        """EX−IM of the scaled margin."""
        return self.margin["ex_rm"] - self.margin["im_rm"]


def set_outcomes(
    results: Sequence[TrialResult], store: Store, rewards: Sequence[str] = COMPARED
) -> list[SetOutcomes]:
    """One per training set and evaluation set that all of `rewards` have learned and scored, in the categories' order."""
    wanted = dict.fromkeys(
        (result.record.train_set, item.dataset, item.category) for result in results for item in result.final
    )
    ordered = sorted(wanted, key=lambda item: CATEGORIES.index(item[2]))
    trained = list(dict.fromkeys(name for name, _, _ in wanted))
    return [
        found
        for train_set in trained
        for name, dataset, category in ordered
        if name == train_set
        and (found := _outcomes(results, store, rewards, train_set, dataset, category)) is not None
    ]


def _outcomes(
    results: Sequence[TrialResult],
    store: Store,
    rewards: Sequence[str],
    train_set: str,
    dataset: str,
    category: Category,
) -> SetOutcomes | None:
    cells: dict[tuple[str, int], dict[str, PairScores]] = {}
    digests: tuple[str, str] = ("", "")
    for result in results:
        if result.record.train_set != train_set or not result.learned:
            continue
        if category not in result.category_accuracy():
            # A category is the mean of all its sets, over the same cells.
            continue
        for item in result.final:
            if (item.dataset, item.category) == (dataset, category):
                cell = cells.setdefault((result.record.model, result.record.seed), {})
                cell[result.record.reward] = item.scores
                digests = (
                    result.record.train_digest,
                    _record(result.record.evaluations, dataset).dataset_digest,
                )
    whole = {cell: found for cell, found in cells.items() if all(kind in found for kind in rewards)}
    if not whole:
        return None
    index = np.unique(np.concatenate([scores.index for found in whole.values() for scores in found.values()]))

    def mean(values: Iterable[tuple[str, Floats]]) -> Floats:
        """Over seeds, then over the models that have the pair."""
        return np.nanmean([np.mean(rows, axis=0) for rows in _by_model(values).values()], axis=0)

    leaked = leaked_rows(store, *digests)
    return SetOutcomes(
        train_set=train_set,
        dataset=dataset,
        category=category,
        train_digest=digests[0],
        dataset_digest=digests[1],
        index=index,
        right={kind: mean(_placed(whole, index, kind, _right)) for kind in rewards},
        margin={kind: mean(_placed(whole, index, kind, _margin)) for kind in rewards},
        longer=mean(_placed(whole, index, rewards[0], lambda scores: scores.longer.astype(np.float64))),
        leaked=None if leaked is None else np.isin(index, leaked),
        models=tuple(dict.fromkeys(model for model, _ in whole)),
        cells=len(whole),
    )


def _record(evaluations: Iterable[EvaluationRecord], dataset: str) -> EvaluationRecord:
    return next(item for item in evaluations if item.dataset == dataset)


def _right(scores: PairScores) -> Floats:
    return statistics.right(scores.chosen, scores.rejected)


def _margin(scores: PairScores) -> Floats:
    return statistics.scaled_margins(scores.chosen, scores.rejected)


def _placed(
    cells: Mapping[tuple[str, int], Mapping[str, PairScores]],
    index: NDArray[np.int64],
    kind: str,
    value: Callable[[PairScores], Floats],
) -> Iterator[tuple[str, Floats]]:
    """(model, values by pair) of each cell; not a number where a model's length limit left the pair out."""
    for (model, _), found in cells.items():
        values = np.full(len(index), np.nan)
        values[np.searchsorted(index, found[kind].index)] = value(found[kind])
        yield model, values


def _by_model(values: Iterable[tuple[str, Floats]]) -> dict[str, list[Floats]]:
    found: dict[str, list[Floats]] = {}
    for model, row in values:
        found.setdefault(model, []).append(row)
    return found
