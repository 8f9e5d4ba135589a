"""Baseline − other pair by pair, on drawn scores whose answer is known: length alone, leaks, quality; and what is advised."""

import dataclasses
from dataclasses import fields

import numpy as np
import pytest

from orchestrator.report.comparison import (
    CONTROLS,
    LEAK_FREE,
    LENGTH_CONTROLLED,
    Analysis,
    regression,
    set_outcomes,
)
from orchestrator.report.conclusions import conclusions, preference
from orchestrator.report.results import EvaluationResult, TrialResult, sweep_results
from orchestrator.report.studies import by_features
from orchestrator.report.summary import differences
from orchestrator.store.artifacts import Store
from orchestrator.store.records import EvaluationRecord
from tests.orchestrator.simulated import simulated_sweep
from tests.orchestrator.sweep_samples import record
from trainers.data.texts import bag, nearest_overlap
from trainers.evaluate import metrics
from trainers.evaluate.scores import PairScores

PAIRS = 400
KINDS = ("ex_rm", "im_rm")


def analysis_of(explicit, implicit, longer, leaked=None):
    """The analysis of one set whose pairs each type ranks right (1), wrong (0) or alike (½)."""
    results = []
    for kind, right in (("ex_rm", explicit), ("im_rm", implicit)):
        scores = PairScores(
            index=np.arange(len(longer)),
            chosen=np.asarray(right, float),
            rejected=np.full(len(longer), 0.5),
            longer=np.asarray(longer),
        )
        trial = record(reward=kind, sets=(("set", "domain shift"),))
        wanted = {item.name: getattr(trial.evaluations[0], item.name) for item in fields(EvaluationRecord)}
        evaluation = EvaluationResult(
            **wanted,
            metrics={
                **metrics.summary(scores.chosen, scores.rejected),
                **metrics.controlled(scores.chosen, scores.rejected, scores.longer, leaked),
            },
            finished=0.0,
            scores=scores,
            leaked=leaked,
        )
        results.append(
            TrialResult(
                record=trial,
                trained=True,
                train_accuracy=1.0,
                train_pairs=100,
                perf={},
                evaluations=(evaluation,),
                started=0.0,
                trained_at=0.0,
            )
        )
    return Analysis(results)


def controls_of(analysis):
    """The difference of the only model: plain, at matched lengths, and without leaks."""
    row, _ = differences(analysis, CONTROLS).rows
    return {"plain": row["accuracy"], "length": row[LENGTH_CONTROLLED], "leak_free": row[LEAK_FREE]}


@pytest.fixture
def longer():
    """Chosen is shorter in four of five pairs."""
    random = np.random.default_rng(0)
    return np.where(random.random(PAIRS) < 0.8, -1, 1) * random.integers(1, 60, PAIRS)


def test_a_lead_that_is_length_alone_vanishes_at_matched_lengths_and_is_not_advised(longer):
    # The implicit type prefers what is shorter; the explicit one calls every pair a tie.
    analysis = analysis_of(np.full(PAIRS, 0.5), longer < 0, longer)
    found = controls_of(analysis)
    assert found["plain"].value == pytest.approx(0.5 - (longer < 0).mean())
    assert found["plain"].high < -0.2
    assert found["length"].value == pytest.approx(0.0, abs=1e-12)
    assert not found["length"].excludes_zero
    said = preference(analysis)
    assert "prefer IM-RM" in said
    assert "at matched lengths no lead can be told" in said


def test_a_lead_of_quality_survives_matched_lengths(longer):
    random = np.random.default_rng(2)
    analysis = analysis_of(random.random(PAIRS) < 0.9, random.random(PAIRS) < 0.6, longer)
    assert controls_of(analysis)["length"].low > 0.1
    assert "prefer EX-RM" in preference(analysis)
    assert "at matched lengths EX-RM leads (+0." in preference(analysis)


def test_what_length_and_preference_cannot_tell_apart_is_said_and_not_guessed():
    analysis = analysis_of(np.ones(PAIRS), np.zeros(PAIRS), np.full(PAIRS, 3))
    found = controls_of(analysis)
    assert (found["length"], found["leak_free"]) == (None, None)
    assert "at matched lengths it cannot be told" in preference(analysis)


def test_a_lead_on_leaked_pairs_only_is_gone_without_them(longer):
    leaked = np.arange(PAIRS) < PAIRS // 2
    coin = np.random.default_rng(4).random(PAIRS) < 0.5
    found = controls_of(analysis_of(np.where(leaked, 1, coin), coin, longer, leaked))
    assert found["plain"].low > 0.15
    assert found["leak_free"].value == 0.0
    assert not found["leak_free"].excludes_zero


def test_the_report_has_one_interval_of_a_difference(tmp_path):
    """The sentences at its top and at its end, and the table, say the same."""
    store = Store(tmp_path / "store")
    analysis = Analysis(sweep_results(simulated_sweep(store, pairs=50), store))
    for scope in analysis.categories():
        found = analysis.difference(scope, "accuracy").estimate
        said = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        assert said in preference(analysis)
        (row,) = [
            row
            for row in differences(analysis).rows
            if (row["category"], row["model"]) == (scope.category, "mean of 2")
        ]
        assert row["accuracy"] == found
        assert said in conclusions(analysis)[0]


def test_a_control_that_a_training_lacks_is_not_estimated(store: Store):
    results = list(sweep_results(simulated_sweep(store, pairs=20, seeds=(0,)), store))

    def told(result):
        evaluations = tuple(
            dataclasses.replace(item, metrics={**item.metrics, LEAK_FREE: 0.5}) for item in result.evaluations
        )
        return dataclasses.replace(result, evaluations=evaluations)

    known = Analysis([told(result) for result in results])
    part = Analysis([*map(told, results[:-1]), results[-1]])
    scope = next(known.categories())
    assert known.control(scope, LEAK_FREE).value == 0.0
    assert part.control(scope, LEAK_FREE) is None


def test_regression_finds_the_feature_that_matters_and_leaves_out_what_says_nothing():
    random = np.random.default_rng(5)
    length, other = random.normal(size=(2, PAIRS))
    values = 0.3 + 0.2 * length + random.normal(scale=0.5, size=PAIRS)
    features = {"length": 7 * length, "other": other, "constant": np.ones(PAIRS), "again": 2 * length + other}
    units = np.arange(PAIRS)
    found = regression(values, features, units)
    assert found is not None
    assert list(found.coefficients) == ["intercept", "length", "other"]
    assert found.coefficients["length"].low < 0.2 * length.std() < found.coefficients["length"].high
    assert found.coefficients["length"].excludes_zero
    assert not found.coefficients["other"].excludes_zero
    exact = np.polyfit(length, values, 1)
    alone = regression(values, {"length": length}, units)
    assert alone is not None
    assert alone.coefficients["length"].value == pytest.approx(exact[0] * length.std(), abs=1e-12)
    assert alone.explained == pytest.approx(np.corrcoef(length, values)[0, 1] ** 2, abs=1e-12)
    # Every pair four times over is no more evidence than once.
    often = regression(np.tile(values, 4), {"length": np.tile(length, 4)}, np.tile(units, 4))
    assert often.coefficients["length"].low == pytest.approx(alone.coefficients["length"].low)
    homoscedastic = np.std(values - np.polyval(exact, length)) / np.sqrt(PAIRS)
    assert alone.coefficients["length"].high - alone.coefficients["length"].value == pytest.approx(
        1.966 * homoscedastic, rel=0.15
    )


def test_a_pair_and_its_rewriting_are_one_unit_of_a_regression_in_every_category():
    """A rewriting that is ranked as its original leaves the interval as it is, unless it is taken for another pair."""
    labels = {"baseline": "a", "other": "b", "train_set": "t", "category": "domain shift"}
    random = np.random.default_rng(6)
    pairs = [
        {"index": at, "gap": gap, "margin_gap": gap, "length_difference": gap + noise}
        | dict.fromkeys(("overlap_with_training", "similarity", "leaked"))
        for at, (gap, noise) in enumerate(random.normal(size=(60, 2)))
    ]

    def width(*sets: tuple[str, str]) -> float:
        rows = [
            {**labels, **pair, "evaluation_set": name, "pairs_of": of} for name, of in sets for pair in pairs
        ]
        found = by_features(rows)[0]["fitted"].coefficients["length_difference"]
        return found.high - found.low

    alone = width(("one", "one"))
    assert width(("one", "one"), ("rewritten", "one")) == pytest.approx(alone)
    assert width(("one", "one"), ("other", "other")) == pytest.approx(alone / np.sqrt(2), rel=0.02)


def test_seeds_and_models_add_no_pairs_and_only_what_learned_with_both_types_counts(tmp_path):
    store = Store(tmp_path / "store")
    # The last trial, of seed 2, is an im_rm that has not learned: that cell has no partner.
    declared = simulated_sweep(store, pairs=50, unlearned=1)
    analysis = Analysis(sweep_results(declared, store))
    found = {item.dataset: item.right for item in set_outcomes(analysis, KINDS)}["rewardmath"]
    partnered = set_outcomes(Analysis(analysis.results[:-2]), KINDS)[-1].right
    for kind in KINDS:
        assert len(found[kind]) == 50
        assert (found[kind] == partnered[kind]).all()
    advice = preference(Analysis(sweep_results(declared, store)))
    assert "Trained on ultrafeedback, in-distribution: prefer EX-RM" in advice
    assert "under domain shift: prefer IM-RM" in advice


def test_the_sets_of_a_category_are_averaged_over_the_same_cells(store: Store):
    whole = list(sweep_results(simulated_sweep(store, pairs=20, seeds=(0,)), store))
    part = [item for item in whole[0].evaluations if item.dataset != "rewardmath"]
    part = [dataclasses.replace(whole[0], evaluations=tuple(part)), *whole[1:]]
    found, of_all, of_one = (
        {item.dataset: item.right["im_rm"].tolist() for item in set_outcomes(Analysis(results), KINDS)}
        for results in (part, whole, whole[2:])
    )
    assert found["rewardbench_math"] == of_one["rewardbench_math"]
    assert found["ultrafeedback"] == of_all["ultrafeedback"] != of_one["ultrafeedback"]


def test_leaks_are_known_where_every_training_knows_them(store: Store):
    results = list(sweep_results(simulated_sweep(store, pairs=20, seeds=(0,)), store))

    def told(result, leaked):
        evaluations = tuple(dataclasses.replace(item, leaked=leaked) for item in result.evaluations)
        return dataclasses.replace(result, evaluations=evaluations)

    known = [told(result, np.arange(20) < 5) for result in results]
    assert [item.leaked.sum() for item in set_outcomes(Analysis(known), KINDS)] == [5] * 7
    assert {
        item.leaked for item in set_outcomes(Analysis([*known[:-1], told(results[-1], None)]), KINDS)
    } == {None}


def test_overlap_is_dices_with_the_nearest_training_pair_side_by_side():
    trained = [bag("ab", "cd"), bag("ab", "xy"), bag("", ""), bag("m", "nnn")]
    asked = [bag("ab", "cd"), bag("cd", "ab"), bag("abq", "x"), bag("z", "z"), bag("mmmm", "n")]
    # Swapped sides share nothing; a, b and x of 4 + 4 tokens are shared with the second pair; a repeated token counts once.
    assert nearest_overlap(asked, trained).tolist() == [1.0, 0.0, 0.75, 0.0, 1.0]
