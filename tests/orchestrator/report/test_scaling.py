"""Lines over size: against least squares, coverage of the slope with random families, and ranges that say nothing."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import linregress

from orchestrator.report.comparison import Analysis
from orchestrator.report.house_style import rendered
from orchestrator.report.results import sweep_results
from orchestrator.report.scaling import draw_scaling, mixed_line, scaled, scaling_table
from orchestrator.spec import catalog
from orchestrator.store.artifacts import Store
from tests.orchestrator.simulated import simulated_sweep

SETS = (("ultrafeedback", "in-distribution"), ("rewardmath", "domain shift"))


def test_of_one_family_it_is_the_least_squares_line():
    x, noise = np.arange(5.0), np.random.default_rng(0).normal(size=5)
    line, known = mixed_line(x, 2 + 3 * x + noise, ["a"] * 5), linregress(x, 2 + 3 * x + noise)
    assert (line.slope, line.intercept) == pytest.approx((known.slope, known.intercept))
    assert line.rise().p == pytest.approx(known.pvalue)
    assert line.between == 0


def test_families_far_apart_leave_the_slope_within_them():
    """A line through all points would rise by the families' own levels: the larger family is the worse one."""
    x = np.array([0.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    y = np.array([5.0, 5.1, 5.2, 0.0, 0.1, 0.2]) + np.random.default_rng(1).normal(scale=1e-3, size=6)
    line = mixed_line(x, y, ["a"] * 3 + ["b"] * 3)
    assert line.slope == pytest.approx(0.1, abs=0.01)
    assert linregress(x, y).slope < -0.5
    assert line.between > 1


@pytest.mark.parametrize("between", [0.0, 0.05, 1.0])
def test_the_interval_of_a_slope_holds_it(between: float):
    random, held = np.random.default_rng(7), 0
    x, groups = np.tile([0.0, 1.5, 3.0], 3) + np.repeat([0.0, 0.5, 1.0], 3), [*"aaabbbccc"]
    for _ in range(300):
        y = 0.02 * x + np.repeat(random.normal(scale=between, size=3), 3) + random.normal(scale=0.03, size=9)
        rise = mixed_line(x, y, groups).rise()
        held += rise.low <= 0.02 <= rise.high
    assert 0.92 <= held / 300 <= 0.99


@pytest.mark.parametrize("families", [2, 3])
def test_the_interval_of_the_line_knows_how_few_families_there_are(families: int):
    """The level is a mean over families: two of them leave one degree of freedom, however many sizes each has."""
    random, held = np.random.default_rng(5), 0
    x, groups = np.tile([0.0, 1.5, 3.0, 4.5], families), np.repeat([*"abc"[:families]], 4)
    for _ in range(200):
        y = np.repeat(random.normal(size=families), 4) + random.normal(scale=0.03, size=len(x))
        level = mixed_line(x, y, [*groups]).at(2.25)
        held += level.low <= 0 <= level.high
    assert 0.91 <= held / 200 <= 0.99


def test_a_reward_type_that_the_first_size_lacks_is_fitted_over_the_others(store: Store):
    whole = sweep(store, seeds=(0, 1))
    results = [item for item in whole.results if item.record.reward != "im_rm_train-pairs=64"]
    kinds = {item.what for item in scaled(Analysis(results))}
    assert {"EX-RM", "IM-RM", "EX-RM − IM-RM"} <= kinds


def test_nothing_is_fitted_through_what_does_not_vary_or_leaves_no_point():
    assert mixed_line(np.arange(3.0), np.ones(3), ["a"] * 3) is None
    assert mixed_line(np.array([0.0, 1.0]), np.array([0.5, 0.7]), ["a", "a"]) is None
    # Nobody can tell a slope from two families of one size each.
    y = np.random.default_rng(0).normal(size=6)
    assert mixed_line(np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), y, [*"aaabbb"]) is None


def sweep(store: Store, **changes):
    """Two models at three sizes of the training set."""
    kinds = [f"{kind}_train-pairs={size}" for size in (64, 256, 1024) for kind in ("ex_rm", "im_rm")]
    strengths = {
        (kind, category): 0.2 + 0.2 * number * kind.startswith("ex")
        for number, kind in enumerate(kinds)
        for _, category in SETS
    }
    found = simulated_sweep(store, rewards=kinds, sets=SETS, strengths=strengths, **changes)
    trials = [
        replace(
            trial,
            axes={"train-pairs": int(trial.reward.rpartition("=")[2])},
            parameters={**trial.parameters, "model_source": f"builtin:{trial.model}"},
        )
        for trial in found.trials
    ]
    return Analysis(sweep_results(replace(found, trials=tuple(trials)), store))


def test_accuracies_and_differences_are_fitted_over_training_set_sizes_and_drawn(store: Store):
    analysis = sweep(store, seeds=(0, 1))
    rows = {(row["category"], row["number"]): row for row in scaling_table(analysis).rows}
    assert {number for _, number in rows} == {"EX-RM", "IM-RM", "EX-RM − IM-RM"}
    row = rows["domain shift", "EX-RM − IM-RM"]
    assert (row["sizes"], row["groups"], row["factor"]) == (3, 2, 16)
    assert row["rise"].value > 0.02
    assert row["largest"].value - row["smallest"].value == pytest.approx(4 * row["rise"].value)
    figure = rendered("scaling", "", "", lambda: draw_scaling(analysis))
    assert b"train-pairs" in figure.svg


@pytest.mark.parametrize(
    ("models", "said"),
    [
        # The built-in models of a family differ by a factor of 1.7.
        (
            ("llama-48", "llama-64"),
            "too short to say anything: 2 sizes over a factor of 1.7; it takes 3 and 4",
        ),
        (("llama-3.2-1b", "llama-3.1-8b", "gemma-2-2b"), "too few points to tell by"),
    ],
)
def test_too_few_sizes_say_so_and_a_range_that_is_too_short_is_not_drawn(store: Store, models, said: str):
    found = simulated_sweep(store, models=models, seeds=(0,), sets=SETS)
    sources = {model: {"model_source": catalog.MODELS[model].source} for model in models}
    trials = tuple(replace(trial, parameters=sources[trial.model]) for trial in found.trials)
    analysis = Analysis(sweep_results(replace(found, trials=trials), store))
    assert {row["said"] for row in scaling_table(analysis).rows} == {said}
    assert (draw_scaling(analysis) is None) == said.startswith("too short")


def test_one_size_of_each_family_is_no_scaling(store: Store):
    assert not [*scaled(Analysis(sweep_results(simulated_sweep(store, sets=SETS, seeds=(0,)), store)))]
