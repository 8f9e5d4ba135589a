"""How many models, seeds and test pairs a difference takes: what a design tells apart, and what to add to it next.

The variance of a difference of two reward types is put together from where it comes from, with the formula of
`report.statistics.crossed` read the other way round: for trainings and pairs that are still to come. `decide` looks at widths and costs,
never at a difference, so that nothing stops on a favourable sign; `play` asks it until it stops, in a run of artifacts, in a
plan of predictions, in a test of simulated sweeps. Pure functions: asked again, they answer the same.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

LEVEL, POWER = 0.95, 0.80
# Further seeds than this say more about a model than anybody asks.
MOST_SEEDS = 30
# A step that narrows an interval by less than this share is not worth its price.
LEAST_GAIN = 1e-3

# A training set and a model: what gets another seed at a time, with all its reward types.
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Variances of one model's, one training's, and the mean of `at` pairs' part in a difference of accuracies.

    `pairs` is what all trainings share; `pairs_models` and `pairs_seeds` are what pairs add differently for each model and training.
    """

    models: float
    seeds: float
    pairs: float
    pairs_models: float
    pairs_seeds: float
    at: float


# ASSUMED before anything ran, of a difference near 0.1 of models that are alike: standard deviations of 0.05 over models and 0.03 over seeds;
# the two types rank one pair in four differently, half of which is the pair's own and a quarter each is the model's and the training's.
PRIOR = Components(
    models=0.05**2, seeds=0.03**2, pairs=0.125, pairs_models=0.0625, pairs_seeds=0.0625, at=1.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Seeds by model, and pairs of a set; `over_models`: the interval is over models too, not of these models alone."""

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
    """Return the variance of the mean difference, and Satterthwaite's degrees of freedom; infinite where one training cannot tell."""
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
    """Return half of the 95 % interval that the design is expected to give."""
    from scipy.special import stdtrit

    variance, degrees = spread(parts, design)
    # Student's t of degrees that an infinite variance has is finite.
    return float(stdtrit(degrees, (1 + LEVEL) / 2)) * math.sqrt(variance)


def detectable(wide: float, parts: Components, design: Design) -> float:
    """Return the difference whose interval, `wide` to each side, excludes 0 in 80 % of such sweeps."""
    from scipy.special import stdtrit

    most, power = (
        float(stdtrit(spread(parts, design)[1], quantile)) for quantile in ((1 + LEVEL) / 2, POWER)
    )
    return wide * (1 + power / most)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a sweep has grown: how many seeds each cell has, and the pairs that are drawn of a set; None is all of them."""

    seeds: Mapping[Cell, int]
    pairs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A difference that is asked for: half of its interval as it is now, and what that would become.

    `seeds` are those of each model that count; `rows` are all the pairs of each of its sets.
    """

    train_set: str
    category: str
    half_width: float
    parts: Components
    seeds: Mapping[str, float]
    rows: Sequence[int]
    over_models: bool

    @property
    def name(self) -> str:
        return f"trained on {self.train_set}, {self.category}"

    def predicted(self, now: State, then: State) -> float:
        """Return half of the interval in another state, by how the design's interval changes."""
        here, there = self.design(now, now), self.design(now, then)
        wide = half_width(self.parts, here)
        if math.isinf(wide) or not wide or not math.isfinite(self.half_width):
            # Where nothing varies the interval is that of pairs alone.
            alone = self.half_width * math.sqrt(here.pairs / there.pairs)
            return half_width(self.parts, there) if wide else alone
        return self.half_width * half_width(self.parts, there) / wide

    def design(self, now: State, then: State) -> Design:
        """Return the design of a state: of the seeds that are added as many are taken to count as are added."""
        seeds = {
            model: count
            + then.seeds.get((self.train_set, model), 0)
            - now.seeds.get((self.train_set, model), 0)
            for model, count in self.seeds.items()
        }
        return Design(seeds=seeds, pairs=pairs_of(self.rows, then.pairs), over_models=self.over_models)


def pairs_of(rows: Sequence[int], most: int | None) -> float:
    """Return the pairs of a set of which `most` are drawn: the harmonic mean over sets, as variances add."""
    return len(rows) / sum(1 / max(1, min(count, most or count)) for count in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Device hours of a state so far, and by cell of one more seed: of its trainings, and of scoring one pair of each set by them."""

    spent: float
    train: Mapping[Cell, float]
    score: Mapping[Cell, float]

    def seed(self, cell: Cell, pairs: float) -> float:
        """Return the hours of another seed of a cell."""
        return self.train[cell] + self.score[cell] * pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When a sweep stops: at half an interval of `until`, or before it costs more than `budget_h` device hours.

    `declared` are the seeds that the grid has; those come before any other.
    """

    until: float | None = None
    budget_h: float | None = None
    declared: Mapping[Cell, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is known of a complete state."""

    questions: Sequence[Question]
    costs: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The state to bring about, and why; `hours` are what it adds. A rule that `stops` adds nothing."""

    state: State
    why: str
    stops: bool = False
    hours: float = 0.0
    reached: bool = False


# What is known of a state; None where it is not complete.
Measure = Callable[[State], Found | None]


def first(pairs: int | None, rule: Rule, costs: Costs, rows: int) -> State:
    """Return the state to begin with: the grid; under a budget one seed of each cell that fits, by its estimate.

    `rows` are the pairs of its largest set. A state without a seed says that nothing fits.
    """
    if rule.budget_h is None:
        return State(seeds=dict(rule.declared), pairs=pairs)
    seeds, left_h = dict[Cell, int](), rule.budget_h
    for cell in rule.declared:
        if (hours := costs.seed(cell, min(rows, pairs or rows))) <= left_h:
            seeds[cell], left_h = 1, left_h - hours
    return State(seeds=seeds, pairs=pairs)


def decide(state: State, found: Found, rule: Rule) -> Decision:
    """Return what to add to a complete state: what narrows the widest interval most per hour, as much as at most doubles the cost.

    The spread is measured again before more is added. Where a model has one seed, whose spread nobody knows, each gets a second one first.
    """
    questions, costs = found.questions, found.costs
    if not questions:
        return Decision(state=state, why="no difference can be told yet: see what did not learn", stops=True)
    widest = max(questions, key=lambda item: item.half_width)
    known = math.isfinite(widest.half_width)
    now = f"± {widest.half_width:.3f}" if known else "no interval over other trainings yet"
    now += f" ({widest.name})"
    if rule.until is not None and widest.half_width <= rule.until:
        return Decision(state=state, why=f"reached: {now}", stops=True, reached=True)
    room = math.inf if rule.budget_h is None else rule.budget_h - costs.spent
    rows = max(max(item.rows) for item in questions)
    if rule.until is not None and min(state.seeds.values()) > 1:
        everything = State(seeds={cell: max(MOST_SEEDS, seeds) for cell, seeds in state.seeds.items()})
        limit = max(item.predicted(state, everything) for item in questions)
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
    """Return the step that narrows the widest interval most per hour, and its hours; None where none fits or is worth it."""
    widest = max(questions, key=lambda item: item.predicted(now, then))
    wide, drawn = widest.predicted(now, then), min(rows, then.pairs or rows)
    # What a second training of a model would say nobody knows, and what was declared goes before what nobody asked for.
    short = [cell for cell, seeds in then.seeds.items() if seeds < max(2, rule.declared.get(cell, 0))]
    if short:
        short.sort(key=lambda cell: then.seeds[cell])
        steps = [(_with_seed(then, cell), costs.seed(cell, drawn)) for cell in short]
        return next((step for step in steps if step[1] <= room), None)
    cells = [cell for cell in then.seeds if cell[0] == widest.train_set and cell[1] in widest.seeds]
    steps = [
        (_with_seed(then, cell), costs.seed(cell, drawn)) for cell in cells if then.seeds[cell] < MOST_SEEDS
    ]
    if drawn < rows:
        more = min(rows, 2 * drawn)
        hours = more * sum(costs.score[cell] * seeds for cell, seeds in then.seeds.items())
        steps.append((replace(then, pairs=more), hours))
    worth = [
        # Rounded, so that of equals the first is taken on any machine.
        (float(f"{(wide - wider) / max(hours, 1e-12):.6g}"), after, hours)
        for after, hours in steps
        if hours <= room and (wider := widest.predicted(now, after)) < wide * (1 - LEAST_GAIN)
    ]
    if not worth:
        return None
    _, after, hours = max(worth, key=lambda item: item[0])
    return after, hours


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
    """Yield the decisions from a first state on, until one stops, or wants what is not complete."""
    while (found := measure(state)) is not None:
        decision = decide(state, found, rule)
        yield decision
        if decision.stops:
            return
        state = decision.state


def predicts(state: State, found: Found) -> Callable[[State], Found]:
    """Return what the states that follow a state are expected to measure."""

    def measure(then: State) -> Found:
        questions = []
        for item in found.questions:
            wide = item.predicted(state, then)
            questions.append(replace(item, half_width=wide, seeds=item.design(state, then).seeds))
        pairs = max(max(item.rows) for item in found.questions)
        costs, drawn = found.costs, min(pairs, then.pairs or pairs)
        spent = costs.spent + sum(
            (seeds - state.seeds[cell]) * costs.seed(cell, drawn) for cell, seeds in then.seeds.items()
        )
        if drawn > min(pairs, state.pairs or pairs):
            spent += drawn * sum(costs.score[cell] * seeds for cell, seeds in state.seeds.items())
        return Found(questions=questions, costs=replace(costs, spent=spent))

    return measure
