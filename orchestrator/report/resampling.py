"""Bootstrap draws of everything that a sweep has evaluated, made once and shared by every number of its report.

In a draw the same test pairs are drawn for every model, seed and reward type, so a difference of two numbers is taken
pair by pair. A set and its rewritings share their pairs. Models are never resampled: they are the ones asked about.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np

from orchestrator.report.results import EvaluationResult, TrialResult
from orchestrator.report.statistics import (
    DRAWS,
    Floats,
    generator,
    pair_counts,
    resampled_metrics,
    seed_weights,
)

# Numbers held at once while pairs are drawn: 32 MB.
_BLOCK = 4_000_000

Step = Callable[[int, int], None]


def _no_step(done: int, total: int) -> None:
    """Nobody wants to know."""


def pair_groups(results: Sequence[TrialResult]) -> dict[str, str]:
    """Evaluation set → the set whose pairs it holds: its own, or the training set's that it is a rewriting of."""
    groups: dict[str, str] = {}
    for result in results:
        for item in result.record.evaluations:
            if item.category in ("in-distribution", "token-level shift"):
                groups.setdefault(item.dataset, result.record.train_set)
    for result in results:
        for item in result.record.evaluations:
            groups.setdefault(item.dataset, item.dataset)
    return groups


class Resampled:
    """The draws of a sweep; `step` hears how many of how many evaluated sets are through."""

    def __init__(self, results: Sequence[TrialResult], *, draws: int = DRAWS, step: Step = _no_step) -> None:
        self.draws = draws
        self.groups = pair_groups(results)
        self._metrics: dict[tuple[str, str], dict[str, Floats]] = {}
        self._weights = cache(self._drawn_weights)
        found: dict[str, list[tuple[str, EvaluationResult]]] = {}
        for result in results:
            for item in result.final:
                found.setdefault(self.groups[item.dataset], []).append((result.record.key, item))
        total, done = sum(map(len, found.values())), 0.0
        for group, items in found.items():
            for share in self._draw(group, items):
                done += share
                step(round(done), total)

    def of_set(self, trial: str, dataset: str, metric: str) -> Floats:
        """The metric in each draw of pairs, [B]; `trial` is a key."""
        return self._metrics[trial, dataset][metric]

    def weights(self, model: str, train_set: str, seeds: tuple[int, ...]) -> Floats:
        """Weights of a model's seeds in each draw, [B, S]: the same for every reward type."""
        return self._weights(model, train_set, seeds)

    def _drawn_weights(self, model: str, train_set: str, seeds: tuple[int, ...]) -> Floats:
        name = ("seeds", model, train_set, *map(str, seeds))
        return seed_weights(len(seeds), self.draws, generator(*name))

    def _draw(self, group: str, items: Sequence[tuple[str, EvaluationResult]]) -> Iterator[float]:
        units = np.unique(np.concatenate([item.scores.index for _, item in items]))
        block = min(self.draws, max(1, _BLOCK // max(1, len(units))))
        parts: dict[tuple[str, str], list[dict[str, Floats]]] = {}
        for start in range(0, self.draws, block):
            count = min(block, self.draws - start)
            counts_BU = pair_counts(len(units), count, generator("pairs", group, str(start)))
            for trial, item in items:
                columns = np.searchsorted(units, item.scores.index)
                drawn = resampled_metrics(item.scores.chosen, item.scores.rejected, counts_BU[:, columns])
                parts.setdefault((trial, item.dataset), []).append(drawn)
                yield count / self.draws
        for name, blocks in parts.items():
            self._metrics[name] = {
                metric: np.concatenate([part[metric] for part in blocks]) for metric in blocks[0]
            }
