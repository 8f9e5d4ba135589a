"""How many models, seeds and test pairs it takes to detect a difference of two reward types, and what to add to a sweep next.

The variance of a difference is the sum of the parts that models, seeds and test pairs contribute: `report.statistics.crossed`
estimates it from trainings, `spread` predicts it for another number of them. `decide` reads widths and costs, never the
difference itself, so no sweep stops on a favourable sign. `play` repeats it until it stops: on artifacts in a run, on
predictions in a plan, on simulated sweeps in the tests. All functions are pure.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

LEVEL, POWER = 0.95, 0.80
# A model gets no more seeds than this.
MOST_SEEDS = 30
# A step must narrow an interval by at least this share.
LEAST_GAIN = 1e-3

# A training set and a model. A seed is added to a cell with all its reward types.
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Variances of a difference of accuracies: between models, between seeds, and of the mean over `at` pairs.

    `pairs` is the part of the pairs' variance that all trainings share, `pairs_models` that which differs by model,
    `pairs_seeds` that which differs by training.
    """

    models: float
    seeds: float
    pairs: float
    pairs_models: float
    pairs_seeds: float
    at: float


# ASSUMED until trainings are complete: standard deviations of 0.05 over models and 0.03 over seeds; the two types rank one
# pair in four differently, one half of which is due to the pair, one quarter to the model, one quarter to the training.
PRIOR = Components(
    models=0.05**2, seeds=0.03**2, pairs=0.125, pairs_models=0.0625, pairs_seeds=0.0625, at=1.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Seeds of each model, and pairs of a set. `over_models`: the interval also covers other models."""

    seeds: Mapping[str, float]
    pairs: float
    over_models: bool

    def __str__(self) -> str:
        low, high = round(min(self.seeds.values())), round(max(self.seeds.values()))
        counts = (f"{low} to {high}" if low < high else f"{low}", len(self.seeds), round(self.pairs))
        seeds, models, pairs = (
            f"{count} {noun}{'' if str(count) == '1' else 's'}"
            for count, noun in zip(counts, ("seed", "model", "pair"), strict=True)
        )
        return f"{models} × {seeds} × {pairs}"


def spread(parts: Components, design: Design) -> tuple[float, float]:
    """Return the variance of the mean difference, and Satterthwaite's degrees of freedom.

    The variance is infinite if the design has no replicate, that is no second seed (over models: no second model).
    """
    models, share = len(design.seeds), parts.at / design.pairs
    each = sum(1 / seeds for seeds in design.seeds.values()) / models**2
    both = share * parts.pairs_seeds * each
    between = parts.seeds * each + both
    pairs = share * parts.pairs + share * parts.pairs_models / models + both
    trainings = sum(seeds - 1 for seeds in design.seeds.values())
    if design.over_models:
        both += share * parts.pairs_models / models
        between += (parts.models + share * parts.pairs_models) / models
        trainings = models - 1
    if not trainings:
        return math.inf, 1.0
    variance, pair_degrees = between + pairs - both, max(1.0, design.pairs - 1)
    weighed = between**2 / trainings + pairs**2 / pair_degrees + both**2 / (trainings * pair_degrees)
    return variance, max(variance**2 / weighed if weighed else pair_degrees, min(trainings, pair_degrees))


def half_width(parts: Components, design: Design) -> float:
    """Return the expected half-width of the design's 95 % interval."""
    from scipy.special import stdtrit

    variance, degrees = spread(parts, design)
    return float(stdtrit(degrees, (1 + LEVEL) / 2)) * math.sqrt(variance)


def detectable(wide: float, parts: Components, design: Design) -> float:
    """Return the difference that is detected with 80 % power if the half-width is `wide`."""
    from scipy.special import stdtrit

    most, power = (
        float(stdtrit(spread(parts, design)[1], quantile)) for quantile in ((1 + LEVEL) / 2, POWER)
    )
    return wide * (1 + power / most)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a sweep has grown: the seeds of each cell, and the pairs drawn from each set (None: all)."""

    seeds: Mapping[Cell, int]
    pairs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A difference to estimate, the half-width of its interval now, and what predicts it.

    `seeds` counts the seeds of each model that have learned; `rows` are the sizes of the category's sets that are drawn from,
    `whole` those of its suites, of which all pairs are scored.
    """

    train_set: str
    category: str
    half_width: float
    parts: Components
    seeds: Mapping[str, float]
    rows: Sequence[int]
    over_models: bool
    whole: Sequence[int] = ()

    @property
    def name(self) -> str:
        return f"trained on {self.train_set}, {self.category}"

    def predicted(self, now: State, then: State) -> float:
        """Return the half-width in another state: the present one, scaled as the design's expected half-width."""
        here, there = self.design(now, now), self.design(now, then)
        wide, wider = half_width(self.parts, here), half_width(self.parts, there)
        if not wide:
            # Nothing varies: the interval is the exact binomial one of the pairs.
            return self.half_width * math.sqrt(here.pairs / there.pairs)
        known = math.isfinite(wide) and math.isfinite(self.half_width)
        return self.half_width * wider / wide if known else wider

    def design(self, now: State, then: State) -> Design:
        """Return the design of a state; every added seed is expected to learn."""
        seeds = {
            model: count
            + then.seeds.get((self.train_set, model), 0)
            - now.seeds.get((self.train_set, model), 0)
            for model, count in self.seeds.items()
        }
        pairs = pairs_of(self.rows, then.pairs, self.whole)
        return Design(seeds=seeds, pairs=pairs, over_models=self.over_models)


def pairs_of(rows: Sequence[int], most: int | None, whole: Sequence[int] = ()) -> float:
    """Return the harmonic mean over sets of their pairs, at most `most` of `rows` each: variances of means add up so."""
    pairs = [*(min(count, most or count) for count in rows), *whole]
    return len(pairs) / sum(1 / max(1, count) for count in pairs)


def largest(questions: Sequence[Question]) -> int:
    """Return the size of the largest set that is drawn from; 1 if there is none."""
    return max((count for item in questions for count in item.rows), default=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Device hours `spent` so far, and those of one more seed of each cell: to train it, and to score one pair of each set.

    In an estimate, `shared` holds the hours of the answers and reference passes that a cell needs, by their stages' keys:
    its first seed pays for them, unless another cell has.
    """

    spent: float
    train: Mapping[Cell, float]
    score: Mapping[Cell, float]
    shared: Mapping[Cell, Mapping[str, float]] = field(default_factory=dict)

    def seed(self, cell: Cell, pairs: float) -> float:
        return self.train[cell] + self.score[cell] * pairs

    def first_seed(self, cell: Cell, pairs: float, paid: Collection[str] = ()) -> float:
        """Return the hours of a cell's first seed, where the shared stages of the keys `paid` are paid for."""
        needs = self.shared.get(cell, {})
        return self.seed(cell, pairs) + sum(hours for key, hours in needs.items() if key not in paid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When a sweep stops: at a half-width of `until`, or before it costs more than `budget_h` device hours.

    `declared` counts the seeds of the declared grid, which are run before any others.
    """

    until: float | None = None
    budget_h: float | None = None
    declared: Mapping[Cell, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Measurements of a complete state. `untold` names the differences that have no estimate since trials did not learn."""

    questions: Sequence[Question]
    costs: Costs
    untold: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The state to run next, why, and the hours that it adds. A decision that `stops` adds nothing."""

    state: State
    why: str
    stops: bool = False
    hours: float = 0.0


# Measures a state; None if it is not complete.
Measure = Callable[[State], Found | None]


def first(pairs: int | None, rule: Rule, costs: Costs, rows: int) -> State:
    """Return the first state: the grid; with a budget, one seed of each cell that fits by its estimated cost.

    `rows` are the pairs of the largest set. If nothing fits, the state has no seeds.
    """
    if rule.budget_h is None:
        return State(seeds=dict(rule.declared), pairs=pairs)
    seeds, left_h, paid = dict[Cell, int](), rule.budget_h, set[str]()
    for cell in rule.declared:
        if (hours := costs.first_seed(cell, min(rows, pairs or rows), paid)) <= left_h:
            seeds[cell], left_h = 1, left_h - hours
            paid.update(costs.shared.get(cell, {}))
    return State(seeds=seeds, pairs=pairs)


def decide(state: State, found: Found, rule: Rule) -> Decision:
    """Return what to add to a complete state: the steps that narrow the widest interval most per hour.

    One decision at most doubles the cost; then variances and costs are measured again. Models with one seed, which says
    nothing about the spread over seeds, get a second one first.
    """
    questions, costs = found.questions, found.costs
    if not questions:
        return Decision(state=state, why="no difference can be told yet: see what did not learn", stops=True)
    widest = max(questions, key=lambda item: item.half_width)
    known = math.isfinite(widest.half_width)
    now = f"± {widest.half_width:.3f}" if known else "no interval over other trainings yet"
    now += f" ({widest.name})"
    if found.untold:
        now += f"; no estimate, see what did not learn: {', '.join(found.untold)}"
    if rule.until is not None and widest.half_width <= rule.until:
        return Decision(state=state, why=f"reached: {now}", stops=True)
    room = math.inf if rule.budget_h is None else rule.budget_h - costs.spent
    rows = largest(questions)
    if rule.until is not None and min(state.seeds.values()) > 1:
        everything = State(seeds={cell: max(MOST_SEEDS, seeds) for cell, seeds in state.seeds.items()})
        limit = max(item.predicted(state, everything) for item in questions)
        if limit > rule.until and (more := _more_pairs(state, costs, rows)):
            # Few pairs say little about what all would leave.
            then, added = more
            return Decision(state=then, why=f"{now}: adding {_difference(state, then)}", hours=added)
        if limit > rule.until:
            over = "more models" if widest.over_models else "more models, or larger evaluation sets"
            why = f"{now}: even {MOST_SEEDS} seeds and all pairs would leave about ± {limit:.3f}; it takes {over}"
            return Decision(state=state, why=why, stops=True)
    then, added = state, 0.0
    while rule.until is None or min(then.seeds.values()) == 1 or _wide(questions, state, then) > rule.until:
        step = _step(questions, state, then, costs, rule, room - added, rows)
        if step is None or (added and added + step[1] > 1.01 * costs.spent):
            break
        then, added = step[0], added + step[1]
    if then == state:
        why = "no step fits what is left of the budget" if rule.budget_h else "no seed and no pair narrows it"
        return Decision(state=state, why=f"{now}: {why}", stops=True)
    said = f"{now}: adding {_difference(state, then)} for about ± {_wide(questions, state, then):.3f}"
    return Decision(state=then, why=said, hours=added)


def _wide(questions: Sequence[Question], now: State, then: State) -> float:
    return max(item.predicted(now, then) for item in questions)


def _step(
    questions: Sequence[Question], now: State, then: State, costs: Costs, rule: Rule, room: float, rows: int
) -> tuple[State, float] | None:
    """Return the step that narrows the widest interval most per hour, and its hours; None if none fits or helps."""
    widest = max(questions, key=lambda item: item.predicted(now, then))
    wide, drawn = widest.predicted(now, then), min(rows, then.pairs or rows)
    # Declared seeds come first, and a second seed of each model, whose gain cannot be predicted.
    short = [cell for cell, seeds in then.seeds.items() if seeds < max(2, rule.declared.get(cell, 0))]
    for cell in sorted(short, key=lambda cell: then.seeds[cell]):
        if (hours := costs.seed(cell, drawn)) <= room:
            return _with_seed(then, cell), hours
    cells = [cell for cell in then.seeds if cell[0] == widest.train_set and cell[1] in widest.seeds]
    steps = [
        (_with_seed(then, cell), costs.seed(cell, drawn)) for cell in cells if then.seeds[cell] < MOST_SEEDS
    ]
    steps += filter(None, [_more_pairs(then, costs, rows)])
    worth = [
        # Rounded, so that ties pick the first step on every machine.
        (float(f"{(wide - wider) / max(hours, 1e-12):.6g}"), after, hours)
        for after, hours in steps
        if hours <= room and (wider := widest.predicted(now, after)) < wide * (1 - LEAST_GAIN)
    ]
    if not worth:
        return None
    _, after, hours = max(worth, key=lambda item: item[0])
    return after, hours


def _more_pairs(state: State, costs: Costs, rows: int) -> tuple[State, float] | None:
    """Return the state with twice the pairs, and the hours to score all trials on them; None if it has all."""
    if state.pairs is None or state.pairs >= rows:
        return None
    more = min(rows, 2 * state.pairs)
    hours = more * sum(costs.score[cell] * seeds for cell, seeds in state.seeds.items())
    return replace(state, pairs=more), hours


def _with_seed(state: State, cell: Cell) -> State:
    return replace(state, seeds={**state.seeds, cell: state.seeds[cell] + 1})


def _difference(now: State, then: State) -> str:
    added: dict[str, list[str]] = {}
    for (train_set, model), seeds in then.seeds.items():
        if more := seeds - now.seeds[train_set, model]:
            added.setdefault(f"{more} seed{'s' if more > 1 else ''}", []).append(f"{model} on {train_set}")
    parts = [f"{more} of {', '.join(cells)}" for more, cells in added.items()]
    if then.pairs != now.pairs:
        parts.append(f"evaluation on {then.pairs} pairs for {now.pairs}")
    return "; ".join(parts)


def play(state: State, measure: Measure, rule: Rule) -> Iterator[Decision]:
    """Yield the decisions from a first state on, until one stops or asks for a state that is not complete."""
    while (found := measure(state)) is not None:
        decision = decide(state, found, rule)
        yield decision
        if decision.stops:
            return
        state = decision.state


def predicts(state: State, found: Found) -> Callable[[State], Found]:
    """Return the measurements expected of later states."""

    def measure(then: State) -> Found:
        questions = []
        for item in found.questions:
            wide = item.predicted(state, then)
            questions.append(replace(item, half_width=wide, seeds=item.design(state, then).seeds))
        pairs, costs = largest(found.questions), found.costs
        drawn = min(pairs, then.pairs or pairs)
        spent = costs.spent + sum(
            (seeds - state.seeds[cell]) * costs.seed(cell, drawn) for cell, seeds in then.seeds.items()
        )
        if drawn > min(pairs, state.pairs or pairs):
            spent += drawn * sum(costs.score[cell] * seeds for cell, seeds in state.seeds.items())
        return replace(found, questions=questions, costs=replace(costs, spent=spent))

    return measure
