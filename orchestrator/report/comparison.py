"""What reward types are worth and EX−IM, with their uncertainty: by category, set and model; and EX−IM pair by pair.

Only trials that learned count, and where a scope's sets are all evaluated; EX−IM is over the cells of model and seed that have
both types. Nothing is filled in. `Analysis` asks what other test pairs and other seeds would say. `SetOutcomes` and `regression`
ask what EX−IM of a pair goes with, given the trainings that there are: retraining adds no pairs, so there a pair is the unit.

Shapes: P pairs of a set, U different pairs of sets that share them, S seeds, B draws, K terms of a regression.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from orchestrator.report import statistics
from orchestrator.report.results import EvaluationResult, TrialResult
from orchestrator.report.statistics import (
    DRAWS,
    Calibration,
    Estimate,
    Floats,
    WinRate,
    generator,
    pair_counts,
)
from orchestrator.report.tables import COMPARED
from orchestrator.store.records import CATEGORIES, Category
from trainers.evaluate.metrics import length_controlled
from trainers.evaluate.scores import PairScores

# Numbers held at once while pairs are drawn: 32 MB.
_BLOCK = 4_000_000
# A draw whose normal equations are worse conditioned says nothing.
_SINGULAR = 1e10
LENGTH_CONTROLLED, LEAK_FREE = "accuracy_length_controlled", "accuracy_leak_free"
# Accuracies without the help of length and of leaks.
CONTROLS = {LENGTH_CONTROLLED: "length-controlled", LEAK_FREE: "leak-free"}
# Of these categories a set's pairs are those of the training set, in its own words or others.
_OF_TRAINING_SET = ("in-distribution", "token-level shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Evaluation sets that are averaged: those of a category, or one set alone (`dataset`) of a category."""

    train_set: str
    category: Category
    sets: tuple[str, ...]
    dataset: str = ""

    def alone(self, name: str) -> "Scope":
        """Return the scope of one of its sets."""
        return replace(self, sets=(name,), dataset=name)


def category_scopes(results: Sequence[TrialResult]) -> Iterator[Scope]:
    """Each training set's categories."""
    for train_set in _unique(result.record.train_set for result in results):
        here = [result.record for result in results if result.record.train_set == train_set]
        for category in CATEGORIES:
            declared = (
                item.dataset for record in here for item in record.evaluations if item.category == category
            )
            if sets := tuple(spanish_beside_french(_unique(declared))):
                yield Scope(train_set=train_set, category=category, sets=sets)


def spanish_beside_french(names: Sequence[str]) -> list[str]:
    """Return the names in their order, but `…_french` and `…_spanish` together, where the first of them stands."""
    stems = [name.removesuffix("french").removesuffix("spanish") for name in names]
    return [name for _, name in sorted(zip(map(stems.index, stems), names, strict=True))]


def cells(
    results: Sequence[TrialResult], scope: Scope, model: str, kinds: Sequence[str], metric: str = "accuracy"
) -> dict[int, tuple[TrialResult, ...]]:
    """Return by seed one trial of each reward type: those that learned and have the metric of all the scope's sets."""
    found: list[dict[int, TrialResult]] = [{} for _ in kinds]
    for result in results:
        record = result.record
        asked = (record.train_set, record.model) == (scope.train_set, model) and record.reward in kinds
        if asked and result.learned and has(result, scope, metric):
            found[kinds.index(record.reward)][record.seed] = result
    return {
        seed: tuple(of_kind[seed] for of_kind in found)
        for seed in sorted(set(found[0]).intersection(*found[1:]))
    }


def has(result: TrialResult, scope: Scope, metric: str = "accuracy") -> bool:
    """Whether a trial has the metric of all the scope's sets, after its last epoch."""
    return set(scope.sets) <= {item.dataset for item in result.final if metric in item.metrics}


def over_sets(
    trial: TrialResult,
    scope: Scope,
    value: Callable[[TrialResult, str], Any] = lambda trial, dataset: _metric(trial, dataset, "accuracy"),
) -> Any:
    """Return the mean over the scope's sets of a value of each set, which is accuracy where none is given."""
    return np.mean([value(trial, name) for name in scope.sets], axis=0)


def pair_groups(results: Sequence[TrialResult]) -> dict[str, str]:
    """Return for each evaluation set the set whose pairs it holds: itself, or the training set whose pairs it rewrites."""
    groups: dict[str, str] = {}
    for result in results:
        for item in result.record.evaluations:
            if item.category in _OF_TRAINING_SET:
                groups.setdefault(item.dataset, result.record.train_set)
    return {item.dataset: item.dataset for result in results for item in result.record.evaluations} | groups


class Resampled:
    """Bootstrap draws of everything that a sweep has evaluated, made once and shared by every number of its report.

    In a draw the same test pairs are drawn for every model, seed and reward type, so a difference of two numbers is taken
    pair by pair. A set and its rewritings share their pairs. Models are never resampled: they are the ones asked about.
    """

    def __init__(self, results: Sequence[TrialResult], draws: int) -> None:
        self.draws = draws
        self.groups = pair_groups(results)
        self.weights = cache(self._weights)
        self._results = results
        self._metrics: dict[tuple[str, str], dict[str, Floats]] = {}

    def draw(self, step: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Draw now, not when a number first needs it; `step` is told how many of how many sets are done."""
        found: dict[str, list[tuple[str, EvaluationResult]]] = {}
        for result in self._results:
            for item in result.final:
                found.setdefault(self.groups[item.dataset], []).append((result.record.key, item))
        parts: dict[tuple[str, str], list[dict[str, Floats]]] = {}
        total, done = sum(map(len, found.values())), 0.0
        for group, items in found.items():
            units = np.unique(np.concatenate([item.scores.index for _, item in items]))
            block = min(self.draws, max(1, _BLOCK // max(1, len(units))))
            for start in range(0, self.draws, block):
                count = min(block, self.draws - start)
                counts_BU = pair_counts(len(units), count, generator("pairs", group, str(start)))
                for trial, item in items:
                    counts_BP = counts_BU[:, np.searchsorted(units, item.scores.index)]
                    parts.setdefault((trial, item.dataset), []).append(_drawn(item, counts_BP))
                    done += count / self.draws
                    step(round(done), total)
        self._metrics = {
            name: {metric: np.concatenate([part[metric] for part in blocks]) for metric in blocks[0]}
            for name, blocks in parts.items()
        }

    def of_set(self, trial: str, dataset: str, metric: str) -> Floats:
        """The metric in each draw of pairs, [B]; `trial` is a key."""
        if not self._metrics:
            self.draw()
        return self._metrics[trial, dataset][metric]

    def _weights(self, model: str, train_set: str, seeds: tuple[int, ...]) -> Floats:
        """Weights of a model's seeds in each draw, [B, S]: the same for every reward type."""
        name = ("seeds", model, train_set, *map(str, seeds))
        return statistics.seed_weights(len(seeds), self.draws, generator(*name))


def _drawn(item: EvaluationResult, counts_BP: Floats) -> dict[str, Floats]:
    """Return every metric of an evaluation in each draw, [B]; not a number where it cannot be computed from a draw."""
    scores = item.scores
    found = statistics.resampled_metrics(scores.chosen, scores.rejected, counts_BP)
    right_P = _right(scores)
    if LENGTH_CONTROLLED in item.metrics:
        matched_B = length_controlled(right_P, scores.longer, counts_BP)
        found |= {} if matched_B is None else {LENGTH_CONTROLLED: matched_B}
    if LEAK_FREE in item.metrics and item.leaked is not None:
        unseen_BP = counts_BP[:, ~item.leaked]
        with np.errstate(invalid="ignore"):
            found[LEAK_FREE] = unseen_BP @ right_P[~item.leaked] / unseen_BP.sum(axis=1)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean:
    """A metric of one reward type: the mean over a scope's sets, then over seeds, then over models.

    `cells` are the trials of each model and seed. What needs bootstrap draws is computed when it is first asked for.
    `over_seeds` says whether the spread over seeds belongs to the estimate.
    """

    scope: Scope
    metric: str
    cells: Mapping[str, Mapping[int, tuple[TrialResult, ...]]]
    resampled: Resampled
    over_seeds: bool

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it is over."""
        return tuple(self.cells)

    @property
    def seeds(self) -> int:
        """How many seeds each model has, at least."""
        return min(map(len, self.cells.values()))

    @property
    def runs(self) -> int:
        """How many cells of model and seed there are."""
        return sum(map(len, self.cells.values()))

    @cached_property
    def values(self) -> list[list[float]]:
        """The values of the seeds, by model."""
        return self._by_seed(lambda trial, name: _metric(trial, name, self.metric))

    @cached_property
    def value(self) -> float:
        """The mean itself."""
        return float(np.mean([np.mean(of_model) for of_model in self.values]))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds of one model; None below two, and of a mean over models."""
        shown = self.over_seeds and len(self.values) == 1 and len(self.values[0]) > 1
        return float(np.std(self.values[0], ddof=1)) if shown else None

    @cached_property
    def pairs(self) -> int:
        """The pairs of the largest set."""
        trials = (trial for seeds in self.cells.values() for cell in seeds.values() for trial in cell)
        return max(len(item.scores.index) for trial in trials for item in _items(trial, self.scope))

    @cached_property
    def draws(self) -> Floats:
        """The mean in each draw of pairs and seeds, [B]."""
        drawn = self._by_seed(lambda trial, name: self.resampled.of_set(trial.record.key, name, self.metric))
        by_model = []
        for (model, seeds), of_model in zip(self.cells.items(), drawn, strict=True):
            weights_BS = self.resampled.weights(model, self.scope.train_set, tuple(seeds))
            by_model.append((weights_BS * np.stack(of_model, axis=1)).sum(axis=1))
        found: Floats = np.mean(by_model, axis=0)
        return found

    @cached_property
    def estimate(self) -> Estimate:
        """The value with its interval, and with the spread over seeds of one model."""
        if self.metric.startswith("accuracy"):
            found = self._bounded(self.value, self.draws, self.pairs)
        else:
            found = statistics.estimate(self.value, self.draws)
        return replace(found, std=self.std)

    def _bounded(self, value: float, draws_B: Floats, pairs: int) -> Estimate:
        return statistics.accuracy_estimate(value, draws_B, pairs)

    def _by_seed(self, value: Callable[[TrialResult, str], Any]) -> list[list[Any]]:
        """By model and seed, the mean over sets of the first trial, minus that of the second where there is one."""
        found = []
        for seeds in self.cells.values():
            means = [[over_sets(trial, self.scope, value) for trial in cell] for cell in seeds.values()]
            found.append([first - sum(others) for first, *others in means])
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference(Mean):
    """EX−IM over the cells of model and seed that have both types. p values are of accuracy only."""

    @cached_property
    def value(self) -> float:
        """The mean itself, rounded: equal means may differ in their last bit."""
        return round(super().value, 12)

    @cached_property
    def p_runs(self) -> float | None:
        """Return the p of a test that flips signs training by training."""
        gaps = [gap / len(of_model) / len(self.values) for of_model in self.values for gap in of_model]
        return statistics.permutation_p(np.array(gaps)) if self.metric == "accuracy" else None

    @cached_property
    def p_pairs(self) -> float | None:
        """Return the p of a test that flips signs test pair by test pair: seeds and models add no test pairs."""
        if self.metric != "accuracy":
            return None
        added: dict[tuple[str, int], float] = {}
        for name in self.scope.sets:
            item = _outcomes(self.scope, name, list(self.cells.values()))
            gap_P = item.gap / len(item.index) / len(self.scope.sets)
            for unit, gap in zip(item.index.tolist(), gap_P.tolist(), strict=True):
                place = (self.resampled.groups[name], unit)
                added[place] = added.get(place, 0.0) + gap
        return statistics.permutation_p(np.array(list(added.values())))

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes 0 and the permutation of pairs agrees at 5 %."""
        return self.estimate.excludes_zero and (self.p_pairs is None or self.p_pairs < 0.05)

    def _bounded(self, value: float, draws_B: Floats, pairs: int) -> Estimate:
        return statistics.gap_estimate(value, draws_B, pairs)


class Analysis:
    """The results of a sweep, asked for any mean and difference."""

    def __init__(self, results: Sequence[TrialResult], *, draws: int = DRAWS) -> None:
        self.results = results
        self.resampled = Resampled(results, draws)
        # Tables, figures and sentences ask for the same numbers.
        self._known = cache(self._over_models)
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
        return (scope.alone(name) for scope in self.categories() for name in scope.sets)

    def mean(self, scope: Scope, model: str, reward: str, metric: str) -> Mean | None:
        """Over the seeds of one model; None where none counts."""
        return self._known(Mean, scope, metric, (model,), (reward,))

    def mean_of_models(
        self, scope: Scope, reward: str, metric: str, models: Sequence[str] | None = None
    ) -> Mean | None:
        """Over the complete models, or over `models`; None where there is none."""
        asked = self.complete_models(scope) if models is None else models
        return self._known(Mean, scope, metric, tuple(asked), (reward,), over_seeds=False)

    def difference(self, scope: Scope, metric: str, models: Sequence[str] | None = None) -> Difference | None:
        """EX−IM of `models` (default: all), each with the seeds that both types have; None where none has."""
        asked = tuple(self.models if models is None else models)
        return cast("Difference | None", self._known(Difference, scope, metric, asked, COMPARED))

    def control(self, scope: Scope, metric: str) -> Difference | None:
        """EX−IM of one of CONTROLS; None where one of the trials lacks it of which EX−IM of accuracy is."""
        found, plain = self.difference(scope, metric), self.difference(scope, "accuracy")
        return found if found and plain and found.runs == plain.runs else None

    def _over_models(
        self,
        what: type[Mean],
        scope: Scope,
        metric: str,
        models: tuple[str, ...],
        kinds: tuple[str, ...],
        over_seeds: bool = True,
    ) -> Mean | None:
        found = {
            model: seeds for model in models if (seeds := cells(self.results, scope, model, kinds, metric))
        }
        if not found:
            return None
        return what(scope=scope, metric=metric, cells=found, resampled=self.resampled, over_seeds=over_seeds)

    def complete_models(self, scope: Scope) -> list[str]:
        """The models that have every reward type that they were declared with; one that no model has is not waited for."""
        declared = {
            (item.record.model, item.record.reward)
            for item in self.results
            if item.record.train_set == scope.train_set
        }
        counts = {(model, kind) for model, kind in declared if cells(self.results, scope, model, (kind,))}
        known = {kind for _, kind in counts}
        lacking = {model for model, kind in declared - counts if kind in known}
        whole = {model for model, _ in counts} - lacking
        return [model for model in self.models if model in whole]

    def compared(self, scope: Scope) -> list[TrialResult]:
        """The trials of the models and seeds that have both EX-RM and IM-RM."""
        return [item for cell in self._cells(scope, COMPARED) for item in cell]

    def win_rate(self, scope: Scope) -> WinRate:
        """Cells of model, seed and set in which EX-RM's accuracy is ahead of IM-RM's."""
        gaps = [
            _metric(explicit, name, "accuracy") - _metric(implicit, name, "accuracy")
            for name in scope.sets
            for explicit, implicit in self._cells(scope.alone(name), COMPARED)
        ]
        return statistics.win_rate(gaps)

    def margins(self, scope: Scope, reward: str, *, scaled: bool) -> Floats:
        """Margins of every pair of every trial that counts, over the spread of their rewards where `scaled`."""
        found = [
            _margin(item.scores) if scaled else item.scores.chosen - item.scores.rejected
            for (trial,) in self._cells(scope, (reward,))
            for item in _items(trial, scope)
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def calibration(self, scope: Scope, reward: str) -> Calibration | None:
        """Return the calibration over every pair of every trial that counts; None where there is none."""
        margins = self.margins(scope, reward, scaled=False)
        return statistics.calibration(margins) if len(margins) else None

    def _cells(self, scope: Scope, kinds: tuple[str, ...]) -> Iterator[tuple[TrialResult, ...]]:
        return (cell for model in self.models for cell in cells(self.results, scope, model, kinds).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Controlled:
    """EX−IM of accuracy over the sets of a category: as it is, at matched lengths, and on pairs that training has not seen.

    The last two are None where one of the trials lacks them that are compared: of a set whose chosen responses are all longer,
    say, or all of whose pairs leaked. `pairs` are those of the largest set, `unseen` those of all sets that did not leak.
    """

    train_set: str
    category: Category
    sets: tuple[str, ...]
    pairs: int
    unseen: int | None
    plain: Estimate
    told_apart: bool
    length: Estimate | None
    leak_free: Estimate | None


def controlled(analysis: Analysis) -> list[Controlled]:
    """One per training set and category in which EX-RM and IM-RM are compared."""
    return [
        _controlled(analysis, scope, plain)
        for scope in analysis.categories()
        if (plain := analysis.difference(scope, "accuracy"))
    ]


def _controlled(analysis: Analysis, scope: Scope, plain: Difference) -> Controlled:
    length, leak_free = (analysis.control(scope, metric) for metric in CONTROLS)
    trial = analysis.compared(scope)[0]
    unseen = [_metric(trial, name, "n_leak_free") for name in scope.sets if has(trial, scope, "n_leak_free")]
    return Controlled(
        train_set=scope.train_set,
        category=scope.category,
        sets=scope.sets,
        pairs=plain.pairs,
        unseen=round(sum(unseen)) if unseen else None,
        plain=plain.estimate,
        told_apart=plain.told_apart,
        length=length.estimate if length else None,
        leak_free=leak_free.estimate if leak_free else None,
    )


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
    """What each pair of a set got from EX-RM and IM-RM after one training set, P of them: means over seeds, then models.

    `index` are their rows in the source split. `right` is by reward type the share of cells that rank the pair right;
    `margin` the mean margin in standard deviations of the set's rewards; `longer` by how many tokens chosen is longer; `leaked`
    is None where training rows are not known.
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
    cells: int

    @property
    def gap(self) -> Floats:
        """EX−IM of the share ranked right."""
        return self.right["ex_rm"] - self.right["im_rm"]

    @property
    def margin_gap(self) -> Floats:
        """EX−IM of the scaled margin."""
        return self.margin["ex_rm"] - self.margin["im_rm"]


def set_outcomes(results: Sequence[TrialResult]) -> list[SetOutcomes]:
    """One per training set and evaluation set that both types have learned and scored, in the categories' order."""
    found = []
    for scope in category_scopes(results):
        models = _unique(result.record.model for result in results)
        # A category is the mean of all its sets, over the same cells.
        by_model = [seeds for model in models if (seeds := cells(results, scope, model, COMPARED))]
        found += [_outcomes(scope, name, by_model) for name in scope.sets if by_model]
    return found


def _outcomes(
    scope: Scope, dataset: str, by_model: Sequence[Mapping[int, tuple[TrialResult, ...]]]
) -> SetOutcomes:
    sides = [
        [[_item(cell[side], dataset) for cell in seeds.values()] for seeds in by_model]
        for side in range(len(COMPARED))
    ]
    every = [item for side in sides for items in side for item in items]

    def mean(side: Sequence[Sequence[EvaluationResult]], value: Callable[[PairScores], Floats]) -> Floats:
        """Over seeds, then over models, which all have the same pairs; in the order of their rows."""
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
        right={kind: mean(side, _right) for kind, side in zip(COMPARED, sides, strict=True)},
        margin={kind: mean(side, _margin) for kind, side in zip(COMPARED, sides, strict=True)},
        longer=mean(sides[0], lambda scores: scores.longer.astype(np.float64)),
        leaked=np.isin(index, leaked[0]) if len(leaked) == len(every) else None,
        cells=sum(map(len, by_model)),
    )


def _right(scores: PairScores) -> Floats:
    return statistics.right(scores.chosen, scores.rejected)


def _margin(scores: PairScores) -> Floats:
    return statistics.scaled_margins(scores.chosen, scores.rejected)


def by_category(outcomes: Sequence[SetOutcomes]) -> list[list[SetOutcomes]]:
    """The sets of each training set and category."""
    groups: dict[tuple[str, Category], list[SetOutcomes]] = {}
    for item in outcomes:
        groups.setdefault((item.train_set, item.category), []).append(item)
    return sorted(groups.values(), key=lambda found: CATEGORIES.index(found[0].category))


def drawn_pairs(outcomes: Sequence[SetOutcomes], draws: int = DRAWS) -> list[Floats]:
    """Draw pairs of each set with replacement: counts [B, P], alike for a set and its rewritings."""
    names = [item.train_set if item.category in _OF_TRAINING_SET else item.dataset for item in outcomes]
    counts = {}
    for name in dict.fromkeys(names):
        indices = [item.index for item, other in zip(outcomes, names, strict=True) if other == name]
        units = np.unique(np.concatenate(indices))
        counts[name] = units, pair_counts(len(units), draws, generator("pairs", name))
    return [
        counts_BU[:, np.searchsorted(units, item.index)]
        for item, (units, counts_BU) in zip(outcomes, map(counts.__getitem__, names), strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """Least squares of a number that each pair has: its change by one standard deviation of each feature.

    `left_out` are features that do not vary, or that others say already. `explained` is R².
    """

    coefficients: dict[str, Estimate]
    left_out: tuple[str, ...]
    explained: float
    pairs: int


def regression(values_P: Floats, features: Mapping[str, Floats], counts_BP: Floats) -> Regression | None:
    """Intercept and features by their standard deviation, in every draw; None where fewer pairs than terms are there."""
    terms = {"intercept": np.ones(len(values_P))}
    for name, feature_P in features.items():
        spread = float(feature_P.std())
        column_P = (feature_P - feature_P.mean()) / spread if spread > 0 else np.zeros(len(feature_P))
        if np.linalg.matrix_rank(np.stack([*terms.values(), column_P], axis=1)) == len(terms) + 1:
            terms[name] = column_P
    if len(values_P) <= len(terms):
        return None
    terms_PK = np.stack(list(terms.values()), axis=1)
    (value_K,), draws_BK = (
        _least_squares(values_P, terms_PK, weights_BP)
        for weights_BP in (np.ones((1, len(values_P))), counts_BP)
    )
    left_P = values_P - terms_PK @ value_K
    total = float(((values_P - values_P.mean()) ** 2).sum())
    return Regression(
        coefficients={
            name: statistics.estimate(float(value_K[number]), draws_BK[:, number])
            for number, name in enumerate(terms)
        },
        left_out=tuple(name for name in features if name not in terms),
        explained=1.0 - float((left_P**2).sum()) / total if total > 0 else 0.0,
        pairs=len(values_P),
    )


def _least_squares(values_P: Floats, terms_PK: Floats, weights_BP: Floats) -> Floats:
    """Coefficients under each row of weights, [B, K]; not a number where a row leaves them open."""
    normal_BKK = np.einsum("bp,pk,pl->bkl", weights_BP, terms_PK, terms_PK, optimize=True)
    right_BK = weights_BP @ (terms_PK * values_P[:, None])
    sound_B = np.linalg.cond(normal_BKK) < _SINGULAR
    found = np.full(right_BK.shape, np.nan)
    found[sound_B] = np.linalg.solve(normal_BKK[sound_B], right_BK[sound_B][:, :, None])[:, :, 0]
    return found
