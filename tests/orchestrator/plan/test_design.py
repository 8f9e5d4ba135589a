"""What a design tells apart, and how a sweep grows: known answers, rules that must hold, and coverage on simulated sweeps."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from orchestrator.plan.design import (
    MOST_SEEDS,
    Components,
    Costs,
    Decision,
    Design,
    Found,
    Question,
    Rule,
    State,
    decide,
    detectable,
    first,
    half_width,
    play,
    predicts,
    spread,
)
from orchestrator.report.power import components
from orchestrator.report.statistics import Estimate, Spread, crossed, unbounded_interval

PAIRS = 400
# Standard deviations over models and seeds, and of a pair: shared, by model, by training.
WORLDS = {
    "seeds": (0.0, 0.08, 0.3, 0.2, 0.3),
    "pairs": (0.0, 0.01, 0.7, 0.2, 0.4),
    "models": (0.04, 0.03, 0.3, 0.2, 0.3),
}


class Sweeps:
    """A simulated sweep without end: what each of `PAIRS` pairs adds in every training that may come, about a difference."""

    def __init__(self, world: str, models: int, number: int, difference: float = 0.0) -> None:
        random = np.random.default_rng([number, models, *world.encode()])
        self.of_models, *sds = WORLDS[world]
        shapes = ((1, models, MOST_SEEDS), (PAIRS, 1, 1), (PAIRS, models, 1), (PAIRS, models, MOST_SEEDS))
        self.values = difference + random.normal(scale=self.of_models, size=(1, models, 1))
        self.values = self.values + sum(
            random.normal(scale=sd, size=shape) for sd, shape in zip(sds, shapes, strict=True)
        )

    def strata(self, state: State):
        pairs = state.pairs or PAIRS
        return [
            self.values[:pairs, number, :seeds] / pairs for number, seeds in enumerate(state.seeds.values())
        ], np.zeros(pairs, dtype=int)

    def interval(self, state: State) -> tuple[Estimate, Spread]:
        """As a report makes it, over models where these vary."""
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


def costs(state: State, **train: float) -> Costs:
    hours = {cell: train.get(cell[1], 1.0) for cell in state.seeds}
    spent = sum((hours[cell] + 1e-4 * PAIRS) * seeds for cell, seeds in state.seeds.items())
    return Costs(spent=spent, train=hours, score=dict.fromkeys(state.seeds, 1e-4))


def start(models: int, seeds: int = 2, pairs: int | None = 100) -> State:
    return State(seeds={("a", f"m{number}"): seeds for number in range(models)}, pairs=pairs)


def last(sweep: Sweeps, state: State, rule: Rule) -> Decision:
    *_, decision = play(state, sweep.measure, rule)
    assert decision.stops
    return decision


@pytest.mark.parametrize(
    ("sweeps", "least"), [(200, 0.90), pytest.param(2000, 0.93, marks=pytest.mark.slow)], ids=["200", "2000"]
)
@pytest.mark.parametrize(
    ("world", "models", "until"), [("seeds", 2, 0.04), ("pairs", 2, 0.08), ("models", 6, 0.05)]
)
def test_stopping_by_width_leaves_the_coverage(
    world: str, models: int, until: float, sweeps: int, least: float
):
    held = grew = 0
    for number in range(sweeps):
        sweep, begin = Sweeps(world, models, number), start(models)
        state = last(sweep, begin, Rule(until=until)).state
        estimate, _ = sweep.interval(state)
        held += estimate.low <= 0 <= estimate.high
        grew += state != begin
    assert grew > sweeps / 2
    assert held / sweeps >= least


@pytest.mark.parametrize(("world", "until"), [("seeds", 0.05), ("pairs", 0.09), ("models", 0.08)])
def test_the_sign_of_a_difference_moves_no_decision(world: str, until: float):
    """The same trainings about +0.2, −0.2 and 0 are given the same seeds and pairs."""
    played = [
        [*play(start(4), Sweeps(world, 4, 1, difference).measure, Rule(until=until))]
        for difference in (0.0, 0.2, -0.2)
    ]
    assert len(played[0]) > 1
    for other in played[1:]:
        assert [item.state for item in other] == [item.state for item in played[0]]


@pytest.mark.parametrize(("world", "models"), [("seeds", 2), ("models", 6)])
def test_what_is_predicted_of_the_design_that_there_is_is_its_interval(world: str, models: int):
    """Where no part is cut off at 0, `spread` is `statistics.crossed` read the other way round."""
    sweep, state = Sweeps(world, models, 3), start(models, seeds=5, pairs=None)
    question = sweep.measure(state).questions[0]
    assert min(question.parts.seeds, question.parts.pairs, question.parts.pairs_seeds) > 0
    variance, degrees = spread(question.parts, question.design(state, state))
    _, found = sweep.interval(state)
    assert variance == pytest.approx(found.variance)
    assert degrees == pytest.approx(found.degrees)


def test_components_are_found_again():
    """The mean over 200 sweeps of each variance is that which the sweeps were drawn with."""
    found = [components(*Sweeps("models", 6, number).strata(start(6, 3, None))) for number in range(200)]
    means = {name: np.mean([item[name] for item in found]) for name in found[0]}
    sd = dict(zip(("models", "seeds", "pairs", "pairs_models", "pairs_seeds"), WORLDS["models"], strict=True))
    assert means["models"] == pytest.approx(sd["models"] ** 2, rel=0.15)
    assert means["seeds"] == pytest.approx(sd["seeds"] ** 2, rel=0.1)
    for name in ("pairs", "pairs_models", "pairs_seeds"):
        assert means[name] == pytest.approx(sd[name] ** 2 / PAIRS, rel=0.1)


def test_the_detectable_difference_is_found_in_four_of_five_sweeps():
    parts = Components(models=0.04**2, seeds=0.03**2, pairs=0.09, pairs_models=0.04, pairs_seeds=0.09, at=1)
    design = Design(seeds={f"m{number}": 3 for number in range(6)}, pairs=PAIRS, over_models=True)
    least = detectable(half_width(parts, design), parts, design)
    found = [Sweeps("models", 6, number, least).interval(start(6, 3, None))[0] for number in range(400)]
    assert np.mean([item.low > 0 for item in found]) == pytest.approx(0.8, abs=0.05)


def test_half_an_interval_by_hand():
    """Two models, three seeds each, and pairs without end: Student's t with four degrees of freedom."""
    parts = Components(models=9.0, seeds=0.06, pairs=1.0, pairs_models=1.0, pairs_seeds=0.0, at=1)
    design = Design(seeds={"a": 3, "b": 3}, pairs=1e12, over_models=False)
    assert half_width(parts, design) == pytest.approx(student.ppf(0.975, 4) * 0.1, rel=1e-4)
    assert str(design).startswith("2 models × 3 seeds × ")


def test_seeds_go_where_they_are_cheap_and_pairs_where_those_decide():
    found = Sweeps("seeds", 2, 0).measure(start(2, 3, None))
    cheap = replace(found, costs=costs(start(2, 3), m0=1.0, m1=20.0))
    decision = decide(start(2, 3, None), cheap, Rule(until=0.06))
    assert decision.state.seeds["a", "m0"] > 3 == decision.state.seeds["a", "m1"]
    # Then variances and costs are measured again.
    assert 0 < decision.hours <= 1.01 * cheap.costs.spent
    begin = start(2, 3, 100)
    scored = decide(begin, Sweeps("pairs", 2, 0).measure(begin), Rule(until=0.09)).state
    assert scored == replace(begin, pairs=400)
    # The interval of one training of each of two models says nothing of others.
    alone = start(2, 1, None)
    decision = decide(alone, Sweeps("pairs", 2, 0).measure(alone), Rule(until=0.9))
    assert set(decision.state.seeds.values()) == {2}


def test_a_width_that_no_seed_reaches_is_given_up_on_all_pairs_only():
    """What 25 of 400 pairs say of 30 seeds and all pairs may be far off."""
    begin = start(6, 4, 25)
    played = [*play(begin, Sweeps("models", 6, 0).measure, Rule(until=0.01))]
    assert [item.state.pairs for item in played] == [50, 100, 200, 400, 400]
    assert {tuple(item.state.seeds.values()) for item in played} == {(4,) * 6}
    assert [item.stops for item in played] == [False] * 4 + [True]
    assert played[0].hours == pytest.approx(50 * 6 * 4 * 1e-4)
    assert "reached" not in played[-1].why
    assert "it takes more models" in played[-1].why


def test_a_budget_runs_the_grid_breadth_first_and_is_kept():
    begin = start(3, 1, None)
    rule = Rule(budget_h=14.5, declared={("a", f"m{number}"): 2 for number in range(3)})
    assert first(None, rule, costs(begin), PAIRS) == begin
    assert not first(None, replace(rule, budget_h=0.5), costs(begin), PAIRS).seeds
    sweep = Sweeps("seeds", 3, 0)
    states = [item.state for item in play(begin, sweep.measure, rule)]
    assert set(states[0].seeds.values()) == {2}
    assert 13.5 < sum(states[-1].seeds.values()) * 1.04 <= 14.5
    # Cheap seeds are bought where a second seed of a dear model does not fit.
    begin = State(seeds={("a", "m0"): 2, ("a", "m1"): 2, ("a", "dear"): 1}, pairs=None)
    found = replace(Sweeps("seeds", 3, 0).measure(begin), costs=costs(begin, dear=50.0))
    decision = decide(begin, found, Rule(budget_h=found.costs.spent + 3))
    assert decision.state.seeds["a", "dear"] == 1
    assert sum(decision.state.seeds.values()) > 5


def test_a_cell_pays_for_its_own_reference_passes_and_not_for_those_of_others():
    rule = Rule(budget_h=2.5, declared={("a", "m0"): 1, ("a", "m1"): 1, ("b", "m0"): 1})
    hours = dict.fromkeys(rule.declared, 1.0)
    needs = {("a", "m0"): {"of m0": 0.25}, ("a", "m1"): {"of m1": 9.0}, ("b", "m0"): {"of m0": 0.25}}
    asked = Costs(spent=0.0, train=hours, score=dict.fromkeys(rule.declared, 0.0), shared=needs)
    assert [*first(None, rule, asked, PAIRS).seeds] == [("a", "m0"), ("b", "m0")]


def test_a_forecast_comes_to_what_it_predicts():
    begin = start(2, 3, None)
    found = Sweeps("seeds", 2, 5).measure(begin)
    *_, decision = play(begin, predicts(begin, found), Rule(until=0.05))
    assert decision.why.startswith("reached")
    wide = found.questions[0].predicted(begin, decision.state)
    assert wide <= 0.05 < found.questions[0].half_width


def test_what_did_not_learn_is_named():
    begin = start(2, 2, None)
    found = Sweeps("seeds", 2, 0).measure(begin)
    (decision,) = play(begin, predicts(begin, replace(found, questions=[])), Rule(until=0.05))
    assert decision.stops
    assert "did not learn" in decision.why
    said = decide(begin, replace(found, untold=["trained on b, domain shift"]), Rule(until=0.9)).why
    assert said.startswith("reached: ±")
    assert said.endswith("no estimate, see what did not learn: trained on b, domain shift")
