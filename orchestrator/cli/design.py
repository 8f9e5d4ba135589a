"""Sweeps that grow until an interval is narrow enough (--until) or a budget is spent (--budget), and the power that `plan` prints.

A command replays all decisions (plan/design.py) from the declared grid and the artifacts. No other state is kept, so a
run that was killed makes the same decisions again.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from orchestrator.cli.options import Options
from orchestrator.cli.session import Session
from orchestrator.plan import design, placement
from orchestrator.plan.design import (
    PRIOR,
    Cell,
    Components,
    Costs,
    Design,
    Found,
    Question,
    Rule,
    State,
)
from orchestrator.plan.durations import UNSEEN_PAIRS
from orchestrator.plan.hardware import Node
from orchestrator.plan.outlook import outlook, price_of
from orchestrator.report.comparison import MODELS_NEEDED, Analysis
from orchestrator.report.power import asked, components, half_width
from orchestrator.report.results import on_common_pairs, sweep_results
from orchestrator.spec.declaration import declare
from orchestrator.spec.resolve import ResolvedSweep, missing_trials
from orchestrator.spec.stages import TrialPlan
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.artifacts import Store
from orchestrator.store.records import CATEGORIES, Category
from trainers.errors import SpecError

_NUMBER = r"\d+\.?\d*|\.\d+"
_BUDGET = re.compile(rf"(?:\$(?P<dollars>{_NUMBER})|(?P<hours>{_NUMBER})(?P<unit>gpuh|cpuh))")


def grows(session: Session) -> bool:
    """Return whether --until or --budget is given. Raises SpecError for a width that none can be, or for both."""
    until, budget = session.options.until, session.options.budget
    if until is not None and (budget is not None or not 0 < until < 1):
        raise SpecError(
            f"--until {until}: give half the width of an interval of an accuracy difference, above 0 and below 1: --until 0.03; and no --budget beside it."
        )
    return until is not None or budget is not None


def budget_hours(text: str, nodes: Sequence[Node]) -> float:
    """Return the device hours that `40gpuh`, `2cpuh` or `$200` stand for. Raises SpecError."""
    right = "gpuh" if placement.gpus_of(nodes)[0] else "cpuh"
    found = _BUDGET.fullmatch(text)
    amount = float(found["dollars"] or found["hours"]) if found else 0.0
    if found is None or found["unit"] not in (None, right) or not amount:
        raise SpecError(
            f"--budget {text}: give an amount above 0 with its unit: 40{right}, as it runs on {right[:3].upper()}s, or '$200' in quotes."
        )
    if found["unit"]:
        return amount
    per_hour, _ = price_of(nodes)
    if not per_hour:
        raise SpecError(
            f"--budget {text}: nothing here has a price; give hours (--budget 2cpuh), or GPUs with one (--cluster 1x8xH100-80GB@2.50)."
        )
    return amount / per_hour


@dataclass(kw_only=True)
class Growth:
    """A declared grid, and how it grows on the nodes."""

    base: Sweep
    store: Store
    nodes: Sequence[Node]
    resolve: Callable[[Sweep], ResolvedSweep]
    options: Options
    # Device hours by artifact, over all states so far.
    _spent: dict[str, float] = field(default_factory=dict)

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
        budget = self.options.budget
        hours = None if budget is None else budget_hours(budget, self.nodes)
        declared = {cell: len(seeds) for cell, seeds in self.cells.items()}
        return Rule(until=self.options.until, budget_h=hours, declared=declared)

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
        draws = [replace(item.eval_draw, max_pairs=state.pairs) for item in trials]
        trials = [replace(item, eval_draw=draw) for item, draw in zip(trials, draws, strict=True)]
        return replace(self.base, trials=tuple(trials))

    def measure(self, state: State) -> Found | None:
        """Return the measurements of a state; None if artifacts of it are missing."""
        resolved = self.resolve(self.sweep(state))
        if missing_trials(resolved.plans, self.store):
            return None
        analysis = Analysis(on_common_pairs(sweep_results(declare(resolved), self.store)))
        means = {(scope.train_set, scope.category): mean for (scope, _), mean in asked(analysis).items()}
        questions, untold = [], []
        for train_set, category in _places(resolved):
            if (mean := means.get((train_set, category))) is None:
                untold.append(f"trained on {train_set}, {category}")
                continue
            rows, whole = _design(resolved, train_set, category)
            seeds = {model: len(cells) for model, cells in mean.cells.items()}
            questions.append(
                Question(
                    train_set=train_set,
                    category=category,
                    half_width=half_width(mean) if mean.spread.trainings else math.inf,
                    parts=_with_priors(components(*mean.columns), whole.pairs),
                    seeds=seeds,
                    rows=rows,
                    over_models=len(seeds) >= MODELS_NEEDED,
                )
            )
        return Found(questions=questions, costs=self.costs(resolved), untold=untold)

    def costs(self, resolved: ResolvedSweep) -> Costs:
        """Return the costs of each cell of a complete state, by its artifacts."""
        train, score = dict[Cell, list[float]](), dict[Cell, list[float]]()
        for plan in resolved.plans:
            for stage in plan.stages():
                manifest = self.store.sound_manifest(stage.kind, stage.key)
                if manifest and stage.kind in ("sample", "reference", "train", "evaluate"):
                    # Only trainings note where they ran.
                    ranks = manifest["info"].get("placement", {}).get("world_size", 1)
                    self._spent[f"{stage.kind}/{stage.key}"] = ranks * manifest["seconds"] / 3600
            scored, answers = (
                sum(self._spent[f"evaluate/{stage.key}"] for stage in stages)
                for stages in (plan.evaluations, plan.answers)
            )
            cell = plan.spec.train_set.name, plan.spec.model.name
            # Answers do not depend on evaluation pairs.
            train.setdefault(cell, []).append(self._spent[f"train/{plan.key}"] + answers)
            score.setdefault(cell, []).append(scored / _drawn(plan))
        a_seed = {cell: len(next(iter(seeds.values()))) for cell, seeds in self.cells.items()}
        return Costs(
            spent=sum(self._spent.values()),
            train={cell: a_seed[cell] * sum(hours) / len(hours) for cell, hours in train.items()},
            score={cell: a_seed[cell] * sum(hours) / len(hours) for cell, hours in score.items()},
        )

    def begin(self) -> State:
        """Return the first state: the grid; with a budget, one seed of each cell.

        Raises SpecError if there is no difference to estimate, or if nothing is trained yet and the budget is too small.
        """
        if not _places(self.grid):
            raise SpecError(
                "--until and --budget need a difference of two reward types, and no training set has two; name them: --rewards ex_rm im_rm."
            )
        budget_h, pairs = self.rule.budget_h, self.base.trials[0].eval_draw.max_pairs
        if budget_h is None:
            return State(seeds=dict(self.rule.declared), pairs=pairs)
        state = State(seeds=dict.fromkeys(self.cells, 1), pairs=pairs)
        found = outlook(self.resolve(self.sweep(state)), self.nodes, self.store)
        if not found.stages["train"]["cached"] and found.device_hours > budget_h:
            raise SpecError(
                f"--budget {self.options.budget}: one seed of each model on each training set takes about {found.device_hours:.2g} "
                f"{self.unit}-hours; give more than that, or a smaller grid."
            )
        return state

    @property
    def unit(self) -> str:
        return "GPU" if placement.gpus_of(self.nodes)[0] else "CPU"

    def rounds(self, say: Callable[[str], None]) -> Iterator[Sweep]:
        """Yield the sweep to run next, each time from what is complete by then, until the rule stops or trials fail."""
        state, before = self.begin(), None
        while True:
            decision = None
            for decision in design.play(state, self.measure, self.rule):
                state = decision.state
            if state == before and not (decision and decision.stops):
                return
            if decision:
                more = f", about {shown_hours(decision.hours)} more" if decision.hours else ""
                said = f"{shown_hours(sum(self._spent.values()))} {self.unit}-hours so far"
                say(f"design: {decision.why}; {said}{more}")
            if state != before:
                yield self.sweep(state)
            if decision and decision.stops:
                return
            before = state

    def outlook(self) -> list[dict[str, Any]]:
        """Return what the declared design is expected to detect of each difference, by priors; None where it has no replicate."""
        found = []
        for train_set, category in _places(self.grid):
            _, here = _design(self.grid, train_set, category)
            wide = design.half_width(PRIOR, here)
            known = math.isfinite(wide)
            found.append(
                {
                    "train_set": train_set,
                    "category": category,
                    "design": str(here),
                    "detectable": design.detectable(wide, PRIOR, here) if known else None,
                    "half_width": wide if known else None,
                }
            )
        return found


def _places(resolved: ResolvedSweep) -> list[tuple[str, Category]]:
    """Return the training sets and categories in which two reward types differ."""
    types: dict[str, set[str]] = {}
    for plan in resolved.plans:
        types.setdefault(plan.spec.train_set.name, set()).add(plan.spec.reward_name)
    places = {(train_set, category) for (train_set, _), category in resolved.categories.items()}
    found = [place for place in places if place[1] != "training pairs" and len(types[place[0]]) > 1]
    return sorted(found, key=lambda place: (CATEGORIES.index(place[1]), place[0]))


def _design(resolved: ResolvedSweep, train_set: str, category: Category) -> tuple[list[int], Design]:
    """Return the sizes of a category's evaluation sets, and the design by which they are scored."""
    plans = [plan for plan in resolved.plans if plan.spec.train_set.name == train_set]
    splits = {stage.prepared.split for plan in plans for stage in plan.evaluations}
    here = [split for split in splits if resolved.categories[train_set, split.name] == category]
    rows = [split.rows or UNSEEN_PAIRS for split in here]
    seeds = Counter(model for model, _ in {(plan.spec.model.name, plan.spec.seed) for plan in plans})
    pairs = design.pairs_of(rows, plans[0].spec.eval_draw.max_pairs)
    return rows, Design(seeds=dict(seeds), pairs=pairs, over_models=len(seeds) >= MODELS_NEEDED)


def _drawn(plan: TrialPlan) -> int:
    """Return the pairs of the largest set that the trial is evaluated on."""
    rows = max(stage.prepared.split.rows or UNSEEN_PAIRS for stage in plan.evaluations)
    return min(rows, plan.spec.eval_draw.max_pairs or rows)


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
        same = (item["train_set"], item["design"], item["detectable"], item["half_width"])
        names.setdefault(same, []).append(item["category"])
    lines = []
    for (train_set, here, least, wide), categories in names.items():
        said = f"{here} give no interval over other trainings; give two seeds or more"
        if least is not None:
            said = f"{here} detect a difference of {least:.2f} with 80 % power (± {wide:.2f}), by priors (docs/design.md)"
        lines.append(f"trained on {train_set}, {', '.join(categories)}: {said}")
    return lines


def shown_hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
