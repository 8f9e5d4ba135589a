"""Means and differences of reward types with their uncertainty: by category, set and model, and pair by pair.

A trial counts if it learned and was evaluated on all sets of a scope. A difference is *baseline − other*, over the cells of
model and seed that have both types. Missing values are never filled in. The intervals of `Analysis` cover other models, seeds and
test pairs. `SetOutcomes` and `regression` relate the difference on each pair to the pair's features, for the given trainings.

Shapes: P pairs of a set, U different pairs of sets that share them, K trainings, K terms of a regression.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.report import statistics
from orchestrator.report.results import EvaluationResult, TrialResult
from orchestrator.report.statistics import Calibration, Estimate, Floats, WinRate
from orchestrator.report.tables import number_of, reward_title, span
from orchestrator.store.records import CATEGORIES, Category
from trainers.data.known import named_set
from trainers.errors import SpecError
from trainers.evaluate.metrics import chance_bound, length_controlled
from trainers.evaluate.scores import PairScores

# With this many models or more, an interval covers other models too.
MODELS_NEEDED = 4
# Numbers in memory at once while single pairs are left out: 32 MB.
_BLOCK = 4_000_000
LENGTH_CONTROLLED, LEAK_FREE = "accuracy_length_controlled", "accuracy_leak_free"
# Accuracies that neither length nor leaks can help.
CONTROLS = {LENGTH_CONTROLLED: "length-controlled", LEAK_FREE: "leak-free"}
# Sets of these categories hold the training set's pairs, as they are or reworded.
_OF_TRAINING_SET = ("in-distribution", "token-level shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Evaluation sets that are averaged: those of a category, or one set alone (`dataset`) of a category."""

    train_set: str
    category: Category
    sets: tuple[str, ...]
    dataset: str = ""

    def alone(self, name: str) -> "Scope":
        return replace(self, sets=(name,), dataset=name)


def has(result: TrialResult, scope: Scope, metric: str = "accuracy") -> bool:
    """Whether a trial has the metric of all the scope's sets, after its last epoch."""
    return set(scope.sets) <= {item.dataset for item in result.final if metric in item.metrics}


def over_sets(trial: TrialResult, scope: Scope, metric: str = "accuracy") -> float:
    return float(np.mean([_metric(trial, name, metric) for name in scope.sets]))


def pair_groups(results: Sequence[TrialResult]) -> dict[str, str]:
    """Return for each evaluation set whose pairs it holds: a training set's, those of the known set that it rewrites, or its own."""
    groups: dict[str, str] = {}
    for result in results:
        for item in result.record.evaluations:
            if item.category in _OF_TRAINING_SET:
                groups.setdefault(item.dataset, result.record.train_set)
    # Two names may stand for the same rows, and a known set and its rewritings may all be of another domain.
    rows = {item.dataset: item.dataset_digest for result in results for item in result.record.evaluations}
    originals = {name: known.rewriting_of or name for name in rows if (known := named_set(name))}
    of_rows = {rows[name]: group for name, group in groups.items()}
    own = {name: rows.get(original, original) for name in rows for original in [originals.get(name, name)]}
    return {name: of_rows.get(found, found) for name, found in own.items()} | groups


def added_by_pairs(item: EvaluationResult, metric: str) -> Floats:
    """Return what each pair adds to a metric of an evaluation, [P]. Raises SpecError for a metric that is not a mean over pairs."""
    scores, value = item.scores, item.metrics[metric]
    right_P, pairs = _right(scores), len(scores.index)
    means: dict[str, Floats] = {
        "accuracy": right_P,
        "loss": np.logaddexp(0.0, scores.rejected - scores.chosen),
    }
    if metric in means:
        return means[metric] / pairs
    if pairs == 1:
        return np.array([value])
    if metric == LEAK_FREE and item.leaked is not None:
        unseen_P = ~item.leaked
        return value / pairs + unseen_P * (right_P - value) / unseen_P.sum()
    if metric == LENGTH_CONTROLLED:
        block = max(1, _BLOCK // pairs)
        found = [
            length_controlled(right_P, scores.longer, 1.0 - np.eye(min(block, pairs - start), pairs, k=start))
            for start in range(0, pairs, block)
        ]
        return statistics.jackknifed(value, np.concatenate([part for part in found if part is not None]))
    if metric == "abs_margin":
        return statistics.jackknifed(value, statistics.margin_without_each(scores.chosen, scores.rejected))
    intervals = ", ".join((*means, LENGTH_CONTROLLED, LEAK_FREE, "abs_margin"))
    raise SpecError(f"{metric} has no interval, as it is not made of pairs; give one of {intervals}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean:
    """A metric of one reward type, or a difference: the mean over a scope's sets, then over seeds, then over models.

    `cells` are the trials of each model and seed, whose values are added with `signs`: (1,) of one type, (1, −1) of a
    difference. `groups` says which sets share their pairs. Slow values are computed on first use.
    """

    scope: Scope
    metric: str
    cells: Mapping[str, Mapping[int, tuple[TrialResult, ...]]]
    signs: tuple[int, ...]
    groups: Mapping[str, str]
    added: Callable[[EvaluationResult, str], Floats]

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self.cells)

    @property
    def seeds(self) -> int:
        return min(map(len, self.cells.values()))

    @property
    def runs(self) -> int:
        return sum(map(len, self.cells.values()))

    @cached_property
    def values(self) -> list[list[float]]:
        return [
            [
                sum(
                    sign * over_sets(trial, self.scope, self.metric)
                    for sign, trial in zip(self.signs, cell, strict=True)
                )
                for cell in seeds.values()
            ]
            for seeds in self.cells.values()
        ]

    @cached_property
    def by_model(self) -> list[float]:
        return [float(np.mean(of_model)) for of_model in self.values]

    @cached_property
    def value(self) -> float:
        """The mean itself; a difference is rounded, as equal means may differ in their last bit."""
        found = float(np.mean(self.by_model))
        return found if len(self.signs) == 1 else round(found, 12)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds of one model; None below two, and of a mean over models."""
        shown = len(self.values) == 1 and len(self.values[0]) > 1
        return float(np.std(self.values[0], ddof=1)) if shown else None

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The pairs and the different prompts of each set."""
        first = next(iter(next(iter(self.cells.values())).values()))[0]
        scores = [item.scores for item in _items(first, self.scope)]
        return [(len(item.index), len(np.unique(item.units))) for item in scores]

    @property
    def pairs(self) -> int:
        """The pairs of the smallest set."""
        return min(pairs for pairs, _ in self.sizes)

    @property
    def at_chance(self) -> bool:
        """Whether this is an in-distribution accuracy that is no better than chance."""
        # The mean over sets varies as an accuracy on so many pairs.
        pairs = len(self.sizes) ** 2 / sum(1 / pairs for pairs, _ in self.sizes)
        return (
            (self.metric, self.scope.category, self.signs) == ("accuracy", "in-distribution", (1,))
            and self.value <= chance_bound(pairs)
        )  # fmt: skip

    @property
    def over_models(self) -> bool:
        """Whether the interval covers other models, not only other trainings of these models."""
        return len(self.cells) >= MODELS_NEEDED

    @property
    def over(self) -> str:
        """Say what the interval covers: `6 models, 3 seeds, 200 pairs`."""
        models, seeds = number_of(len(self.cells), "model"), span([*map(len, self.cells.values())], "seed")
        of_pairs, of_prompts = zip(*self.sizes, strict=True)
        pairs = span(of_pairs, "pair")
        if of_prompts != of_pairs:
            pairs += f" of {span(of_prompts, 'prompt')}"
        if self.over_models:
            return f"{models}, {seeds}, {pairs}"
        own = "this model" if len(self.cells) == 1 else f"these {models}"
        if self.spread.trainings:
            return f"{seeds}, {pairs} of {own}"
        return f"{pairs} of one training of {own}"

    @cached_property
    def columns(self) -> tuple[list[Floats], NDArray[np.int64]]:
        """What each prompt, or pair of its own prompt, adds in each training, [U, S] by model, and the number of its group, [U]."""
        return self._columns(corrected=True)

    def _columns(self, *, corrected: bool) -> tuple[list[Floats], NDArray[np.int64]]:
        cells = [cell for seeds in self.cells.values() for cell in seeds.values()]
        units: dict[str, NDArray[np.int64]] = {}
        for name in self.scope.sets:
            group, own = self.groups[name], _item(cells[0][0], name).scores.units
            units[group] = np.union1d(own, units.get(group, own))
        ends = np.cumsum([len(found) for found in units.values()])
        columns = np.zeros((ends[-1], len(cells)))
        blocks = dict(zip(units, np.split(columns, ends[:-1]), strict=True))
        for number, cell in enumerate(cells):
            for (sign, trial), name in itertools.product(zip(self.signs, cell, strict=True), self.scope.sets):
                item, group = _item(trial, name), self.groups[name]
                added_P, units_P = self.added(item, self.metric), item.scores.units
                added_U = statistics.by_unit(added_P, units_P, units[group], corrected=corrected)
                blocks[group][:, number] += sign * added_U / len(self.scope.sets)
        by_model = np.split(columns, np.cumsum([len(seeds) for seeds in self.cells.values()])[:-1], axis=1)
        return by_model, np.repeat(np.arange(len(units)), [len(found) for found in units.values()])

    @cached_property
    def spread(self) -> statistics.Spread:
        """The variance of the value, and its degrees of freedom."""
        by_model, groups_U = self.columns
        if self.over_models:
            by_model = [np.stack([columns.mean(axis=1) for columns in by_model], axis=1)]
        return statistics.crossed(by_model, groups_U)

    @cached_property
    def estimate(self) -> Estimate:
        """The value with its interval and p, and with the spread over seeds of one model."""
        if self.metric.startswith("accuracy"):
            floor = 1 - len(self.signs)
            prompts, units = min(prompts for _, prompts in self.sizes), len(self.columns[1])
            found = statistics.bounded_interval(self.value, self.spread, prompts, floor=floor, units=units)
        else:
            found = statistics.unbounded_interval(self.value, self.spread)
        told = len(self.signs) > 1 and self.spread.trainings > 0
        return replace(found, std=self.std, p=found.p if told else None)

    @cached_property
    def p_pairs(self) -> float:
        """Return the p of a test that flips signs test pair by test pair, for these trainings: seeds and models add no test pairs."""
        by_model, _ = self._columns(corrected=False)
        mean_U: Floats = np.mean([columns.mean(axis=1) for columns in by_model], axis=0)
        return statistics.permutation_p(np.round(mean_U, 12))


class Analysis:
    """Computes means and differences of a sweep's results, which must be on the pairs that all models have.

    Differences are `baseline` − each of `others`, the other reward types. The default baseline is the sweep's first type.
    Raises KeyError if the sweep has no such type.
    """

    def __init__(self, results: Sequence[TrialResult], baseline: str | None = None) -> None:
        self.results = results
        self._of: dict[tuple[str, str], list[TrialResult]] = {}
        for result in results:
            self._of.setdefault((result.record.train_set, result.record.model), []).append(result)
        self.groups = pair_groups(results)
        # Tables, figures and sentences ask for the same numbers.
        self._known = cache(self._over_models)
        self._added: dict[tuple[str, str, str], Floats] = {}
        self.train_sets = _unique(result.record.train_set for result in results)
        self.models = _unique(result.record.model for result in results)
        found = _unique(result.record.reward for result in results)
        if baseline is not None and baseline not in found:
            raise KeyError(baseline)
        self.rewards = _unique([*([baseline] if baseline else []), *found])
        self.baseline, self.others = (self.rewards or [""])[0], self.rewards[1:]

    def title(self, other: str) -> str:
        """Write the difference from another type: `EX-RM − IM-RM`."""
        return f"{reward_title(self.baseline)} − {reward_title(other)}"

    def categories(self) -> Iterator[Scope]:
        """Yield the evaluation sets of each training set and category."""
        for train_set, category in itertools.product(self.train_sets, CATEGORIES):
            here = (item.record for item in self.results if item.record.train_set == train_set)
            sets = _unique(
                item.dataset for record in here for item in record.evaluations if item.category == category
            )
            if sets:
                yield Scope(train_set=train_set, category=category, sets=tuple(sets))

    def single_sets(self) -> Iterator[Scope]:
        return (scope.alone(name) for scope in self.categories() for name in scope.sets)

    def mean(
        self, scope: Scope, reward: str, metric: str, models: Sequence[str] | None = None
    ) -> Mean | None:
        """Return the mean over seeds, then over the complete models, or over `models`; None where no trial counts."""
        asked = self.complete_models(scope) if models is None else models
        return self._known(scope, metric, tuple(asked), (reward,))

    def difference(
        self,
        scope: Scope,
        metric: str,
        models: Sequence[str] | None = None,
        *,
        other: str | None = None,
        baseline: str | None = None,
    ) -> Mean | None:
        """Return baseline − `other` (default: the first other) of `models` (default: all), each with the seeds that both have.

        None where there are none.
        """
        asked = tuple(self.models if models is None else models)
        return self._known(scope, metric, asked, (baseline or self.baseline, other or self.others[0]))

    def differences(self, metric: str = "accuracy") -> dict[tuple[Scope, str], Mean]:
        """Return the difference from each other type in each category except training pairs."""
        return {
            (scope, other): found
            for scope in self.categories()
            for other in self.others
            if scope.category != "training pairs"
            and (found := self.difference(scope, metric, other=other)) is not None
        }

    @cached_property
    def holm(self) -> dict[tuple[Scope, str], float]:
        """Return the p of each of `differences`, corrected for their number; where there is one training of each type, `p_pairs`."""
        found = self.differences()
        plain = [item.p_pairs if item.estimate.p is None else item.estimate.p for item in found.values()]
        return dict(zip(found, statistics.holm(plain), strict=True))

    def control(
        self, scope: Scope, metric: str, models: Sequence[str] | None = None, *, other: str | None = None
    ) -> Mean | None:
        """Return the difference in a metric; None unless all trials of the difference in accuracy have it."""
        found, plain = (self.difference(scope, name, models, other=other) for name in (metric, "accuracy"))
        return found if found and plain and found.runs == plain.runs else None

    def _over_models(
        self, scope: Scope, metric: str, models: tuple[str, ...], kinds: tuple[str, ...]
    ) -> Mean | None:
        found = {model: seeds for model in models if (seeds := self.cells(scope, model, kinds, metric))}
        if not found:
            return None
        return Mean(
            scope=scope,
            metric=metric,
            cells=found,
            signs=(1, -1)[: len(kinds)],
            groups=self.groups,
            added=self.added,
        )

    def added(self, item: EvaluationResult, metric: str) -> Floats:
        """Return what each pair adds to a metric of an evaluation, computed once."""
        # Two stores that are compared may hold different scores under one key.
        place = (item.key, item.attempt, metric)
        if place not in self._added:
            self._added[place] = added_by_pairs(item, metric)
        return self._added[place]

    def of(self, scope: Scope, model: str) -> Sequence[TrialResult]:
        """Return the trials of a model on the scope's training set."""
        return self._of.get((scope.train_set, model), ())

    def cells(
        self, scope: Scope, model: str, kinds: Sequence[str], metric: str = "accuracy"
    ) -> dict[int, tuple[TrialResult, ...]]:
        """Return by seed one trial of each reward type: those that learned and have the metric of all the scope's sets."""
        known = [item for item in self.of(scope, model) if item.learned and has(item, scope, metric)]
        found = [{item.record.seed: item for item in known if item.record.reward == kind} for kind in kinds]
        return {
            seed: tuple(of_kind[seed] for of_kind in found)
            for seed in sorted(set(found[0]).intersection(*found[1:]))
        }

    def complete_models(self, scope: Scope) -> list[str]:
        """Return the models with results of every reward type declared for them; types without any results do not count."""
        declared = {
            (item.record.model, item.record.reward)
            for item in self.results
            if item.record.train_set == scope.train_set
        }
        counts = {(model, kind) for model, kind in declared if self.cells(scope, model, (kind,))}
        known = {kind for _, kind in counts}
        lacking = {model for model, kind in declared - counts if kind in known}
        whole = {model for model, _ in counts} - lacking
        return [model for model in self.models if model in whole]

    def win_rate(self, scope: Scope, other: str) -> WinRate:
        """Count the cells of model, seed and set in which the baseline's accuracy is higher than the other's."""
        return statistics.win_rate(
            [
                _metric(first, name, "accuracy") - _metric(second, name, "accuracy")
                for name in scope.sets
                for first, second in self.cells_of(scope.alone(name), (self.baseline, other))
            ]
        )

    def margins(self, scope: Scope, reward: str, *, scaled: bool) -> Floats:
        """Return the margins of every pair of every trial that counts; where `scaled`, over the spread of the rewards."""
        found = [
            _margin(item.scores) if scaled else item.scores.chosen - item.scores.rejected
            for (trial,) in self.cells_of(scope, (reward,))
            for item in _items(trial, scope)
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def calibration(self, scope: Scope, reward: str) -> Calibration | None:
        """Return the calibration over every pair of every trial that counts; None where there is none."""
        margins = self.margins(scope, reward, scaled=False)
        return statistics.calibration(margins) if len(margins) else None

    def cells_of(self, scope: Scope, kinds: tuple[str, ...]) -> Iterator[tuple[TrialResult, ...]]:
        """Yield one trial of each type by model and seed, where all types count."""
        return (cell for model in self.models for cell in self.cells(scope, model, kinds).values())


def _items(trial: TrialResult, scope: Scope) -> list[EvaluationResult]:
    return [_item(trial, name) for name in scope.sets]


def _item(trial: TrialResult, dataset: str) -> EvaluationResult:
    return next(item for item in trial.final if item.dataset == dataset)


def _metric(trial: TrialResult, dataset: str, metric: str) -> float:
    return _item(trial, dataset).metrics[metric]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SetOutcomes:
    """How the reward types of one training set rank each of the P pairs of a set: means over seeds, then models.

    `index` holds the pairs' rows in the source split. By reward type, `right` is the share of cells that rank the pair right and
    `margin` the mean margin in standard deviations of the set's rewards. `longer` says by how many tokens chosen is longer.
    `leaked` is None if the training rows are unknown.
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


def set_outcomes(analysis: Analysis, kinds: Sequence[str]) -> list[SetOutcomes]:
    """Return one per training set and evaluation set that all `kinds` have learned and scored, in the categories' order."""
    found = []
    for scope in analysis.categories() if kinds else ():
        # All sets of a category are averaged over the same cells.
        by_model = [seeds for model in analysis.models if (seeds := analysis.cells(scope, model, kinds))]
        found += [_outcomes(scope, name, by_model, kinds) for name in scope.sets if by_model]
    return found


def _outcomes(
    scope: Scope,
    dataset: str,
    by_model: Sequence[Mapping[int, tuple[TrialResult, ...]]],
    kinds: Sequence[str],
) -> SetOutcomes:
    sides = [
        [[_item(cell[side], dataset) for cell in seeds.values()] for seeds in by_model]
        for side in range(len(kinds))
    ]
    every = [item for side in sides for items in side for item in items]

    def mean(side: Sequence[Sequence[EvaluationResult]], value: Callable[[PairScores], Floats]) -> Floats:
        """Average over seeds, then over models, in the order of the pairs' rows."""
        found: Floats = np.mean(
            [
                np.mean([value(item.scores)[np.argsort(item.scores.index)] for item in items], axis=0)
                for items in side
            ],
            axis=0,
        )
        return found

    leaked = [item.scores.index[item.leaked] for item in every if item.leaked is not None]
    index = np.sort(every[0].scores.index)
    first = next(iter(by_model[0].values()))[0]
    return SetOutcomes(
        train_set=scope.train_set,
        dataset=dataset,
        category=scope.category,
        train_digest=first.record.train_digest,
        dataset_digest=every[0].dataset_digest,
        index=index,
        right={kind: mean(side, _right) for kind, side in zip(kinds, sides, strict=True)},
        margin={kind: mean(side, _margin) for kind, side in zip(kinds, sides, strict=True)},
        longer=mean(sides[0], lambda scores: scores.longer.astype(np.float64)),
        leaked=np.isin(index, leaked[0]) if len(leaked) == len(every) else None,
    )


def _right(scores: PairScores) -> Floats:
    return statistics.right(scores.chosen, scores.rejected)


def _margin(scores: PairScores) -> Floats:
    return statistics.scaled_margins(scores.chosen, scores.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """A least-squares fit of one value per pair: its change by one standard deviation of each feature.

    A feature that does not vary, or that others imply, has no coefficient. `explained` is R².
    """

    coefficients: dict[str, Estimate]
    explained: float
    pairs: int


def regression(
    values_P: Floats, features: Mapping[str, Floats], units_P: NDArray[np.int64]
) -> Regression | None:
    """Fit an intercept and standardised features; None if there are no more pairs than terms.

    Pairs of one unit (a pair and its rewritings) are not independent: the variance of the coefficients is clustered by units
    (Liang and Zeger 1986), with a Student-t over the number of units less one.
    """
    terms = {"intercept": np.ones(len(values_P))}
    for name, feature_P in features.items():
        spread = float(feature_P.std())
        column_P = (feature_P - feature_P.mean()) / spread if spread > 0 else np.zeros(len(feature_P))
        if np.linalg.matrix_rank(np.stack([*terms.values(), column_P], axis=1)) == len(terms) + 1:
            terms[name] = column_P
    _, at_P = np.unique(units_P, return_inverse=True)
    units = int(at_P.max(initial=0)) + 1
    if len(values_P) <= len(terms) or units < 2:
        return None
    terms_PK = np.stack(list(terms.values()), axis=1)
    inverse_KK = np.linalg.inv(terms_PK.T @ terms_PK)
    value_K = inverse_KK @ terms_PK.T @ values_P
    left_P = values_P - terms_PK @ value_K
    scores_UK = np.zeros((units, len(terms)))
    np.add.at(scores_UK, at_P, terms_PK * left_P[:, None])
    variance_KK = inverse_KK @ scores_UK.T @ scores_UK @ inverse_KK * units / (units - 1)
    total = float(((values_P - values_P.mean()) ** 2).sum())
    return Regression(
        coefficients={
            name: replace(
                statistics.unbounded_interval(
                    float(value_K[at]),
                    statistics.Spread(variance=float(variance_KK[at, at]), degrees=units - 1, trainings=0),
                ),
                p=None,
            )
            for at, name in enumerate(terms)
        },
        explained=1.0 - float((left_P**2).sum()) / total if total > 0 else 0.0,
        pairs=len(values_P),
    )
