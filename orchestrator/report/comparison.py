"""What reward types are worth and EX−IM, with their uncertainty: by category, set and model; and EX−IM pair by pair.

Only trials that learned count, and where a scope's sets are all evaluated; EX−IM is over the cells of model and seed that have
both types. Nothing is filled in. Two questions are told apart. `Analysis` asks what other test pairs and other seeds would
say. `controlled` and `regression` ask what accounts for EX−IM given the trainings that there are: length, leaks, features of a
pair; retraining adds no test pairs, so there a pair is the unit.

Shapes: P pairs of a set, U different pairs of sets that share them, S seeds, B draws, K terms of a regression.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

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
        """One of its sets."""
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
    """The names in their order, but `…_french` and `…_spanish` together, where the first of them stands."""
    stems = [name.removesuffix("french").removesuffix("spanish") for name in names]
    return [name for _, name in sorted(zip(map(stems.index, stems), names, strict=True))]


def cells(
    results: Sequence[TrialResult], scope: Scope, model: str, kinds: Sequence[str]
) -> dict[int, tuple[TrialResult, ...]]:
    """By seed, one trial of each reward type: those that learned and whose sets of the scope are all evaluated."""
    found: list[dict[int, TrialResult]] = [{} for _ in kinds]
    for result in results:
        record = result.record
        asked = (record.train_set, record.model) == (scope.train_set, model) and record.reward in kinds
        if asked and result.learned and set(scope.sets) <= {item.dataset for item in result.final}:
            found[kinds.index(record.reward)][record.seed] = result
    return {
        seed: tuple(of_kind[seed] for of_kind in found)
        for seed in sorted(set(found[0]).intersection(*found[1:]))
    }


def pair_groups(results: Sequence[TrialResult]) -> dict[str, str]:
    """Evaluation set → the set whose pairs it holds: its own, or the training set's that it is a rewriting of."""
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
    `step` hears how many of how many evaluated sets are through.
    """

    def __init__(
        self,
        results: Sequence[TrialResult],
        *,
        draws: int = DRAWS,
        step: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.draws = draws
        self.groups = pair_groups(results)
        self.weights = cache(self._weights)
        found: dict[str, list[tuple[str, EvaluationResult]]] = {}
        for result in results:
            for item in result.final:
                found.setdefault(self.groups[item.dataset], []).append((result.record.key, item))
        parts: dict[tuple[str, str], list[dict[str, Floats]]] = {}
        total, done = sum(map(len, found.values())), 0.0
        for group, items in found.items():
            units = np.unique(np.concatenate([item.scores.index for _, item in items]))
            block = min(draws, max(1, _BLOCK // max(1, len(units))))
            for start in range(0, draws, block):
                count = min(block, draws - start)
                counts_BU = pair_counts(len(units), count, generator("pairs", group, str(start)))
                for trial, item in items:
                    counts_BP = counts_BU[:, np.searchsorted(units, item.scores.index)]
                    drawn = statistics.resampled_metrics(item.scores.chosen, item.scores.rejected, counts_BP)
                    parts.setdefault((trial, item.dataset), []).append(drawn)
                    done += count / draws
                    step(round(done), total)
        self._metrics = {
            name: {metric: np.concatenate([part[metric] for part in blocks]) for metric in blocks[0]}
            for name, blocks in parts.items()
        }

    def of_set(self, trial: str, dataset: str, metric: str) -> Floats:
        """The metric in each draw of pairs, [B]; `trial` is a key."""
        return self._metrics[trial, dataset][metric]

    def _weights(self, model: str, train_set: str, seeds: tuple[int, ...]) -> Floats:
        """Weights of a model's seeds in each draw, [B, S]: the same for every reward type."""
        name = ("seeds", model, train_set, *map(str, seeds))
        return statistics.seed_weights(len(seeds), self.draws, generator(*name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A metric of one reward type over a scope: of one model, or the mean of several. `seeds` are those of each model."""

    estimate: Estimate
    models: tuple[str, ...]
    seeds: int
    pairs: int
    draws: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference(Mean):
    """EX−IM over `runs` cells of model and seed. `p_pairs` and `p_runs` are of accuracy only."""

    runs: int
    p_pairs: float | None
    p_runs: float | None

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
        return self._known(scope, (model,), (reward,), metric)

    def mean_of_models(
        self, scope: Scope, reward: str, metric: str, models: Sequence[str] | None = None
    ) -> Mean | None:
        """Over the complete models, or over `models`; None where there is none."""
        asked = self.complete_models(scope) if models is None else models
        found = self._known(scope, tuple(asked), (reward,), metric)
        return found and replace(found, estimate=replace(found.estimate, std=None))

    def difference(self, scope: Scope, metric: str, models: Sequence[str] | None = None) -> Difference | None:
        """EX−IM of `models` (default: all), each with the seeds that both types have; None where none has."""
        found = self._known(scope, tuple(self.models if models is None else models), COMPARED, metric)
        assert found is None or isinstance(found, Difference)
        return found

    def _over_models(
        self, scope: Scope, models: tuple[str, ...], kinds: tuple[str, ...], metric: str
    ) -> Mean | None:
        """The mean over models of a reward type's metric, or of that of the first type minus that of the second."""
        found = {model: seeds for model in models if (seeds := cells(self.results, scope, model, kinds))}
        if not found:
            return None
        by_seed, draws = [], []
        for model, seeds in found.items():
            values_S, draws_SB = zip(
                *(self._cell(scope, cell, metric) for cell in seeds.values()), strict=True
            )
            weights_BS = self.resampled.weights(model, scope.train_set, tuple(seeds))
            by_seed.append(values_S)
            draws.append((weights_BS * np.stack(draws_SB, axis=1)).sum(axis=1))
        value, draws_B = float(np.mean([np.mean(values_S) for values_S in by_seed])), np.mean(draws, axis=0)
        spread = by_seed[0] if len(found) == 1 else ()
        trials = [trial for seeds in found.values() for cell in seeds.values() for trial in cell]
        # Of the largest set.
        pairs = max(len(item.scores.index) for trial in trials for item in _items(trial, scope))
        compared, tested = len(kinds) == 2, metric == "accuracy"
        if not tested:
            estimate = statistics.estimate(value, draws_B, spread)
        else:
            bounded = statistics.difference_estimate if compared else statistics.accuracy_estimate
            estimate = bounded(value, draws_B, pairs, spread)
        mean = Mean(
            estimate=estimate, models=tuple(found), seeds=min(map(len, by_seed)), pairs=pairs, draws=draws_B
        )
        if not compared:
            return mean
        runs = np.array([gap / len(gaps) / len(found) for gaps in by_seed for gap in gaps])
        return Difference(
            estimate=estimate,
            models=mean.models,
            seeds=mean.seeds,
            pairs=pairs,
            draws=draws_B,
            runs=len(runs),
            p_pairs=statistics.permutation_p(self._by_pair(scope, found)) if tested else None,
            p_runs=statistics.permutation_p(runs) if tested else None,
        )

    def _cell(self, scope: Scope, cell: tuple[TrialResult, ...], metric: str) -> tuple[float, Floats]:
        """The mean over sets of the first trial, minus that of the second where there is one: its value and its draws [B]."""
        values, draws = [], []
        for trial in cell:
            values.append(np.mean([_metric(trial, name, metric) for name in scope.sets]))
            key = trial.record.key
            draws.append(np.mean([self.resampled.of_set(key, name, metric) for name in scope.sets], axis=0))
        return float(values[0] - sum(values[1:])), draws[0] - sum(draws[1:])

    def _by_pair(self, scope: Scope, found: Mapping[str, Mapping[int, tuple[TrialResult, ...]]]) -> Floats:
        """Return what each test pair adds to EX−IM: one number per pair, since seeds and models add no test pairs."""
        added: dict[tuple[str, int], float] = {}
        for name in scope.sets:
            item = _outcomes(scope, name, list(found.values()))
            gap_P = item.gap / len(item.index) / len(scope.sets)
            for unit, gap in zip(item.index.tolist(), gap_P.tolist(), strict=True):
                place = (self.resampled.groups[name], unit)
                added[place] = added.get(place, 0.0) + gap
        return np.array(list(added.values()))

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

    def side_metric(self, scope: Scope, model: str, reward: str, metric: str) -> float | None:
        """A metric that evaluations may or may not carry, mean over sets, then seeds; None where one lacks it."""
        trials = [trial for (trial,) in cells(self.results, scope, model, (reward,)).values()]
        return _side_metric(trials, scope, metric)

    def side_differences(self, scope: Scope, metric: str) -> tuple[float, float] | None:
        """EX−IM of a side metric and of accuracy, over the models and seeds that have the former with both types."""
        gaps = []
        for model in self.models:
            sides = list(zip(*cells(self.results, scope, model, COMPARED).values(), strict=True))
            found = [_side_metric(side, scope, name) for name in (metric, "accuracy") for side in sides]
            known = [value for value in found if value is not None]
            if len(known) == 4:
                gaps.append((known[0] - known[1], known[2] - known[3]))
        if not gaps:
            return None
        controlled, accuracy = np.mean(gaps, axis=0)
        return float(controlled), float(accuracy)

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


def _items(trial: TrialResult, scope: Scope) -> list[EvaluationResult]:
    return [_item(trial, name) for name in scope.sets]


def _item(trial: TrialResult, dataset: str) -> EvaluationResult:
    return next(item for item in trial.final if item.dataset == dataset)


def _metric(trial: TrialResult, dataset: str, metric: str) -> float:
    return _item(trial, dataset).metrics[metric]


def _side_metric(trials: Iterable[TrialResult], scope: Scope, metric: str) -> float | None:
    values = [item.metrics.get(metric, np.nan) for trial in trials for item in _items(trial, scope)]
    return float(np.mean(values)) if values and np.isfinite(values).all() else None


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
    index = np.unique(np.concatenate([item.scores.index for item in every]))

    def mean(side: Sequence[Sequence[EvaluationResult]], value: Callable[[PairScores], Floats]) -> Floats:
        """Over seeds, then over models."""
        by_model = []
        for items in side:
            placed_SP = np.full((len(items), len(index)), np.nan)
            for row, item in zip(placed_SP, items, strict=True):
                row[np.searchsorted(index, item.scores.index)] = value(item.scores)
            by_model.append(placed_SP.mean(axis=0))
        # Not a number where a model's length limit left the pair out.
        return np.nanmean(by_model, axis=0)

    seen = [item.scores.index[item.leaked] for item in every if item.leaked is not None]
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
        leaked=np.isin(index, np.concatenate(seen)) if len(seen) == len(every) else None,
        cells=sum(map(len, by_model)),
    )


def _right(scores: PairScores) -> Floats:
    return statistics.right(scores.chosen, scores.rejected)


def _margin(scores: PairScores) -> Floats:
    return statistics.scaled_margins(scores.chosen, scores.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Controlled:
    """EX−IM of accuracy over the sets of a category: as it is, at matched lengths, and on pairs that training has not seen.

    None where it cannot be estimated: a set whose chosen responses are all longer, or all of whose pairs leaked.
    """

    train_set: str
    category: Category
    sets: tuple[str, ...]
    pairs: int
    unseen: int | None
    plain: Estimate
    length: Estimate | None
    leak_free: Estimate | None


def controlled(outcomes: Sequence[SetOutcomes]) -> list[Controlled]:
    """One per training set and category, in the report's order; the mean over a category's sets."""
    return [_controlled(found) for found in by_category(outcomes)]


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


def _controlled(found: Sequence[SetOutcomes]) -> Controlled:
    # All pairs once, and then each draw.
    weights = [
        np.vstack([np.ones(len(item.index)), drawn_BP])
        for item, drawn_BP in zip(found, drawn_pairs(found), strict=True)
    ]
    pairs = max(len(item.index) for item in found)
    unseen = [int((~item.leaked).sum()) for item in found if item.leaked is not None]

    def over_sets(value: Callable[[SetOutcomes, Floats], Floats | None]) -> Estimate | None:
        values = [value(item, weights_BP) for item, weights_BP in zip(found, weights, strict=True)]
        known = [value_B for value_B in values if value_B is not None and np.isfinite(value_B[0])]
        if len(known) < len(found):
            return None
        mean_B = np.mean(known, axis=0)
        return statistics.gap_estimate(float(mean_B[0]), mean_B[1:], pairs)

    plain = over_sets(lambda item, weights_BP: _mean(item.gap, weights_BP))
    assert plain is not None
    return Controlled(
        train_set=found[0].train_set,
        category=found[0].category,
        sets=tuple(item.dataset for item in found),
        pairs=pairs,
        unseen=sum(unseen) if len(unseen) == len(found) else None,
        plain=plain,
        length=over_sets(lambda item, weights_BP: length_controlled(item.gap, item.longer, weights_BP)),
        leak_free=over_sets(_leak_free),
    )


def _mean(values_P: Floats, counts_BP: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        found: Floats = counts_BP @ values_P / counts_BP.sum(axis=1)
    return found


def _leak_free(item: SetOutcomes, counts_BP: Floats) -> Floats | None:
    if item.leaked is None or item.leaked.all():
        return None
    return _mean(item.gap[~item.leaked], counts_BP[:, ~item.leaked])


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
