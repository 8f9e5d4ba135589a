"""Sweeps that grow until an interval is narrow enough (--until) or a budget is spent (--budget), and the power that `plan` prints.

A command replays all decisions (plan/design.py) from the declared grid and the artifacts. No other state is kept, so a
run that was killed makes the same decisions again.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from orchestrator.cli.session import Session
from orchestrator.plan import design, placement
from orchestrator.plan.design import (
    PRIOR,
    Cell,
    Components,
    Costs,
    Decision,
    Design,
    Found,
    Question,
    Rule,
    State,
)
from orchestrator.plan.durations import UNSEEN_PAIRS, Durations, slowest
from orchestrator.plan.hardware import Node
from orchestrator.plan.outlook import architectures, price_of
from orchestrator.report.comparison import MODELS_NEEDED, Analysis
from orchestrator.report.power import asked, components, half_width
from orchestrator.report.results import on_common_pairs, sweep_results
from orchestrator.spec.declaration import declare
from orchestrator.spec.resolve import ResolvedSweep, missing_trials
from orchestrator.spec.stages import EvaluateStage, ReferenceStage, SampleStage, TrialPlan
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.artifacts import Store
from orchestrator.store.records import CATEGORIES, Category, read_state
from trainers.errors import SpecError
from trainers.models.architecture import Architecture
from trainers.specs import ModelSpec

_BUDGET = re.compile(r"(?P<dollars>\$)?(?P<number>\d+(\.\d*)?|\.\d+)(?P<unit>gpuh|cpuh)?")


def grows(session: Session) -> bool:
    """Return whether --until or --budget is given. Raises SpecError for both, or for a width that none can be."""
    until, budget = session.options.until, session.options.budget
    if until is not None and budget is not None:
        raise SpecError(
            "--until stops at a width, --budget at a price; give one of them: `plan --until …` prints what the width costs."
        )
    if until is not None and not 0 < until < 1:
        raise SpecError(
            f"--until {until}: give half the width of an interval of an accuracy difference, above 0 and below 1: --until 0.03."
        )
    return until is not None or budget is not None


def budget_hours(text: str, nodes: Sequence[Node], price: float | None = None) -> float:
    """Return the device hours that `40gpuh`, `2cpuh` or `$200` stand for. Raises SpecError."""
    gpus, found = placement.gpus_of(nodes)[0], _BUDGET.fullmatch(text)
    if found is None or bool(found["dollars"]) == bool(found["unit"]) or not float(found["number"]):
        raise SpecError(
            f"--budget {text}: give an amount above 0 with its unit: 40gpuh, 2cpuh, or '$200' in quotes."
        )
    number, unit = float(found["number"]), found["unit"]
    right, why = (
        ("gpuh", "it runs on GPUs; give GPU") if gpus else ("cpuh", "there is no GPU to run on; give CPU")
    )
    if unit and unit != right:
        raise SpecError(f"--budget {text}: {why}-hours: --budget {number:g}{right}.")
    if unit:
        return number
    per_hour, _ = price_of(nodes, price)
    if not per_hour:
        raise SpecError(
            f"--budget {text}: nothing here has a price; give hours (--budget 2cpuh), or GPUs with one (--cluster 1x8xH100-80GB@2.50)."
        )
    return number / per_hour


@dataclass(kw_only=True)
class Growth:
    """A declared grid, and how it grows on the nodes. `price` replaces that of the nodes."""

    base: Sweep
    store: Store
    nodes: Sequence[Node]
    resolve: Callable[[Sweep], ResolvedSweep]
    until: float | None = None
    budget: str | None = None
    price: float | None = None
    # Device hours by artifact, over all states so far; those of failed attempts at them apart.
    _spent: dict[str, float] = field(default_factory=dict)
    _lost: dict[str, float] = field(default_factory=dict)

    @cached_property
    def cells(self) -> dict[Cell, dict[int, list[TrialSpec]]]:
        """The trials of each cell, by seed."""
        found: dict[Cell, dict[int, list[TrialSpec]]] = {}
        for trial in self.base.trials:
            cell = found.setdefault((trial.train_set.name, trial.model.name), {})
            cell.setdefault(trial.seed, []).append(trial)
        return found

    @cached_property
    def rule(self) -> Rule:
        hours = budget_hours(self.budget, self.nodes, self.price) if self.budget else None
        declared = {cell: len(seeds) for cell, seeds in self.cells.items()}
        return Rule(until=self.until, budget_h=hours, declared=declared)

    @cached_property
    def grid(self) -> ResolvedSweep:
        """The declared grid."""
        return self.resolve(self.base)

    def sweep(self, state: State) -> Sweep:
        """Return the sweep of a state. Added seeds count on from the largest declared one."""
        trials = []
        for number in range(max(state.seeds.values())):
            for cell, count in state.seeds.items():
                declared = list(self.cells[cell])
                if number < min(count, len(declared)):
                    trials += self.cells[cell][declared[number]]
                elif number < count:
                    seed = max(declared) + 1 + number - len(declared)
                    trials += [replace(trial, seed=seed) for trial in self.cells[cell][declared[0]]]
        wide = (replace(item, eval_draw=replace(item.eval_draw, max_pairs=state.pairs)) for item in trials)
        return replace(self.base, trials=tuple(wide))

    def measure(self, state: State) -> Found | None:
        """Return the measurements of a state; None if artifacts of it are missing."""
        resolved = self.resolve(self.sweep(state))
        if missing_trials(resolved.plans, self.store):
            return None
        questions = self.questions(resolved, measured=True)
        told = {(item.train_set, item.category) for item in questions}
        untold = [f"trained on {place[0]}, {place[1]}" for place in _places(resolved) if place not in told]
        return Found(questions=questions, costs=self.costs(resolved, measured=True), untold=untold)

    def questions(self, resolved: ResolvedSweep, *, measured: bool) -> list[Question]:
        """Return the differences to estimate, as `measured`, or as expected of the whole design."""
        places = _places(resolved)
        if not places:
            return []
        analysis = Analysis(on_common_pairs(sweep_results(declare(resolved), self.store)))
        means = {(scope.train_set, scope.category): mean for (scope, _), mean in asked(analysis).items()}
        found = []
        for train_set, category in places:
            plans = [plan for plan in resolved.plans if plan.spec.train_set.name == train_set]
            mean = means.get((train_set, category))
            if measured and not mean:
                continue
            rows, suites = (
                [
                    split.rows or UNSEEN_PAIRS
                    for split in {stage.prepared.split for stages in part for stage in stages}
                    if resolved.categories[train_set, split.name] == category
                ]
                for part in zip(*map(_evaluations, plans), strict=True)
            )
            trained = {(plan.spec.model.name, plan.spec.seed) for plan in plans}
            seeds = dict(Counter(model for model, _ in trained))
            pairs = design.pairs_of(rows, plans[0].spec.eval_draw.max_pairs, suites)
            whole = Design(seeds=seeds, pairs=pairs, over_models=len(seeds) >= MODELS_NEEDED)
            parts = _with_priors(components(*mean.columns), pairs) if mean else PRIOR
            counted = {model: len(cells) for model, cells in mean.cells.items()} if mean else {}
            if mean and (measured or counted == seeds):
                seeds, wide = counted, half_width(mean) if mean.spread.trainings else math.inf
            else:
                # A few trainings that do not vary say nothing about the others.
                parts = parts if design.spread(parts, whole)[0] > 1e-12 else PRIOR
                wide = design.half_width(parts, whole)
            found.append(
                Question(
                    train_set=train_set,
                    category=category,
                    half_width=wide,
                    parts=parts,
                    seeds=seeds,
                    rows=rows,
                    whole=suites,
                    over_models=len(seeds) >= MODELS_NEEDED,
                )
            )
        return found

    def costs(self, resolved: ResolvedSweep, *, measured: bool) -> Costs:
        """Return the costs of each cell, `measured` by its artifacts, or estimated as if nothing had run yet."""
        train, score = dict[Cell, list[float]](), dict[Cell, list[float]]()
        shared, lost = dict[Cell, dict[str, float]](), dict[str, float]()
        for note in read_state(self.base.name, self.store).trials.values() if measured else ():
            # Of a stage that trials share, each has noted the same.
            lost |= {name: max(hours, lost.get(name, 0.0)) for name, hours in note.lost_h.items()}
        for plan in resolved.plans:
            cell = plan.spec.train_set.name, plan.spec.model.name
            needs = shared.setdefault(cell, {})
            trained, scored = self._measured_h(plan, lost) if measured else self._estimated_h(plan, needs)
            train.setdefault(cell, []).append(trained)
            score.setdefault(cell, []).append(scored / _drawn(plan))
        a_seed = {cell: len(next(iter(seeds.values()))) for cell, seeds in self.cells.items()}
        return Costs(
            spent=self.spent_h if measured else 0.0,
            shared=shared,
            train={cell: a_seed[cell] * sum(hours) / len(hours) for cell, hours in train.items()},
            score={cell: a_seed[cell] * sum(hours) / len(hours) for cell, hours in score.items()},
        )

    @property
    def spent_h(self) -> float:
        """Device hours of all states so far."""
        return sum(self._spent.values()) + sum(self._lost.values())

    def _measured_h(self, plan: TrialPlan, lost: Mapping[str, float]) -> tuple[float, float]:
        """Return the hours of a training with what does not depend on evaluation pairs, and those of the evaluations."""
        for stage in plan.stages():
            manifest, name = self.store.sound_manifest(stage.kind, stage.key), f"{stage.kind}/{stage.key}"
            if manifest and stage.kind in ("sample", "reference", "train", "evaluate"):
                # Only trainings note where they ran.
                ranks = manifest["info"].get("placement", {}).get("world_size", 1)
                self._spent[name] = ranks * manifest["seconds"] / 3600
                self._lost[name] = lost.get(name, 0.0)
        drawn, suites = _evaluations(plan)
        scored, whole = (
            sum(self._spent[f"evaluate/{stage.key}"] for stage in stages)
            for stages in (drawn, (*suites, *plan.answers))
        )
        return self._spent[f"train/{plan.key}"] + whole, scored

    @cached_property
    def _known(self) -> dict[ModelSpec, Architecture | None]:
        policies = [trial.answers.policy for trial in self.base.trials if trial.answers]
        return architectures(
            [*(trial.model for trial in self.base.trials), *policies], ask=self.unit == "GPU"
        )

    def _estimated_h(self, plan: TrialPlan, shared: dict[str, float]) -> tuple[float, float]:
        """Return the hours as `_measured_h` does, and note those of the trial's answers and reference passes in `shared`."""
        plan = replace(plan, architecture=self._known[plan.spec.model])
        placed = placement.place(plan.spec, self.nodes, self.base.placements, architecture=plan.architecture)
        # An estimate from sets that are prepared by now would differ from that of the run that was killed.
        times = Durations(store=_Nothing(self.store.root), kind=slowest(self.nodes))
        drawn, suites = _evaluations(plan)
        scored, whole = (
            times.scoring_s(plan, [stage.prepared for stage in stages], placed) if stages else 0.0
            for stages in (drawn, (*suites, *plan.answers))
        )
        for stage in plan.stages():
            if isinstance(stage, ReferenceStage):
                shared[stage.key] = times.scoring_s(plan, [stage.prepared], placed) / 3600
            elif isinstance(stage, SampleStage) and plan.spec.answers:
                policy = self._known[plan.spec.answers.policy]
                shared[stage.key] = times.sample_s(plan, stage, policy, placed) / 3600
        trained = placed.world_size * times.train_s(plan, placed)
        return (trained + whole) / 3600, scored / 3600

    def begin(self) -> State:
        """Return the first state. Raises SpecError if there is no difference to estimate, or no cell fits the budget."""
        if not _places(self.grid):
            raise SpecError(
                "--until and --budget need a difference of two reward types, and no training set has two; name them: --rewards ex_rm im_rm."
            )
        costs, drawn = self.costs(self.grid, measured=False), max(map(_drawn, self.grid.plans))
        state = design.first(self.base.trials[0].eval_draw.max_pairs, self.rule, costs, drawn)
        if not state.seeds:
            hours, cell = min((costs.first_seed(cell, drawn), cell) for cell in self.cells)
            raise SpecError(
                f"--budget {self.budget}: no cell fits. The cheapest, {cell[1]} on {cell[0]}, takes about {hours:.2g} "
                f"{self.unit}-hours for one seed with all that it needs; give more than that."
            )
        return state

    @property
    def unit(self) -> str:
        return "GPU" if placement.gpus_of(self.nodes)[0] else "CPU"

    def replay(self, state: State) -> tuple[State, Decision | None]:
        """Replay the decisions from a state on; return the state to run, and the last decision, None if the first is not complete."""
        last = None
        for last in design.play(state, self.measure, self.rule):
            state = last.state
        return state, last

    def rounds(self, say: Callable[[str], None]) -> Iterator[Sweep]:
        """Yield the sweep to run next, each time from what is complete by then, until the rule stops or trials fail."""
        state, before = self.begin(), None
        while True:
            state, decision = self.replay(state)
            if state == before and not (decision and decision.stops):
                return
            if decision:
                more = f", about {rounded(decision.hours)} more" if decision.hours else ""
                say(f"design: {decision.why}; {self._so_far()}{more}")
            if state != before:
                yield self.sweep(state)
            if decision and decision.stops:
                return
            before = state

    def _so_far(self) -> str:
        """Say what was spent, on attempts that failed, and over the budget."""
        said = f"{rounded(self.spent_h)} {self.unit}-hours so far"
        if lost := sum(self._lost.values()):
            said += f", {rounded(lost)} of them in attempts that failed or were killed"
        over = self.spent_h - (self.rule.budget_h or math.inf)
        return said + (f", {rounded(over)} more than the budget" if over > 0 else "")

    def outlook(self) -> list[dict[str, Any]]:
        """Return the half-width and the detectable difference of the declared design, for each difference."""
        found = []
        for item in self.questions(self.grid, measured=False):
            state = State(seeds={}, pairs=self.base.trials[0].eval_draw.max_pairs)
            here, known = item.design(state, state), math.isfinite(item.half_width)
            found.append(
                {
                    "train_set": item.train_set,
                    "category": item.category,
                    "design": str(here),
                    "detectable": design.detectable(item.half_width, item.parts, here) if known else None,
                    "half_width": item.half_width if known else None,
                    "measured": item.parts is not PRIOR,
                }
            )
        return found

    def forecast(self) -> str:
        """Say what the rule is expected to add to the complete trials, and what the whole sweep will cost."""
        state, _ = self.replay(self.begin())
        found = self.measure(state)
        if found is None:
            resolved = self.resolve(self.sweep(state))
            costs, drawn = self.costs(resolved, measured=False), max(map(_drawn, resolved.plans))
            paid = {key: hours for cell in state.seeds for key, hours in costs.shared[cell].items()}
            spent = sum(costs.seed(cell, drawn) * seeds for cell, seeds in state.seeds.items()) + sum(
                paid.values()
            )
            questions = self.questions(resolved, measured=False)
            found = Found(questions=questions, costs=replace(costs, spent=spent))
        measure = design.predicts(state, found)
        for decision in design.play(state, measure, self.rule):
            state = decision.state
        hours = measure(state).costs.spent
        return f"expected under the rule: {decision.why}; about {rounded(hours)} {self.unit}-hours in all"


class _Nothing(Store):
    """A store without artifacts."""

    def sound_manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        return None


def _places(resolved: ResolvedSweep) -> list[tuple[str, Category]]:
    """Return the training sets and categories in which two reward types differ."""
    types: dict[str, set[str]] = {}
    for plan in resolved.plans:
        types.setdefault(plan.spec.train_set.name, set()).add(plan.spec.reward_name)
    places = {(train_set, category) for (train_set, _), category in resolved.categories.items()}
    found = [place for place in places if place[1] != "training pairs" and len(types[place[0]]) > 1]
    return sorted(found, key=lambda place: (CATEGORIES.index(place[1]), place[0]))


def _drawn(plan: TrialPlan) -> int:
    """Return the pairs that are drawn from the largest set."""
    rows = max((stage.prepared.split.rows or UNSEEN_PAIRS for stage in _evaluations(plan)[0]), default=1)
    return min(rows, plan.spec.eval_draw.max_pairs or rows)


def _evaluations(plan: TrialPlan) -> tuple[list[EvaluateStage], list[EvaluateStage]]:
    """Return the evaluations on the pairs that are drawn from a set, and those on all pairs of a suite."""
    drawn = [stage for stage in plan.evaluations if stage.prepared.draw == plan.spec.eval_draw]
    return drawn, [stage for stage in plan.evaluations if stage not in drawn]


def _with_priors(parts: dict[str, float | None], pairs: float) -> Components:
    """Return the variances that were found, and the priors of those that one seed or one model cannot give."""
    prior = {name: getattr(PRIOR, name) for name in parts} | {"pairs_seeds": PRIOR.pairs_seeds / pairs}
    return Components(
        at=pairs, **{name: prior[name] if value is None else value for name, value in parts.items()}
    )


def design_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the design detects; categories for which it is the same share a line."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for item in found:
        same = (item["train_set"], item["design"], item["detectable"], item["half_width"], item["measured"])
        names.setdefault(same, []).append(item["category"])
    lines = []
    for (train_set, here, least, wide, measured), categories in names.items():
        said = f"{here} give no interval over other trainings; give two seeds or more"
        if least is not None:
            known = "from the spread found so far" if measured else "by priors (docs/design.md)"
            said = f"{here} detect a difference of {least:.2f} with 80 % power (± {wide:.2f}), {known}"
        lines.append(f"trained on {train_set}, {', '.join(categories)}: {said}")
    return lines


def rounded(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
