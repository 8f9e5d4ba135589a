"""Accuracy without what length lends to it: known answers on synthetic scores."""

from statistics import NormalDist

import numpy as np
import pytest

from trainers.evaluate.metrics import accuracy, accuracy_length_controlled, controlled


def synthetic(pairs: int = 20_000, *, skew: float = -30.0, seed: int = 0):
    """Length differences, mostly negative: the chosen response is shorter, as in RewardBench math (paper §6)."""
    rng = np.random.default_rng(seed)
    longer = np.rint(rng.normal(skew, 25.0, pairs)).astype(np.int64)
    return rng, longer, np.zeros(pairs)


def test_a_reward_of_length_alone_gets_one_half_and_one_that_knows_nothing_of_length_its_accuracy():
    rng, longer, zero = synthetic()
    for shape in (np.sign, lambda x: x**3):
        for sign in (1.0, -1.0):
            chosen = sign * shape(longer.astype(float))
            assert abs(accuracy(chosen, zero) - 0.5) > 0.35
            assert accuracy_length_controlled(chosen, zero, longer) == pytest.approx(0.5)
    chosen = rng.normal(0.6, 1.0, len(longer))
    plain = accuracy(chosen, zero)
    assert plain == pytest.approx(0.726, abs=0.01)
    assert accuracy_length_controlled(chosen, zero, longer) == pytest.approx(plain, abs=0.02)


def test_a_reward_of_skill_and_length_gets_what_it_would_where_length_tells_nothing():
    """Expected: the mean of its accuracies at +d and at −d, over the |d| that there are."""
    rng, longer, zero = synthetic()
    skill = rng.normal(0.6, 1.0, len(longer))
    helped, hindered = skill - 0.05 * longer, skill + 0.05 * longer
    assert accuracy(helped, zero) > 0.85
    assert accuracy(hindered, zero) < 0.5
    d = 0.05 * np.abs(longer)
    expected = np.mean([NormalDist().cdf(0.6 + sign * x) for x in d[::10] for sign in (1, -1)])
    assert expected < 0.65
    for chosen in (helped, hindered):
        assert accuracy_length_controlled(chosen, zero, longer) == pytest.approx(expected, abs=0.02)


def test_pairs_of_equal_lengths_are_the_plain_accuracy():
    chosen, rejected = np.array([1.0, 0.0, 2.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    assert accuracy_length_controlled(chosen, rejected, np.zeros(4, np.int64)) == 0.625
    assert accuracy_length_controlled(chosen[:1], rejected[:1], np.array([3])) is None


@pytest.mark.parametrize(("minority", "expected"), [(4, None), (5, 0.5)])
def test_too_few_pairs_on_one_side_give_no_number(minority: int, expected: float | None):
    longer = np.array([1] * minority + [-1] * 100)
    chosen = np.where(longer > 0, -1.0, 1.0)
    assert accuracy_length_controlled(chosen, np.zeros(len(longer)), longer) == expected


def test_both_sides_of_a_stratum_weigh_the_same():
    """All right where chosen is shorter (30 pairs), half right where it is longer (10 pairs)."""
    longer = np.array([-1] * 30 + [1] * 10)
    chosen = np.array([1.0] * 30 + [1.0, -1.0] * 5)
    assert accuracy(chosen, np.zeros(40)) == 0.875
    assert accuracy_length_controlled(chosen, np.zeros(40), longer) == 0.75


def test_large_and_small_differences_are_matched_apart():
    """Small differences are all ranked right, of large ones those whose chosen response is longer."""
    longer = np.array([1] * 10 + [-1] * 40 + [100] * 40 + [-100] * 10)
    chosen = np.where(np.abs(longer) == 1, 1.0, np.sign(longer))
    assert accuracy(chosen, np.zeros(100)) == 0.9
    # One half of 1 and one half of ½; the two sides as a whole would give (50/50 + 40/50) / 2.
    assert accuracy_length_controlled(chosen, np.zeros(100), longer) == 0.75


@pytest.mark.parametrize(
    ("leaked", "expected"),
    [
        (None, {}),
        ([True, True, False, False], {"n_leak_free": 2.0, "accuracy_leak_free": 0.25}),
        ([True] * 4, {"n_leak_free": 0.0}),
    ],
)
def test_what_length_and_leaks_do_not_help(leaked, expected):
    chosen, rejected = np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0])
    known = None if leaked is None else np.array(leaked)
    found = controlled(chosen, rejected, np.array([3, 0, -1, -2]), known)
    assert found == {"longer_wins": 0.375, **expected}
