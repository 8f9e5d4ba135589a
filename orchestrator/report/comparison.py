"""A sweep's numbers with their uncertainty: by category, by set, by model, and EX−IM paired by model, seed and pair.

Only trials that learned enter; a category enters where all of its declared sets are evaluated. Nothing is filled in.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.report import statistics
from orchestrator.report.resampling import Resampled
from orchestrator.report.results import EvaluationResult, TrialResult
from orchestrator.report.scopes import Scope, category_scopes, set_scopes
from orchestrator.report.statistics import Calibration, Estimate, Floats, WinRate
from orchestrator.report.summary import COMPARED


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A metric of one reward type over a scope: of one model, or the mean of several."""

    estimate: Estimate
    models: tuple[str, ...]
    seeds: int
    pairs: int
    draws: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """EX−IM over the model and seed cells that both types learned. `p_pairs` and `p_runs` are of accuracy only."""

    estimate: Estimate
    models: tuple[str, ...]
    runs: int
    pairs: int
    p_pairs: float | None
    p_runs: float | None
    draws: Floats

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes 0 and the permutation of pairs agrees at 5 %."""
        return self.estimate.excludes_zero and (self.p_pairs is None or self.p_pairs < 0.05)


class Analysis:
    """The results of a sweep, asked for any mean and difference; `resampled` holds their draws."""

    def __init__(self, results: Sequence[TrialResult], resampled: Resampled) -> None:
        self.results = results
        self.resampled = resampled
        # Tables, figures and sentences ask for the same numbers.
        self._means: dict[tuple[Scope, str, str, str], Mean | None] = {}
        self._differences: dict[tuple[Scope, str, tuple[str, ...]], Difference | None] = {}
        self.train_sets = _unique(result.record.train_set for result in results)
        self.models = _unique(result.record.model for result in results)
        found = _unique(result.record.reward for result in results)
        self.rewards = [
            *(kind for kind in COMPARED if kind in found),
            *sorted(kind for kind in found if kind not in COMPARED),
        ]

    @property
    def both(self) -> bool:
        """Whether there are explicit and implicit reward models to compare."""
        return all(kind in self.rewards for kind in COMPARED)

    def categories(self) -> Iterator[Scope]:
        """Each training set's categories."""
        return category_scopes(self.results)

    def single_sets(self) -> Iterator[Scope]:
        """Each training set's evaluation sets, Spanish beside French."""
        return set_scopes(self.results)

    def trials(self, scope: Scope, model: str, reward: str) -> dict[int, TrialResult]:
        """By seed: the trials that learned and whose sets of the scope are all evaluated."""
        return {
            result.record.seed: result
            for result in self.results
            if (result.record.train_set, result.record.model, result.record.reward)
            == (scope.train_set, model, reward)
            and result.learned
            and set(scope.sets) <= {item.dataset for item in result.final}
        }

    def mean(self, scope: Scope, model: str, reward: str, metric: str) -> Mean | None:
        """Over the seeds of one model; None where none counts."""
        asked = (scope, model, reward, metric)
        if asked not in self._means:
            self._means[asked] = self._mean(scope, model, reward, metric)
        return self._means[asked]

    def _mean(self, scope: Scope, model: str, reward: str, metric: str) -> Mean | None:
        trials = self.trials(scope, model, reward)
        if not trials:
            return None
        value, draws, by_seed = self._over_seeds(scope, model, trials, metric)
        pairs = _pairs(trials.values(), scope)
        return Mean(
            estimate=_estimate(metric, value, draws, pairs, by_seed),
            models=(model,),
            seeds=len(trials),
            pairs=pairs,
            draws=draws,
        )

    def mean_of_models(
        self, scope: Scope, reward: str, metric: str, models: Sequence[str] | None = None
    ) -> Mean | None:
        """Over the complete models, or over `models`; None where there is none."""
        means = [
            mean
            for model in (self.complete_models(scope) if models is None else models)
            if (mean := self.mean(scope, model, reward, metric)) is not None
        ]
        if not means:
            return None
        draws = np.mean([mean.draws for mean in means], axis=0)
        value = float(np.mean([mean.estimate.value for mean in means]))
        pairs = max(mean.pairs for mean in means)
        return Mean(
            estimate=_estimate(metric, value, draws, pairs),
            models=tuple(mean.models[0] for mean in means),
            seeds=min(mean.seeds for mean in means),
            pairs=pairs,
            draws=draws,
        )

    def complete_models(self, scope: Scope) -> list[str]:
        """The models that have every reward type that they were declared with; one that no model has is not waited for."""
        declared = {(item.record.model, item.record.reward) for item in self.results if _of(item, scope)}
        counts = {cell for cell in declared if self.trials(scope, *cell)}
        known = {kind for _, kind in counts}
        lacking = {model for model, kind in declared - counts if kind in known}
        return [
            model
            for model in self.models
            if model not in lacking and any(model == name for name, _ in counts)
        ]

    def difference(self, scope: Scope, metric: str, models: Sequence[str] | None = None) -> Difference | None:
        """EX−IM of `models` (default: all), each with the seeds that both types have; None where none has."""
        asked = (scope, metric, tuple(self.models if models is None else models))
        if asked not in self._differences:
            self._differences[asked] = self._difference(*asked)
        return self._differences[asked]

    def _difference(self, scope: Scope, metric: str, models: tuple[str, ...]) -> Difference | None:
        paired = {model: common for model in models if (common := self._paired(scope, model))}
        if not paired:
            return None
        values, draws, runs = [], [], list[float]()
        for model, common in paired.items():
            sides = [
                self._over_seeds(scope, model, {seed: pair[side] for seed, pair in common.items()}, metric)
                for side in (0, 1)
            ]
            (explicit, explicit_B, explicit_S), (implicit, implicit_B, implicit_S) = sides
            values.append(explicit - implicit)
            draws.append(explicit_B - implicit_B)
            by_seed = [a - b for a, b in zip(explicit_S, implicit_S, strict=True)]
            runs += [gap / len(by_seed) / len(paired) for gap in by_seed]
        tested = metric == "accuracy"
        pairs = max(_pairs((pair[0] for pair in common.values()), scope) for common in paired.values())
        spread = by_seed if len(paired) == 1 else ()
        value, draws_B = float(np.mean(values)), np.mean(draws, axis=0)
        return Difference(
            estimate=statistics.difference_estimate(value, draws_B, pairs, spread)
            if tested
            else statistics.estimate(value, draws_B, spread),
            models=tuple(paired),
            runs=len(runs),
            pairs=pairs,
            p_pairs=statistics.permutation_p(self._by_pair(scope, paired)) if tested else None,
            p_runs=statistics.permutation_p(np.array(runs)) if tested else None,
            draws=draws_B,
        )

    def compared(self, scope: Scope) -> list[TrialResult]:
        """The trials of the models and seeds that have both EX-RM and IM-RM."""
        return [
            item for model in self.models for pair in self._paired(scope, model).values() for item in pair
        ]

    def win_rate(self, scope: Scope) -> WinRate:
        """Cells of model, seed and set in which EX-RM's accuracy is ahead of IM-RM's."""
        gaps = [
            _metric(explicit, name, "accuracy") - _metric(implicit, name, "accuracy")
            for model in self.models
            for name in scope.sets
            for explicit, implicit in self._paired(scope.alone(name), model).values()
        ]
        return statistics.win_rate(gaps)

    def side_metric(self, scope: Scope, model: str, reward: str, metric: str) -> float | None:
        """A metric that evaluations may or may not carry, mean over sets, then seeds; None where one lacks it."""
        return _side_metric(self.trials(scope, model, reward).values(), scope, metric)

    def side_differences(self, scope: Scope, metric: str) -> tuple[float, float] | None:
        """EX−IM of a side metric and of accuracy, over the models and seeds that have the former with both types."""
        gaps = []
        for model in self.models:
            sides = list(zip(*self._paired(scope, model).values(), strict=True))
            found = [_side_metric(side, scope, name) for name in (metric, "accuracy") for side in sides]
            match found:
                case [float() as explicit, float() as implicit, float() as plain, float() as other]:
                    gaps.append((explicit - implicit, plain - other))
        if not gaps:
            return None
        controlled, accuracy = np.mean(gaps, axis=0)
        return float(controlled), float(accuracy)

    def margins(self, scope: Scope, reward: str, *, scaled: bool) -> Floats:
        """Margins of every pair of every trial that counts, over the spread of their rewards where `scaled`."""
        found = [
            statistics.scaled_margins(item.scores.chosen, item.scores.rejected)
            if scaled
            else item.scores.chosen - item.scores.rejected
            for model in self.models
            for trial in self.trials(scope, model, reward).values()
            for item in _items(trial, scope)
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def calibration(self, scope: Scope, reward: str) -> Calibration | None:
        """Of every pair of every trial that counts; None where there is none."""
        margins = self.margins(scope, reward, scaled=False)
        return statistics.calibration(margins) if len(margins) else None

    def _over_seeds(
        self, scope: Scope, model: str, trials: dict[int, TrialResult], metric: str
    ) -> tuple[float, Floats, list[float]]:
        """The mean over seeds of the mean over sets: its value, its draws [B], and the values by seed."""
        seeds = tuple(sorted(trials))
        by_seed = [
            float(np.mean([_metric(trials[seed], name, metric) for name in scope.sets])) for seed in seeds
        ]
        draws_BS = np.stack(
            [
                np.mean(
                    [self.resampled.of_set(trials[seed].record.key, name, metric) for name in scope.sets],
                    axis=0,
                )
                for seed in seeds
            ],
            axis=1,
        )
        weights_BS = self.resampled.weights(model, scope.train_set, seeds)
        return float(np.mean(by_seed)), (weights_BS * draws_BS).sum(axis=1), by_seed

    def _paired(self, scope: Scope, model: str) -> dict[int, tuple[TrialResult, TrialResult]]:
        explicit, implicit = (self.trials(scope, model, kind) for kind in COMPARED)
        return {seed: (explicit[seed], implicit[seed]) for seed in sorted(set(explicit) & set(implicit))}

    def _by_pair(self, scope: Scope, paired: dict[str, dict[int, tuple[TrialResult, TrialResult]]]) -> Floats:
        """What each test pair adds to EX−IM: one number per pair, since seeds and models add no test pairs."""
        added: dict[tuple[str, int], float] = {}
        for common in paired.values():
            for explicit, implicit in common.values():
                for ours, theirs in zip(_items(explicit, scope), _items(implicit, scope), strict=True):
                    index, mine, yours = np.intersect1d(
                        ours.scores.index, theirs.scores.index, return_indices=True
                    )
                    gap = (
                        statistics.right(ours.scores.chosen, ours.scores.rejected)[mine]
                        - statistics.right(theirs.scores.chosen, theirs.scores.rejected)[yours]
                    ) / (len(index) * len(common) * len(paired) * len(scope.sets))
                    group = self.resampled.groups[ours.dataset]
                    for unit, value in zip(index.tolist(), gap.tolist(), strict=True):
                        added[group, unit] = added.get((group, unit), 0.0) + value
        return np.array(list(added.values()))


def _estimate(
    metric: str, value: float, draws: Floats, pairs: int, by_seed: Sequence[float] = ()
) -> Estimate:
    if metric == "accuracy":
        return statistics.accuracy_estimate(value, draws, pairs, by_seed)
    return statistics.estimate(value, draws, by_seed)


def _of(result: TrialResult, scope: Scope) -> bool:
    return result.record.train_set == scope.train_set


def _items(trial: TrialResult, scope: Scope) -> list[EvaluationResult]:
    found = {item.dataset: item for item in trial.final}
    return [found[name] for name in scope.sets]


def _side_metric(trials: Iterable[TrialResult], scope: Scope, metric: str) -> float | None:
    values = [item.metrics.get(metric) for trial in trials for item in _items(trial, scope)]
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _metric(trial: TrialResult, dataset: str, metric: str) -> float:
    return next(item.metrics[metric] for item in trial.final if item.dataset == dataset)


def _pairs(trials: Iterable[TrialResult], scope: Scope) -> int:
    """Pairs of the largest set."""
    return max(len(item.scores.index) for trial in trials for item in _items(trial, scope))


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
