"""From scores to means and differences: what is paired with what, what is left out, and what is concluded."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.simulated import REVERSED, STRENGTHS, ULTRAFEEDBACK, simulated_sweep
from orchestrator.report.comparison import (
    Analysis,
    Scope,
    cells,
    pair_groups,
    spanish_beside_french,
)
from orchestrator.report.conclusions import conclusions
from orchestrator.report.results import TrialResult, sweep_results
from orchestrator.report.summary import by_category, by_set, statistics_tables
from orchestrator.report.tables import Table
from orchestrator.store.artifacts import Store

EVEN = dict.fromkeys(STRENGTHS, 0.5)


def analysis_of(results: list[TrialResult]) -> Analysis:
    return Analysis(results, draws=400)


@pytest.fixture
def simulated(store: Store) -> Callable[..., Analysis]:
    """The analysis of a simulated sweep."""
    return lambda **described: analysis_of(list(sweep_results(simulated_sweep(store, **described), store)))


def scope(analysis: Analysis, category: str) -> Scope:
    return next(item for item in analysis.categories() if item.category == category)


def test_a_mean_is_over_sets_then_seeds_with_the_standard_deviation_of_the_seeds(simulated):
    analysis = simulated(models=("llama-64",), pairs=60)
    here = scope(analysis, "domain shift")
    by_seed = [
        np.mean([item.metrics["accuracy"] for item in trial.evaluations if item.category == "domain shift"])
        for (trial,) in cells(analysis.results, here, "llama-64", ["ex_rm"]).values()
    ]
    found = analysis.mean(here, "llama-64", "ex_rm", "accuracy")
    assert found.estimate.value == pytest.approx(np.mean(by_seed))
    assert found.estimate.std == pytest.approx(np.std(by_seed, ddof=1))
    assert found.estimate.low < found.estimate.value < found.estimate.high
    assert (found.seeds, found.pairs) == (3, 60)


def test_differences_are_paired_so_that_hard_pairs_cancel(simulated):
    analysis = simulated(models=("llama-64",), seeds=(0,), pairs=400, strengths=EVEN)
    here = scope(analysis, "in-distribution")
    explicit, implicit = (analysis.mean(here, "llama-64", kind, "loss") for kind in ("ex_rm", "im_rm"))
    found = analysis.difference(here, "loss")
    assert found.draws == pytest.approx(explicit.draws - implicit.draws)
    paired = np.std(found.draws)
    apart = np.hypot(np.std(explicit.draws), np.std(implicit.draws))
    # Of the variance of a pair, 0.36 of 1.0 is the pair's own.
    assert paired == pytest.approx(apart * np.sqrt(0.64), rel=0.12)


def test_rewritings_of_a_pair_are_drawn_with_it(store: Store):
    """The same scores three times over are no more evidence than once."""
    sets = (("ultrafeedback", "in-distribution"), *((name, "token-level shift") for name in ("a", "b", "c")))
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), sets=sets, strengths=EVEN)
    results = list(sweep_results(declared, store))
    copied = []
    for result in results:
        first = next(item for item in result.evaluations if item.dataset == "a")
        evaluations = tuple(
            dataclasses.replace(item, scores=first.scores, metrics=first.metrics)
            if item.category == "token-level shift"
            else item
            for item in result.evaluations
        )
        copied.append(dataclasses.replace(result, evaluations=evaluations))
    analysis = analysis_of(copied)
    whole = scope(analysis, "token-level shift")
    alone = next(item for item in analysis.single_sets() if item.dataset == "a")
    for item in (whole, alone):
        assert len(item.sets) == (3 if item is whole else 1)
    three, one = (analysis.mean(item, "llama-64", "ex_rm", "accuracy").estimate for item in (whole, alone))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))
    three_p, one_p = (analysis.difference(item, "accuracy").p_pairs for item in (whole, alone))
    assert one_p > 0.02
    assert three_p == pytest.approx(one_p, abs=2e-3)


def test_a_set_belongs_to_what_it_rewrites_even_where_it_is_another_domain(store: Store):
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), pairs=4)
    assert pair_groups(sweep_results(declared, store)) == {
        **{name: "ultrafeedback" for name, category in ULTRAFEEDBACK if category != "domain shift"},
        **{name: name for name, category in ULTRAFEEDBACK if category == "domain shift"},
    }


def test_what_is_drawn_for_one_trial_changes_with_no_other(store: Store):
    results = list(sweep_results(simulated_sweep(store, seeds=(0, 1), pairs=30), store))
    whole, part = (
        analysis_of(results),
        analysis_of([item for item in results if item.record.model == "llama-64"]),
    )
    for analysis in (whole, part):
        assert len(analysis.resampled.weights("llama-64", "ultrafeedback", (0, 1))) == 400
    here = scope(part, "domain shift")
    means = [item.mean(here, "llama-64", "ex_rm", "accuracy").draws for item in (whole, part)]
    assert np.array_equal(*means)
    assert np.std(means[0]) > 0


def test_seeds_that_only_one_type_has_enter_no_difference(store: Store):
    declared = simulated_sweep(store, models=("llama-64",), pairs=40, missing=1)
    analysis = analysis_of(list(sweep_results(declared, store)))
    here = scope(analysis, "domain shift")
    trials = {kind: cells(analysis.results, here, "llama-64", [kind]) for kind in ("ex_rm", "im_rm")}
    assert set(trials["ex_rm"]) == {0, 1, 2}
    assert analysis.mean(here, "llama-64", "im_rm", "accuracy").seeds == 2
    found = analysis.difference(here, "accuracy")
    assert found.runs == 2
    assert "rests on 1 model, 2 seeds and" in conclusions(analysis)[1]
    explicit, implicit = (
        np.mean(
            [
                item.metrics["accuracy"]
                for seed in (0, 1)
                for item in trials[kind][seed][0].evaluations
                if item.category == "domain shift"
            ]
        )
        for kind in ("ex_rm", "im_rm")
    )
    assert found.estimate.value == pytest.approx(explicit - implicit)


def test_what_did_not_learn_enters_nothing(simulated):
    analysis = simulated(models=("llama-64",), seeds=(0, 1), pairs=40, unlearned=2)
    here = scope(analysis, "domain shift")
    assert analysis.mean(here, "llama-64", "ex_rm", "accuracy").seeds == 1
    assert analysis.win_rate(here).cells == 3
    assert "2 trials (EX-RM, IM-RM) did not learn and enter no mean" in conclusions(analysis)[2]


def test_the_mean_over_models_leaves_out_a_model_that_lacks_a_type(simulated):
    analysis = simulated(seeds=(0,), pairs=40, missing=1)
    here = scope(analysis, "in-distribution")
    assert analysis.complete_models(here) == ["llama-64"]
    assert analysis.mean_of_models(here, "ex_rm", "accuracy").models == ("llama-64",)


def test_a_type_that_no_model_has_keeps_the_others_from_no_mean(store: Store):
    declared = simulated_sweep(store, seeds=(0,), pairs=40)
    found = sweep_results(declared, store)
    bare = [
        dataclasses.replace(item, trained=False, train_accuracy=None, evaluations=())
        if item.record.reward == "im_rm"
        else item
        for item in found
    ]
    analysis = analysis_of(bare)
    assert analysis.mean_of_models(scope(analysis, "in-distribution"), "ex_rm", "accuracy").models == (
        "llama-64",
        "qwen2-64",
    )
    assert "EX-RM ranks" in conclusions(analysis)[0]
    # One type of each model alone.
    crossed = [found[0], bare[1], dataclasses.replace(bare[1], record=found[2].record), found[3]]
    assert "no model has every reward type" in conclusions(analysis_of(crossed))[0]


def test_win_rates_count_cells(simulated):
    analysis = simulated(pairs=80)
    found = analysis.win_rate(scope(analysis, "token-level shift"))
    assert (found.cells, found.ahead) == (2 * 3 * 3, 18)
    assert analysis.win_rate(scope(analysis, "domain shift")).behind == 18


@pytest.mark.parametrize("names", [["x_spanish", "y", "x_french"], ["x_french", "y", "x_spanish"]])
def test_spanish_stands_beside_french(names: list[str]):
    assert spanish_beside_french(names) == ["x_french", "x_spanish", "y"]
    assert spanish_beside_french(["french", "b", "spanish"]) == ["french", "spanish", "b"]
    assert spanish_beside_french(["x_spanish", "z_french"]) == ["x_spanish", "z_french"]


def test_the_conclusion_turns_with_the_numbers(simulated):
    said = conclusions(simulated(pairs=80))[0]
    turned = conclusions(simulated(name="turned", pairs=80, strengths=REVERSED))[0]
    assert "EX-RM is ahead of IM-RM in-distribution" in said
    assert "IM-RM is ahead of EX-RM under domain shift" in said
    assert "IM-RM is ahead of EX-RM in-distribution" in turned
    assert "EX-RM is ahead of IM-RM under domain shift" in turned


def test_where_nothing_differs_nothing_is_claimed(simulated):
    said = conclusions(simulated(pairs=80, strengths=EVEN, seeds=(0,)))[0]
    assert "is ahead" not in said
    assert "no difference of EX-RM from IM-RM can be told" in said


def test_little_support_is_said(simulated):
    one = conclusions(simulated(models=("llama-64",), seeds=(0,), pairs=200))[1]
    assert "1 model, 1 seed and 200 test pairs a set" in one
    assert "± 0.06" in one
    assert "one seed says nothing about others" in one
    many = conclusions(simulated(name="many", models=("llama-64",), seeds=range(5), pairs=50))[1]
    assert "5 seeds and 50 test pairs" in many
    assert "± 0.12" in many
    assert "about others" not in many


def test_an_incomplete_sweep_says_so_and_an_empty_one_concludes_nothing(simulated):
    assert "2 of 12 trials are missing" in conclusions(simulated(pairs=30, missing=2))[2]
    nothing = conclusions(simulated(name="empty", missing=12))
    assert "Nothing can be concluded yet" in nothing[0]
    assert "No trial has been trained" in nothing[1]
    assert "12 of 12 trials are missing" in nothing[2]


def test_a_single_reward_type_is_reported_and_not_compared(simulated):
    analysis = simulated(rewards=("im_rm",), pairs=30)
    said = conclusions(analysis)[0]
    assert "the sweep does not hold both EX-RM and IM-RM" in said
    assert "IM-RM ranks" in said
    # Nothing was compared, so nothing is said of what did not move it.
    assert conclusions(analysis)[2] == "Every trial is complete and learned."
    assert [table.name for table in statistics_tables(analysis)][:2] == [
        "accuracy_by_category",
        "loss_by_category",
    ]


def test_languages_that_disagree_are_a_doubt(store: Store):
    results = list(sweep_results(simulated_sweep(store, models=("llama-64",), pairs=60), store))
    worse = []
    for result in results:
        if result.record.reward == "ex_rm":
            evaluations = tuple(
                dataclasses.replace(item, metrics={**item.metrics, "accuracy": 0.0})
                if item.dataset == "ultrafeedback_spanish"
                else item
                for item in result.evaluations
            )
            result = dataclasses.replace(result, evaluations=evaluations)
        worse.append(result)
    assert "in French but -" in conclusions(analysis_of(worse))[2]
    assert "in French" not in conclusions(analysis_of(results))[2]


def with_side_metrics(results: list[TrialResult], explicit: float, implicit: float) -> list[TrialResult]:
    values = {"ex_rm": explicit, "im_rm": implicit}
    return [
        dataclasses.replace(
            result,
            evaluations=tuple(
                dataclasses.replace(
                    item,
                    metrics={
                        **item.metrics,
                        "accuracy_length_controlled": values[result.record.reward],
                        "accuracy_leak_free": item.metrics["accuracy"],
                    },
                )
                for item in result.evaluations
            ),
        )
        for result in results
    ]


def test_length_controlled_and_leak_free_accuracy_stand_beside_the_plain_one(store: Store):
    results = list(sweep_results(simulated_sweep(store, models=("llama-64",), pairs=60), store))
    without, plain = analysis_of(results), conclusions(analysis_of(results))
    assert "length-controlled and leak-free accuracy were not measured" in plain[2]
    assert {row["accuracy_leak_free"] for row in by_set(without).records()} == {None}
    controlled = analysis_of(with_side_metrics(results, 0.5, 0.5))
    assert {row["accuracy_length_controlled"] for row in by_set(controlled).records()} == {0.5}
    said = conclusions(controlled)[2]
    assert "length-controlled, EX−IM is +0.000 in-distribution where it was +0." in said
    assert "leak-free" not in said
    # Of the seed that only EX-RM has, nothing enters the comparison.
    changed = with_side_metrics(results, 0.7, 0.5)
    odd = with_side_metrics(results, 0.1, 0.5)
    alone = [odd[number] if item.record.seed == 2 else item for number, item in enumerate(changed)]
    alone = [item for item in alone if (item.record.seed, item.record.reward) != (2, "im_rm")]
    assert "length-controlled, EX−IM is +0.200 under token-level shift" in conclusions(analysis_of(alone))[2]


def rows(table: Table) -> list[dict[str, object]]:
    return [row for row in table.records() if str(row["model"]).startswith("mean")]


def test_the_papers_numbers_stand_beside_ours_where_the_sets_are_its(simulated):
    found = rows(by_category(simulated(pairs=30, seeds=(0,)), "accuracy"))
    assert [(row["category"], row["ex_rm_paper"], row["im_rm_paper"]) for row in found] == [
        ("in-distribution", 0.752, 0.646),
        ("token-level shift", 0.665, 0.602),
        ("domain shift", 0.621, 0.720),
    ]
    margins = rows(by_category(simulated(name="again", pairs=30, seeds=(0,)), "abs_margin"))
    assert margins[0]["im_rm_paper"] == 0.813


def test_other_sets_and_other_training_sets_have_no_number_of_the_paper(simulated):
    fewer = by_category(simulated(pairs=30, seeds=(0,), sets=ULTRAFEEDBACK[:-1]), "accuracy")
    found = {row["category"]: row["ex_rm_paper"] for row in rows(fewer)}
    assert found == {"in-distribution": 0.752, "token-level shift": 0.665, "domain shift": None}
    other = by_category(simulated(name="other", pairs=30, seeds=(0,), train_sets=("rewardmath",)), "accuracy")
    assert "paper" not in other.columns
    assert "paper" not in " ".join(
        conclusions(simulated(name="third", pairs=30, seeds=(0,), train_sets=("rewardmath",)))
    )
