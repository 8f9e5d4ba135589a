"""How often the interval of a difference holds the truth, on simulated sweeps whose truth is known.

Shapes: U pairs, M models, S seeds.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from orchestrator.report.statistics import bounded_interval, crossed

PAIRS, SEEDS = 200, 3
MODELS = (4, 6, 12)
EFFECTS = (0.0, 0.3, 0.9, -0.97)


@dataclass(frozen=True, kw_only=True)
class World:
    """Standard deviations of a margin: of the model, the seed, the pair for both types, the pair for one type, and the rest.

    A margin is drawn for each type, model, seed and pair; a pair with a margin above 0 is ranked right.
    """

    model: float
    seed: float
    pair: float
    pair_of_type: float
    rest: float

    @property
    def total(self) -> float:
        return float(np.linalg.norm([self.model, self.seed, self.pair, self.pair_of_type, self.rest]))


WORLDS = {
    "models": World(model=0.5, seed=0.1, pair=0.3, pair_of_type=0.3, rest=0.75),
    "seeds": World(model=0.1, seed=0.7, pair=0.3, pair_of_type=0.3, rest=0.6),
    "pairs": World(model=0.05, seed=0.05, pair=0.7, pair_of_type=0.6, rest=0.4),
}
SCENARIOS = [*itertools.product(WORLDS, MODELS, EFFECTS)]


def means(world: World, effect: float) -> tuple[float, float]:
    """The mean margins of two types whose accuracies differ by `effect`, about an accuracy of 0.6 where there is room."""
    middle = 0.6 if abs(effect) < 0.7 else 0.5
    above, below = (float(ndtri(middle + sign * effect / 2)) * world.total for sign in (1, -1))
    return above, below


def margins(world: World, mean: float, pair_U, models_M, random) -> np.ndarray:
    """[U, M, S]; `models_M` are the models' effects on this type."""
    seeds = random.normal(scale=world.seed, size=(1, len(models_M), SEEDS))
    of_type = random.normal(scale=world.pair_of_type, size=(PAIRS, 1, 1))
    rest = random.normal(scale=world.rest, size=(PAIRS, len(models_M), SEEDS))
    return mean + models_M[None, :, None] + seeds + world.pair * pair_U[:, None, None] + of_type + rest


def sweep(world: World, effect: float, models_2M, random) -> np.ndarray:
    """What each pair adds to baseline − other, [U, M, S]."""
    pair_U = random.normal(size=PAIRS)
    first, second = (
        margins(world, mean, pair_U, models_M, random) > 0
        for mean, models_M in zip(means(world, effect), models_2M, strict=True)
    )
    return (first.astype(float) - second) / PAIRS


def interval(strata):
    """The interval over the trainings of `strata`, as a report makes it."""
    value = round(float(np.mean([values_UK.sum(axis=0).mean() for values_UK in strata])), 12)
    return bounded_interval(value, crossed(strata, np.zeros(PAIRS, dtype=int)), PAIRS, floor=-1)


def coverage(name: str, models: int, effect: float, sweeps: int) -> float:
    """The share of simulated sweeps whose interval over models holds the effect."""
    world, random = WORLDS[name], np.random.default_rng([models, round(100 * effect) + 100, *name.encode()])
    held = 0
    for _ in range(sweeps):
        models_2M = random.normal(scale=world.model, size=(2, models))
        found = interval([sweep(world, effect, models_2M, random).mean(axis=2)])
        held += found.low <= effect <= found.high
    return held / sweeps


def test_the_worlds_are_ruled_by_what_they_are_named_after():
    """Of the variance of a mean over six models, most is of models and seeds, or of pairs."""
    random = np.random.default_rng(0)
    for name, world in WORLDS.items():
        drawn = sweep(world, 0.3, random.normal(scale=world.model, size=(2, 400)), random)
        of_model = drawn.sum(axis=0)
        seeds = float(of_model.var(axis=1, ddof=1).mean()) / SEEDS
        models = float(of_model.mean(axis=1).var(ddof=1)) - seeds
        pairs = float(drawn.mean(axis=(1, 2)).var(ddof=1)) * PAIRS * 6
        assert max((models, "models"), (seeds, "seeds"), (pairs, "pairs"))[1] == name


@pytest.mark.parametrize(
    ("sweeps", "least"),
    [(200, binom.ppf(0.001, 200, 0.93) / 200), pytest.param(2000, 0.93, marks=pytest.mark.slow)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(sweeps: int, least: float):
    """In 93 % of each world's sweeps; of 200 of one scenario, fewer would be seen once in a thousand times."""
    found = {scenario: coverage(*scenario, sweeps) for scenario in SCENARIOS}
    for name in WORLDS:
        assert np.mean([share for (world, *_), share in found.items() if world == name]) >= 0.93, name
    assert {scenario: share for scenario, share in found.items() if share < least} == {}
    assert np.median([*found.values()]) <= 0.98


@pytest.mark.parametrize(("models", "seeds"), [(1, 3), (3, 3), (3, 1)])
def test_intervals_of_few_models_hold_what_other_seeds_and_pairs_of_these_models_would_say(models, seeds):
    world, random, held = WORLDS["pairs"], np.random.default_rng(models + 10 * seeds), 0
    for _ in range(400):
        models_2M = random.normal(scale=world.model, size=(2, models))
        drawn = sweep(world, 0.3, models_2M, random)[:, :, :seeds]
        found = interval([drawn[:, model] for model in range(models)])
        spread = world.total**2 - world.model**2
        chance = [
            float(ndtr((mean + effects_M) / np.sqrt(spread)).mean())
            for mean, effects_M in zip(means(world, 0.3), models_2M, strict=True)
        ]
        held += found.low <= chance[0] - chance[1] <= found.high
    # Of 400, less would be seen once in a hundred times at 95 %; one seed knows nothing of others, which matter little here.
    assert held / 400 >= 0.92
