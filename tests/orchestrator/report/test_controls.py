"""Baseline − other pair by pair, on drawn scores whose answer is known: length alone, leaks, quality."""

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
from orchestrator.report.conclusions import conclusions
from orchestrator.report.results import EvaluationResult, TrialResult, sweep_results
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


def test_a_lead_that_is_length_alone_vanishes_at_matched_lengths(longer):
    # The implicit type prefers what is shorter; the explicit one calls every pair a tie.
    analysis = analysis_of(np.full(PAIRS, 0.5), longer < 0, longer)
    found = controls_of(analysis)
    assert found["plain"].value == pytest.approx(0.5 - (longer < 0).mean())
    assert found["plain"].high < -0.2
    assert found["length"].value == pytest.approx(0.0, abs=1e-12)
    assert not found["length"].excludes_zero
    assert "length-controlled, EX-RM − IM-RM is" in conclusions(analysis)[2]


def test_a_lead_of_quality_survives_matched_lengths(longer):
    random = np.random.default_rng(2)
    analysis = analysis_of(random.random(PAIRS) < 0.9, random.random(PAIRS) < 0.6, longer)
    assert controls_of(analysis)["length"].low > 0.1


def test_what_cannot_be_told_has_no_number_and_unanimous_pairs_leave_some_width():
    found = controls_of(analysis_of(np.zeros(40), np.ones(40), np.full(40, 3)))
    assert (found["length"], found["leak_free"]) == (None, None)
    assert (found["plain"].value, found["plain"].low) == (-1.0, -1.0)
    assert found["plain"].high == pytest.approx(-(0.025 ** (1 / 40)))


def test_a_lead_on_leaked_pairs_only_is_gone_without_them(longer):
    leaked = np.arange(PAIRS) < PAIRS // 2
    coin = np.random.default_rng(4).random(PAIRS) < 0.5
    found = controls_of(analysis_of(np.where(leaked, 1, coin), coin, longer, leaked))
    assert found["plain"].low > 0.15
    assert found["leak_free"].value == 0.0
    assert not found["leak_free"].excludes_zero


def with_changes(result, **changes):
    evaluations = tuple(dataclasses.replace(item, **changes) for item in result.evaluations)
    return dataclasses.replace(result, evaluations=evaluations)


def test_a_control_that_a_training_lacks_is_not_estimated(store: Store):
    results = sweep_results(simulated_sweep(store, pairs=20, seeds=(0,)), store)
    told = [with_changes(item, metrics={**item.final[0].metrics, LEAK_FREE: 0.5}) for item in results]
    known, part = Analysis(told), Analysis([*told[:-1], results[-1]])
    scope = next(known.categories())
    assert known.control(scope, LEAK_FREE).value == 0.0
    assert part.control(scope, LEAK_FREE) is None
    assert "leak-free accuracy was not measured" in conclusions(part)[2]


def test_regression_finds_the_feature_that_matters_and_leaves_out_what_says_nothing():
    random = np.random.default_rng(5)
    length, other = random.normal(size=(2, PAIRS))
    values = 0.3 + 0.2 * length + random.normal(scale=0.5, size=PAIRS)
    features = {"length": 7 * length, "other": other, "constant": np.ones(PAIRS), "again": 2 * length + other}
    units = np.arange(PAIRS)
    found = regression(values, features, units)
    assert found is not None
    assert list(found) == ["intercept", "length", "other", "explained", "pairs"]
    assert found["length"].low < 0.2 * length.std() < found["length"].high
    assert found["length"].excludes_zero
    assert not found["other"].excludes_zero
    exact = np.polyfit(length, values, 1)
    alone = regression(values, {"length": length}, units)
    assert alone is not None
    assert alone["length"].value == pytest.approx(exact[0] * length.std(), abs=1e-12)
    assert alone["explained"] == pytest.approx(np.corrcoef(length, values)[0, 1] ** 2, abs=1e-12)
    # Every pair four times over is no more evidence than once.
    often = regression(np.tile(values, 4), {"length": np.tile(length, 4)}, np.tile(units, 4))
    assert often["length"].low == pytest.approx(alone["length"].low)
    homoscedastic = np.std(values - np.polyval(exact, length)) / np.sqrt(PAIRS)
    assert alone["length"].high - alone["length"].value == pytest.approx(1.966 * homoscedastic, rel=0.15)


def test_a_sets_outcomes_are_of_the_cells_that_count_in_its_whole_category(store: Store):
    whole = sweep_results(simulated_sweep(store, pairs=20, seeds=(0,)), store)
    # The first trial, of llama-64, lacks a set of a category; leaks are known where every training knows them.
    part = tuple(item for item in whole[0].evaluations if item.dataset != "rewardmath")
    known = [
        with_changes(item, leaked=np.arange(20) < 5)
        for item in (dataclasses.replace(whole[0], evaluations=part), *whole[1:])
    ]
    found = {item.dataset: item for item in set_outcomes(Analysis(known), KINDS)}
    alone = Analysis([item for item in known if item.record.model == "qwen2-64"])
    expected = {item.dataset: item for item in set_outcomes(alone, KINDS)}
    for name in ("rewardbench_math", "rewardmath"):
        assert found[name].right["ex_rm"].tolist() == expected[name].right["ex_rm"].tolist()
    both, one = (outcomes["ultrafeedback"].margin["ex_rm"].tolist() for outcomes in (found, expected))
    assert both != one
    assert {item.leaked.sum() for item in found.values()} == {5}
    unknown = set_outcomes(Analysis([*known[:-1], with_changes(known[-1], leaked=None)]), KINDS)
    assert {item.leaked for item in unknown} == {None}


def test_overlap_is_dices_with_the_nearest_training_pair_side_by_side():
    trained = [bag("ab", "cd"), bag("ab", "xy"), bag("", ""), bag("m", "nnn")]
    asked = [bag("ab", "cd"), bag("cd", "ab"), bag("abq", "x"), bag("z", "z"), bag("mmmm", "n")]
    # Swapped sides share nothing; a, b and x of 4 + 4 tokens are shared with the second pair; a repeated token counts once.
    assert nearest_overlap(asked, trained).tolist() == [1.0, 0.0, 0.75, 0.0, 1.0]
