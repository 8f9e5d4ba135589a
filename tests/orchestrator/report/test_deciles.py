"""Tenths of pairs, and the overlap that they are of, on values whose answer is known."""

import numpy as np
import pytest

from orchestrator.report.statistics import by_decile
from trainers.data.texts import bag, nearest_overlap


def test_tenths_of_distinct_values_are_as_many_pairs_each_in_order():
    values = np.random.default_rng(0).permutation(50).astype(float)
    rows = by_decile(values, np.ones(50))
    assert [(row["decile"], row["from"], row["to"]) for row in rows] == [
        (tenth + 1, 5.0 * tenth, 5.0 * tenth + 4) for tenth in range(10)
    ]


def test_pairs_of_one_value_stay_together():
    values = np.array([0.0] * 15 + [1.0] * 5)
    assert [(row["decile"], row["pairs"]) for row in by_decile(values, values)] == [(1, 15), (8, 5)]
    assert [row["decile"] for row in by_decile(np.ones(7), np.ones(7))] == [1]


def test_accuracy_rises_by_tenths_where_overlap_decides():
    values = np.arange(100) / 100
    rows = by_decile(values, (values >= 0.5).astype(float))
    assert [row["accuracy"].value for row in rows] == [0.0] * 5 + [1.0] * 5
    assert [row["pairs"] for row in rows] == [10] * 10
    assert (rows[3]["from"], rows[3]["to"]) == (0.3, 0.39)
    assert rows[0]["accuracy"].high == pytest.approx(1 - 0.025 ** (1 / 10))


def test_overlap_is_dices_with_the_nearest_training_pair_side_by_side():
    trained = [bag("ab", "cd"), bag("ab", "xy"), bag("", "")]
    found = nearest_overlap([bag("ab", "cd"), bag("cd", "ab"), bag("abq", "x"), bag("z", "z")], trained)
    # Swapped sides share nothing; a, b and x of 4 + 4 tokens are shared with the second pair.
    assert found.tolist() == [1.0, 0.0, 0.75, 0.0]


def test_a_repeated_token_counts_once():
    assert nearest_overlap([bag("aaaa", "b")], [bag("a", "bbb")]).tolist() == [1.0]
