"""Statistics with known answers: analytic cases, coverage of intervals, p-values under the null."""

import numpy as np
import pytest

from orchestrator.report import statistics
from orchestrator.report.statistics import (
    accuracy_estimate,
    calibration,
    estimate,
    gap_estimate,
    generator,
    half_width,
    over_seeds,
    pair_counts,
    permutation_p,
    resampled_metrics,
    seed_weights,
    unanimous_bound,
    win_rate,
)
from trainers.evaluate import metrics

RANDOM = np.random.default_rng(7)


def test_two_hundred_pairs_leave_six_points():
    assert half_width(200) == pytest.approx(0.060, abs=5e-4)


def test_a_draw_of_every_pair_once_gives_the_plain_metrics():
    chosen, rejected = RANDOM.normal(0.4, 2.0, size=(2, 50)) + 1e4
    chosen[:5] = rejected[:5]
    drawn = resampled_metrics(chosen, rejected, np.ones((1, 50)))
    plain = metrics.summary(chosen, rejected)
    for name in statistics.RESAMPLED:
        assert drawn[name][0] == pytest.approx(plain[name], rel=1e-9)


def test_a_pair_drawn_twice_counts_twice():
    chosen, rejected = np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 0.0])
    drawn = resampled_metrics(chosen, rejected, np.array([[2.0, 1.0, 0.0]]))
    assert drawn["accuracy"][0] == pytest.approx(2 / 3)
    losses = np.logaddexp(0, rejected - chosen)
    assert drawn["loss"][0] == pytest.approx((2 * losses[0] + losses[1]) / 3)


def test_equal_rewards_have_no_margin():
    drawn = resampled_metrics(np.full(4, 0.1), np.full(4, 0.1), np.ones((3, 4)))
    assert drawn["abs_margin"].tolist() == [0.0] * 3
    assert drawn["accuracy"].tolist() == [0.5] * 3


def test_the_interval_of_an_accuracy_is_the_binomial_one():
    chosen = np.where(np.arange(400) < 300, 1.0, -1.0)
    counts = pair_counts(400, 4000, generator("binomial"))
    found = estimate(0.75, resampled_metrics(chosen, np.zeros(400), counts)["accuracy"])
    assert found.high - found.low == pytest.approx(2 * half_width(400), rel=0.06)
    assert (found.low + found.high) / 2 == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_resampled_seeds_vary_as_their_mean_does(seeds: int):
    values = RANDOM.normal(size=seeds)
    weights = seed_weights(seeds, 40_000, generator("seeds", str(seeds)))
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(weights)))
    assert np.var(weights @ values) == pytest.approx(np.var(values, ddof=1) / seeds, rel=0.05)


def test_one_seed_has_nothing_to_resample():
    assert seed_weights(1, 3, generator("one")).tolist() == [[1.0]] * 3


def test_a_mean_over_seeds_varies_with_the_seeds_where_all_pairs_agree():
    values = np.repeat([[0.2], [0.4], [0.9]], 30, axis=1)
    value, draws, by_seed = over_seeds(values, generator("pairs"), generator("seeds"))
    assert (value, by_seed) == (0.5, pytest.approx([0.2, 0.4, 0.9]))
    assert np.var(draws) == pytest.approx(np.var([0.2, 0.4, 0.9], ddof=1) / 3, rel=0.1)


@pytest.mark.parametrize(("seeds", "at_least"), [(3, 0.86), (8, 0.92)])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int, at_least: float):
    """A hard pair is hard for every seed, and a lucky seed lucky on every pair: both vary from sweep to sweep."""
    random, covered, trials, pairs = np.random.default_rng(1), 0, 300, 80
    for trial in range(trials):
        values = (
            0.6
            + 0.3 * random.normal(size=(1, pairs))
            + 0.05 * random.normal(size=(seeds, 1))
            + 0.3 * random.normal(size=(seeds, pairs))
        )
        counts = pair_counts(pairs, 400, generator("cover", str(trial)))
        weights = seed_weights(seeds, 400, generator("cover seeds", str(trial)))
        draws = (weights * (counts @ values.T / pairs)).sum(axis=1)
        found = estimate(values.mean(), draws)
        covered += found.low <= 0.6 <= found.high
    assert at_least <= covered / trials <= 0.985


def test_where_every_pair_agrees_the_interval_still_has_a_width():
    found = accuracy_estimate(1.0, np.ones(100), pairs=200)
    assert (found.low, found.high) == (pytest.approx(0.9817, abs=1e-4), 1.0)
    assert accuracy_estimate(0.0, np.zeros(100), pairs=200).high == pytest.approx(0.0183, abs=1e-4)
    nothing = gap_estimate(0.0, np.zeros(100), pairs=200)
    assert nothing.high == -nothing.low == pytest.approx(unanimous_bound(200))
    assert not nothing.excludes_zero


def test_an_interval_that_touches_zero_does_not_exclude_it():
    assert estimate(0.1, np.linspace(0.05, 0.15, 100)).excludes_zero
    assert estimate(-0.1, np.linspace(-0.15, -0.05, 100)).excludes_zero
    assert not estimate(0.1, np.linspace(-0.01, 0.21, 100)).excludes_zero


def test_draws_that_hold_no_pair_are_left_out():
    found = estimate(0.5, np.array([np.nan, 0.4, 0.6]))
    assert 0.4 <= found.low <= found.high <= 0.6


@pytest.mark.parametrize(("units", "p"), [(1, 1.0), (3, 0.25), (6, 2 / 64)])
def test_few_units_give_the_exact_p(units: int, p: float):
    assert permutation_p(np.full(units, 0.1)) == pytest.approx(p)


def test_pairs_on_which_both_agree_change_no_p():
    differences = np.array([1.0, 1.0, -1.0, 1.0, 0.5])
    assert permutation_p(np.concatenate([differences, np.zeros(50)])) == permutation_p(differences)
    assert permutation_p(np.zeros(10)) == 1.0


def test_p_is_uniform_where_nothing_differs():
    random = np.random.default_rng(3)
    found = np.array([permutation_p(random.normal(size=30), resamples=199) for _ in range(300)])
    for level in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(found <= level) == pytest.approx(level, abs=0.08)


def test_p_is_small_where_something_does():
    assert permutation_p(np.random.default_rng(0).normal(1.0, 1.0, size=60)) < 0.002


def test_within_one_point_is_a_tie():
    found = win_rate([0.02, 0.01, 0.76 - 0.75, -0.01, 0.0, -0.011])
    assert (found.ahead, found.ties, found.behind, found.cells) == (1, 4, 1, 6)
    assert found.share == pytest.approx(1 / 6)
    assert win_rate([]).share == 0.0


def test_a_calibrated_reward_has_no_calibration_error():
    random = np.random.default_rng(5)
    size = np.abs(random.normal(0, 2, size=40_000))
    right = random.random(40_000) < 1 / (1 + np.exp(-size))
    found = calibration(np.where(right, size, -size))
    assert found.expected_error < 0.012
    assert found.confidence == pytest.approx(found.accuracy, abs=0.03)
    assert list(found.confidence) == sorted(found.confidence)
    assert found.pairs == 40_000


def test_a_reward_that_is_too_sure_is_off_by_what_it_is_too_sure():
    sure = np.log(9.0)
    found = calibration(np.tile([sure, -sure], 500))
    assert found.expected_error == pytest.approx(0.4, abs=0.02)
    assert found.brier == pytest.approx((0.1**2 + 0.9**2) / 2)


def test_brier_of_a_coin_and_of_an_oracle():
    assert calibration(np.zeros(20)).brier == pytest.approx(0.25)
    assert calibration(np.full(20, 800.0)).brier == 0.0
    assert calibration(np.full(20, -800.0)).brier == 1.0


def test_fewer_pairs_than_bins_are_a_bin_each():
    assert len(calibration(np.array([0.5, -0.5, 1.0])).accuracy) == 3


def test_random_numbers_depend_on_their_name_alone():
    assert generator("a", "b").random() == generator("a", "b").random()
    assert generator("a", "b").random() != generator("a", "c").random()
