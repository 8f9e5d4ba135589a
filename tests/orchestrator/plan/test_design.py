"""What a design tells apart, and how a sweep grows: known answers, rules that must hold, and coverage on simulated sweeps."""

import math

import numpy as np
import pytest

from orchestrator.plan.design import (
    MOST_SEEDS,
    Components,
    Costs,
    Found,
    Question,
    Rule,
    State,
    play,
)
from orchestrator.report.power import components
from orchestrator.report.statistics import crossed, unbounded_interval

PAIRS = 400
# Standard deviations over models, seeds, and per pair: shared, by model, by training.
WORLDS = {
    "seeds": (0.0, 0.08, 0.3, 0.2, 0.3),
    "pairs": (0.0, 0.01, 0.7, 0.2, 0.4),
    "models": (0.04, 0.03, 0.3, 0.2, 0.3),
}


class Sweeps:
    """A simulated sweep without end: what each of `PAIRS` pairs adds in every training that may come, about a difference of 0."""

    def __init__(self, world: str, models: int, number: int) -> None:
        random = np.random.default_rng([number, models, *world.encode()])
        self.of_models, *sds = WORLDS[world]
        shapes = ((1, models, MOST_SEEDS), (PAIRS, 1, 1), (PAIRS, models, 1), (PAIRS, models, MOST_SEEDS))
        self.values = random.normal(scale=self.of_models, size=(1, models, 1)) + sum(
            random.normal(scale=sd, size=shape) for sd, shape in zip(sds, shapes, strict=True)
        )

    def strata(self, state: State):
        pairs = state.pairs or PAIRS
        return [
            self.values[:pairs, number, :seeds] / pairs for number, seeds in enumerate(state.seeds.values())
        ], np.zeros(pairs, dtype=int)

    def interval(self, state: State):
        strata, groups = self.strata(state)
        value = float(np.mean([values.sum(axis=0).mean() for values in strata]))
        if self.of_models:
            strata = [np.stack([values.mean(axis=1) for values in strata], axis=1)]
        found = crossed(strata, groups)
        return unbounded_interval(value, found), found

    def measure(self, state: State) -> Found:
        estimate, found = self.interval(state)
        parts = {name: value or 0.0 for name, value in components(*self.strata(state)).items()}
        question = Question(
            train_set="a",
            category="domain shift",
            half_width=(estimate.high - estimate.low) / 2 if found.trainings else math.inf,
            parts=Components(**parts, at=state.pairs or PAIRS),
            seeds={model: seeds for (_, model), seeds in state.seeds.items()},
            rows=(PAIRS,),
            over_models=self.of_models > 0,
        )
        return Found(questions=[question], costs=costs(state))


def costs(state: State) -> Costs:
    return Costs(
        spent=sum(state.seeds.values()),
        train=dict.fromkeys(state.seeds, 1.0),
        score=dict.fromkeys(state.seeds, 1e-4),
    )


def start(models: int, seeds: int = 2, pairs: int | None = 100) -> State:
    return State(seeds={("a", f"m{number}"): seeds for number in range(models)}, pairs=pairs)


def grown(sweep: Sweeps, state: State, rule: Rule) -> State:
    *_, last = play(state, sweep.measure, rule)
    assert last.stops
    return last.state


@pytest.mark.parametrize(
    ("sweeps", "least"), [(200, 0.89), pytest.param(2000, 0.92, marks=pytest.mark.slow)], ids=["200", "2000"]
)
@pytest.mark.parametrize(
    ("world", "models", "until"), [("seeds", 2, 0.04), ("pairs", 2, 0.08), ("models", 6, 0.05)]
)
def test_stopping_by_width_leaves_the_coverage(
    world: str, models: int, until: float, sweeps: int, least: float
):
    held, grew = 0, 0
    for number in range(sweeps):
        sweep, begin = Sweeps(world, models, number), start(models)
        state = grown(sweep, begin, Rule(until=until))
        estimate, _ = sweep.interval(state)
        held += estimate.low <= 0 <= estimate.high
        grew += state != begin
    print(world, held / sweeps, grew / sweeps)
    assert grew > sweeps / 2
    assert held / sweeps >= least
