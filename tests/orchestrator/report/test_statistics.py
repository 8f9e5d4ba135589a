"""Statistics with known answers: analytic cases, and intervals and p against scipy's."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from orchestrator.report.statistics import (
    bounded_interval,
    by_decile,
    calibration,
    crossed,
    holm,
    jackknifed,
    margin_without_each,
    over_seeds,
    permutation_p,
    unbounded_interval,
    win_rate,
)
from trainers.evaluate import metrics

RANDOM = np.random.default_rng(7)


def one_training(values):
    return crossed([values[:, None] / len(values)], np.zeros(len(values), dtype=int))


def test_what_pairs_add_is_found_by_leaving_each_out():
    chosen, rejected = RANDOM.normal(0.4, 2.0, size=(2, 50)) + 1e4
    left_out = [
        metrics.absolute_margin(np.delete(chosen, place), np.delete(rejected, place)) for place in range(50)
    ]
    assert margin_without_each(chosen, rejected) == pytest.approx(left_out, rel=1e-7)
    assert margin_without_each(np.full(4, 0.1), np.full(4, 0.1)).tolist() == [0.0] * 4
    # Of a mean, each adds its share.
    without = (chosen.sum() - chosen) / 49
    assert jackknifed(chosen.mean(), without) == pytest.approx(chosen / 50)


def test_the_interval_of_an_accuracy_is_the_binomial_one():
    found = bounded_interval(0.75, one_training(1.0 * (np.arange(400) < 300)), 400, floor=0)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.75 * 0.25 / 400), rel=0.06)
    assert (found.low + found.high) / 2 == pytest.approx(0.75, abs=0.005)


def test_the_variance_is_of_trainings_and_of_pairs_and_what_both_hold_counts_once():
    """Against the formula of a table of two crossed factors, written out."""
    table = 0.3 + RANDOM.normal(size=(40, 1)) + RANDOM.normal(size=(1, 5)) + RANDOM.normal(size=(40, 5))
    found = crossed([table / 40], np.zeros(40, dtype=int))
    trainings, pairs = table.mean(axis=0).var(ddof=1) / 5, table.mean(axis=1).var(ddof=1) / 40
    left = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    both = (left**2).sum() / (4 * 39) / 200
    assert found.variance == pytest.approx(trainings + pairs - both)
    weighed = trainings**2 / 4 + pairs**2 / 39 + both**2 / (4 * 39)
    assert found.degrees == pytest.approx(found.variance**2 / weighed)


def test_trainings_that_happen_to_agree_leave_what_pairs_leave():
    """Without it, a variance near 0 with degrees of freedom below 1 gave an interval of ± 7."""
    noise = RANDOM.normal(size=(100, 3))
    noise -= noise.mean(axis=0)
    table = 0.3 * RANDOM.normal(size=(100, 1)) + 3 * noise
    alone = crossed([table.mean(axis=1, keepdims=True) / 100], np.zeros(100, dtype=int))
    found = crossed([table / 100], np.zeros(100, dtype=int))
    assert found.variance == pytest.approx(alone.variance)
    assert found.degrees > 50


def test_models_that_are_fixed_add_only_how_their_seeds_differ_and_sets_of_other_pairs_are_strata():
    seeds, alike = np.tile([[0.1, 0.2, 0.3]], (20, 1)) / 20, np.zeros(20, dtype=int)
    far = crossed([seeds, seeds + 5 / 20], alike)
    assert far.variance == pytest.approx(0.01 / 3 / 2)
    assert (far.degrees, far.trainings) == (4, 4)
    drawn = np.stack([seeds.mean(axis=1), seeds.mean(axis=1) + 5 / 20], axis=1)
    assert crossed([drawn], alike).variance == pytest.approx(12.5 / 2)
    values = np.repeat([0.0, 1.0], 10)[:, None] / 20
    assert crossed([values], np.repeat([0, 1], 10)).variance == 0
    assert crossed([values], alike).variance > 0


def test_without_bounds_it_is_students_interval():
    values = RANDOM.normal(0.5, 1.0, size=30)
    found, theirs = unbounded_interval(values.mean(), one_training(values)), ttest_1samp(values, 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.p == pytest.approx(theirs.pvalue)


def test_p_is_below_five_percent_where_the_interval_excludes_zero_and_only_there():
    random, both = np.random.default_rng(4), set()
    for _ in range(300):
        values = np.sign(
            random.normal(random.uniform(-0.5, 2), 1.0, size=(60, 1)) + random.normal(size=(1, 4))
        )
        found = bounded_interval(values.mean(), crossed([values / 60], np.zeros(60, dtype=int)), 60, floor=-1)
        assert found.excludes_zero == (found.p < 0.05)
        assert -1 <= found.low <= found.value <= found.high <= 1
        both.add(found.excludes_zero)
    assert both == {True, False}


@pytest.mark.parametrize(("value", "floor"), [(1.0, 0), (0.0, 0), (1.0, -1), (-1.0, -1), (0.0, -1)])
def test_an_interval_of_unanimous_pairs_is_the_exact_one(value: float, floor: int):
    found = bounded_interval(value, one_training(np.full(200, value)), 200, floor=floor)
    bound = 1 - 0.025 ** (1 / 200)
    low = -bound if (value, floor) == (0, -1) else value if value <= 0 else 1 - bound
    high = bound if value == 0 else value if value > 0 else bound - 1
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("value", [1.0, -1.0, 0.5])
def test_a_few_pairs_that_agree_are_no_lead(value: float):
    found = [bounded_interval(value, one_training(np.full(n, value)), n, floor=-1) for n in range(1, 9)]
    assert [item.p for item in found] == [0.5 ** (n - 1) for n in range(1, 9)]
    assert [item.excludes_zero for item in found] == [item.p < 0.05 for item in found]
    # However models agree on them, and however small one of the sets is.
    models = np.full((3, 6), value / 3)
    models[0, 0] = 0.0
    few = bounded_interval(models.sum(axis=0).mean(), crossed([models], np.zeros(3, dtype=int)), 3, floor=-1)
    assert (few.p, few.excludes_zero) == (pytest.approx(0.25), False)
    many = bounded_interval(value, one_training(np.full(200, value)), 3, floor=-1, units=203)
    assert many.excludes_zero
    assert many.p < 1e-9


def test_one_pair_against_all_others_leaves_no_narrower_interval_than_none():
    values = np.ones(200)
    values[0] = 0.0
    found = bounded_interval(values.mean(), one_training(values), 200, floor=-1)
    assert found.low < 0.025 ** (1 / 200)


def test_holm_corrects_the_smallest_most():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_mean_over_seeds_varies_with_the_seeds_where_all_pairs_agree():
    seeds = [0.2, 0.4, 0.6]
    found = over_seeds(np.repeat(np.array(seeds)[:, None], 300, axis=1))
    low, high = ttest_1samp(seeds, 0.0).confidence_interval(0.95)
    assert (found.value, found.std) == (pytest.approx(0.4), pytest.approx(0.2))
    assert (found.low, found.high) == (pytest.approx(max(low, 0), abs=0.02), pytest.approx(high, abs=0.1))


def test_less_others_on_other_units_both_vary():
    first, second = 1.0 * (RANDOM.random((1, 80)) < 0.9), 1.0 * (RANDOM.random((1, 50)) < 0.6)
    found = over_seeds(first, second)
    error = np.hypot(np.std(first, ddof=1) / np.sqrt(80), np.std(second, ddof=1) / np.sqrt(50))
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.high - found.low == pytest.approx(2 * 1.98 * error, rel=0.1)


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


def test_within_one_point_is_a_tie():
    found = win_rate([0.02, 0.01, 0.76 - 0.75, -0.01, 0.0, -0.011])
    assert (found.ahead, found.ties, found.behind, found.cells) == (1, 4, 1, 6)
    assert found.share == pytest.approx(1 / 6)


def test_a_calibrated_reward_has_no_calibration_error_and_one_that_is_too_sure_has():
    random = np.random.default_rng(5)
    size = np.abs(random.normal(0, 2, size=40_000))
    right = random.random(40_000) < 1 / (1 + np.exp(-size))
    found = calibration(np.where(right, size, -size))
    assert found.expected_error < 0.012
    assert found.confidence == pytest.approx(found.accuracy, abs=0.03)
    assert list(found.confidence) == sorted(found.confidence)
    assert found.pairs == 40_000
    sure = calibration(np.tile([np.log(9.0), -np.log(9.0)], 500))
    assert sure.expected_error == pytest.approx(0.4, abs=0.02)
    assert sure.brier == pytest.approx((0.1**2 + 0.9**2) / 2)
    # A coin, an oracle and its opposite; and fewer pairs than bins.
    briers = [calibration(np.full(20, margin)).brier for margin in (0.0, 800.0, -800.0)]
    assert briers == pytest.approx([0.25, 0.0, 1.0])
    assert len(calibration(np.array([0.5, -0.5, 1.0])).accuracy) == 3


def test_tenths_are_as_many_pairs_each_in_order_and_equal_values_stay_together():
    values = np.random.default_rng(0).permutation(100) / 100
    rows = by_decile(values, (values >= 0.5).astype(float))
    assert [row["accuracy"].value for row in rows] == [0.0] * 5 + [1.0] * 5
    assert [(row["decile"], row["pairs"]) for row in rows] == [(tenth, 10) for tenth in range(1, 11)]
    assert (rows[3]["from"], rows[3]["to"]) == (0.3, 0.39)
    assert rows[0]["accuracy"].high == pytest.approx(1 - 0.025 ** (1 / 10))
    values = np.array([0.0] * 15 + [1.0] * 5)
    assert [(row["decile"], row["pairs"]) for row in by_decile(values, values)] == [(1, 15), (8, 5)]
    assert [row["decile"] for row in by_decile(np.ones(7), np.ones(7))] == [1]
