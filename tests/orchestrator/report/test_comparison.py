"""From scores to means and differences: what is paired with what, what is left out, and what is concluded."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from orchestrator.report.comparison import (
    Analysis,
    Scope,
    pair_groups,
)
from orchestrator.report.conclusions import conclusions
from orchestrator.report.results import EvaluationResult, TrialResult, sweep_results
from orchestrator.report.summary import by_category, by_set, statistics_tables
from orchestrator.report.tables import Table
from orchestrator.store.artifacts import Store
from tests.orchestrator.simulated import REVERSED, STRENGTHS, ULTRAFEEDBACK, simulated_sweep
from trainers.evaluate.metrics import summary

EVEN = dict.fromkeys(STRENGTHS, 0.5)


@pytest.fixture
def simulated(store: Store) -> Callable[..., Analysis]:
    """The analysis of a simulated sweep."""
    return lambda **described: Analysis(list(sweep_results(simulated_sweep(store, **described), store)))


def scope(analysis: Analysis, category: str) -> Scope:
    return next(item for item in analysis.categories() if item.category == category)


def test_a_mean_is_over_sets_then_seeds_with_the_standard_deviation_of_the_seeds(simulated):
    analysis = simulated(models=("llama-64",), pairs=60)
    here = scope(analysis, "domain shift")
    by_seed = [
        np.mean([item.metrics["accuracy"] for item in trial.evaluations if item.category == "domain shift"])
        for (trial,) in analysis.cells(here, "llama-64", ["ex_rm"]).values()
    ]
    found = analysis.mean(here, "ex_rm", "accuracy", ["llama-64"])
    assert found.estimate.value == pytest.approx(np.mean(by_seed))
    assert found.estimate.std == pytest.approx(np.std(by_seed, ddof=1))
    assert found.estimate.low < found.estimate.value < found.estimate.high
    assert (found.seeds, found.pairs) == (3, 60)


def width(mean) -> float:
    return mean.estimate.high - mean.estimate.low


def test_differences_are_paired_so_that_hard_pairs_cancel(simulated):
    analysis = simulated(models=("llama-64",), seeds=(0,), pairs=400, strengths=EVEN)
    here = scope(analysis, "in-distribution")
    apart = [width(analysis.mean(here, kind, "loss", ["llama-64"])) for kind in ("ex_rm", "im_rm")]
    # Of the variance of a pair, 0.36 of 1.0 is the pair's own.
    assert width(analysis.difference(here, "loss")) == pytest.approx(
        np.hypot(*apart) * np.sqrt(0.64), rel=0.12
    )


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
    analysis = Analysis(copied)
    whole = scope(analysis, "token-level shift")
    alone = next(item for item in analysis.single_sets() if item.dataset == "a")
    three, one = (analysis.mean(item, "ex_rm", "accuracy", ["llama-64"]).estimate for item in (whole, alone))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_a_set_belongs_to_what_it_rewrites_even_where_it_is_another_domain(store: Store):
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), pairs=4)
    assert pair_groups(sweep_results(declared, store)) == {
        **{name: "ultrafeedback" for name, category in ULTRAFEEDBACK if category != "domain shift"},
        **{name: name for name, category in ULTRAFEEDBACK if category == "domain shift"},
    }


def with_accuracy(result: TrialResult, right: float) -> TrialResult:
    """The trial with that share of each set's pairs ranked right, evenly spread over them."""
    changed = []
    for item in result.evaluations:
        order = (np.arange(len(item.scores.index)) * 7) % len(item.scores.index)
        chosen = np.where(order < right * len(order), 1.0, -1.0)
        scores = dataclasses.replace(item.scores, chosen=chosen, rejected=np.zeros(len(order)))
        changed.append(
            dataclasses.replace(
                item, scores=scores, metrics={**item.metrics, "accuracy": float((chosen > 0).mean())}
            )
        )
    return dataclasses.replace(result, evaluations=tuple(changed))


def test_models_that_disagree_leave_a_wide_interval(store: Store):
    """Six models whose differences are far apart do not agree on their mean."""
    gaps = dict(zip("abcdef", (0.69, -0.64, 0.60, -1.00, 0.08, 0.38), strict=True))
    declared = simulated_sweep(store, models=tuple(gaps), seeds=(0,), pairs=100, sets=ULTRAFEEDBACK[:1])
    results = [
        with_accuracy(item, 0.5 + gaps[item.record.model] / 2 * (1 if item.record.reward == "ex_rm" else -1))
        for item in sweep_results(declared, store)
    ]
    analysis = Analysis(results)
    found = analysis.difference(scope(analysis, "in-distribution"), "accuracy")
    assert found.by_model == pytest.approx(list(gaps.values()), abs=0.011)
    half = 2.571 * np.std(found.by_model, ddof=1) / np.sqrt(6)
    assert width(found) == pytest.approx(2 * half, rel=0.05)
    assert found.over == "6 models, 1 seed, 100 pairs"
    assert not found.estimate.excludes_zero
    said = conclusions(analysis)
    assert "95 % intervals over 6 models, 1 seed, 100 pairs" in said[0]
    assert "models nothing can be said" not in said[1]


@pytest.mark.parametrize(
    ("models", "seeds", "over"),
    [
        (4, 2, "4 models, 2 seeds, 20 pairs"),
        (3, 2, "2 seeds, 20 pairs of these 3 models"),
        (1, 1, "1 seed, 20 pairs of this model"),
    ],
)
def test_an_interval_names_what_it_is_over(simulated, models: int, seeds: int, over: str):
    names = tuple(f"m{number}" for number in range(models))
    analysis = simulated(models=names, seeds=range(seeds), pairs=20, sets=ULTRAFEEDBACK[:1])
    assert analysis.difference(scope(analysis, "in-distribution"), "accuracy").over == over
    said = conclusions(analysis)[1]
    assert f"rests on {models} model" in said
    assert ("nothing can be said of a model that was not tried" in said) == (models < 4)
    assert ("one seed says nothing about others" in said) == (seeds == 1)


def test_any_type_can_be_the_baseline_and_any_other_is_compared_with_it(simulated):
    strengths = {
        (kind, "in-distribution"): value for kind, value in (("simpo", 0.2), ("dpo", 1.5), ("orpo", 0.3))
    }
    described = {"rewards": ("simpo", "dpo", "orpo"), "strengths": strengths, "sets": ULTRAFEEDBACK[:1]}
    analysis = simulated(pairs=60, **described)
    assert (analysis.baseline, analysis.others) == ("simpo", ["dpo", "orpo"])
    other = Analysis(analysis.results, "dpo")
    assert (other.baseline, other.others) == ("dpo", ["simpo", "orpo"])
    here = scope(other, "in-distribution")
    there, back = analysis.difference(here, "accuracy", other="dpo"), other.difference(here, "accuracy")
    assert there.value == pytest.approx(-back.value)
    said = conclusions(other)[0]
    assert "dpo − simpo: trained on ultrafeedback, dpo is ahead of simpo in-distribution (+0." in said
    assert "dpo is ahead of orpo" in said
    titles = {table.title_of(name) for table in statistics_tables(other) for name in table.names}
    assert not [title for title in titles if "RM" in title]
    (first, *_) = statistics_tables(other)
    assert {row["difference"] for row in first.rows} == {"dpo − simpo", "dpo − orpo"}


def test_the_report_has_one_interval_of_a_difference_and_corrects_its_p(simulated):
    """The sentences and the table say the same; p of several comparisons are corrected."""
    analysis = simulated(pairs=60)
    (table, *_) = statistics_tables(analysis)
    means = {row["category"]: row for row in table.rows if str(row["model"]).startswith("mean")}
    for here in analysis.categories():
        found = analysis.difference(here, "accuracy").estimate
        assert means[here.category]["accuracy"] == found
        assert f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]" in conclusions(analysis)[0]
    times = [row["p_holm"] / row["p"] for row in means.values()]
    assert (len(times), min(times) >= 1, max(times)) == (3, True, pytest.approx(3))
    # Cells of two models, three seeds and three sets.
    counts = [[row[name] for name in ("ahead", "ties", "behind")] for row in means.values()]
    assert (sum(counts[1]), counts[1][0], counts[2][2]) == (18, 18, 18)
    assert "orrected for 3 comparisons" in conclusions(analysis)[1]


@pytest.mark.parametrize(
    ("first", "second", "won"), [(0.76, 0.75, (0, 1, 0)), (0.77, 0.75, (1, 0, 0)), (0.5, 0.52, (0, 0, 1))]
)
def test_within_one_point_is_a_tie(store: Store, first: float, second: float, won: tuple[int, int, int]):
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), pairs=100, sets=ULTRAFEEDBACK[:1])
    results = sweep_results(declared, store)
    analysis = Analysis([*map(with_accuracy, results, (first, second))])
    assert analysis.win_rate(scope(analysis, "in-distribution"), "im_rm") == won


def test_a_cell_that_learned_by_heart_is_marked(store: Store):
    declared = simulated_sweep(store, pairs=100, seeds=(0,))
    results = [
        with_accuracy(item, 0.47) if item.record.name.startswith("llama-64 · im_rm") else item
        for item in sweep_results(declared, store)
    ]
    analysis = Analysis(results)
    row = next(
        row
        for row in by_category(analysis, "accuracy").rows
        if (row["category"], row["model"]) == ("in-distribution", "llama-64")
    )
    assert row["remarks"] == "IM-RM: at chance"


def test_the_conclusion_turns_with_the_numbers(simulated):
    said = conclusions(simulated(pairs=80))[0]
    turned = conclusions(simulated(name="turned", pairs=80, strengths=REVERSED))[0]
    for first, second, text in (("EX-RM", "IM-RM", said), ("IM-RM", "EX-RM", turned)):
        assert f"{first} is ahead of {second} in-distribution" in text
        assert f"{second} is ahead of {first} under domain shift" in text
    even = conclusions(simulated(name="even", pairs=80, strengths=EVEN, seeds=(0,)))[0]
    assert "is ahead" not in even
    assert "no difference of EX-RM from IM-RM can be told" in even


def test_what_is_missing_or_did_not_learn_is_said_and_nothing_is_concluded_of_nothing(simulated):
    assert "2 of 12 trials are missing" in conclusions(simulated(pairs=30, missing=2))[2]
    nothing = conclusions(simulated(name="empty", missing=12))
    assert "Nothing can be concluded yet: no trial has been trained" in nothing[0]
    assert "12 of 12 trials are missing" in nothing[2]
    short = simulated(name="short", pairs=30, unlearned=12)
    assert "no training fits its own pairs: try a higher --lr, more --epochs" in conclusions(short)[0]
    assert "12 trials (EX-RM and IM-RM) did not learn" in conclusions(short)[2]
    # One type of each model alone.
    crossed = simulated(name="crossed", seeds=(0,), pairs=30).results
    bare = dataclasses.replace(crossed[0], trained=False, train_accuracy=None, evaluations=())
    crossed = [bare, crossed[1], crossed[2], dataclasses.replace(bare, record=crossed[3].record)]
    assert "no model has every reward type" in conclusions(Analysis(crossed))[0]


def test_a_single_reward_type_is_reported_and_not_compared(simulated):
    analysis = simulated(rewards=("im_rm",), pairs=200)
    said = conclusions(analysis)[0]
    assert "the sweep holds one reward type" in said
    # Nothing was compared, so nothing is said of what did not move it.
    assert conclusions(analysis)[2] == "Every trial is complete and fits its training pairs."
    assert [table.name for table in statistics_tables(analysis)][:2] == [
        "accuracy_by_category",
        "loss_by_category",
    ]


def test_length_controlled_and_leak_free_accuracy_stand_beside_the_plain_one(store: Store):
    results = sweep_results(simulated_sweep(store, models=("llama-64",), pairs=60), store)
    plain = Analysis(results)
    assert "length-controlled accuracy was not measured; leak-free" in conclusions(plain)[2]
    assert {row["accuracy_leak_free"] for row in by_set(plain).records()} == {None}

    def controlled(item: EvaluationResult) -> EvaluationResult:
        known = {"accuracy_length_controlled": 0.5, "accuracy_leak_free": item.metrics["accuracy"]}
        return dataclasses.replace(item, metrics={**item.metrics, **known})

    analysis = Analysis(
        [
            dataclasses.replace(result, evaluations=tuple(map(controlled, result.evaluations)))
            for result in results
        ]
    )
    assert {row["accuracy_length_controlled"] for row in by_set(analysis).records()} == {0.5}
    said = conclusions(analysis)[2]
    assert "length-controlled, EX-RM − IM-RM is +0.000 in-distribution of ultrafeedback where" in said
    assert "leak-free" not in said


def rows(table: Table) -> list[dict[str, object]]:
    return [row for row in table.records() if str(row["model"]).startswith("mean")]


def test_the_papers_numbers_stand_beside_ours_where_the_sets_are_its(simulated):
    analysis = simulated(pairs=30, seeds=(0,))
    found = rows(by_category(analysis, "accuracy"))
    assert [(row["category"], row["ex_rm_paper"], row["im_rm_paper"]) for row in found] == [
        ("in-distribution", 0.752, 0.646),
        ("token-level shift", 0.665, 0.602),
        ("domain shift", 0.621, 0.720),
    ]
    assert rows(by_category(analysis, "abs_margin"))[0]["im_rm_paper"] == 0.813
    fewer = rows(by_category(simulated(pairs=30, seeds=(0,), sets=ULTRAFEEDBACK[:-1]), "accuracy"))
    assert [row["ex_rm_paper"] for row in fewer] == [0.752, 0.665, None]
    other = by_category(simulated(name="other", pairs=30, seeds=(0,), train_sets=("rewardmath",)), "accuracy")
    assert "paper" not in other.columns


def test_pairs_that_share_a_prompt_of_a_suite_are_one_unit(store: Store):
    """Each prompt four times over, all four alike, is no more evidence than once; nor does a prompt of more pairs add noise."""
    sets = (("suite", "domain shift"),)
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), sets=sets, pairs=50, strengths=EVEN)
    once = list(sweep_results(declared, store))

    def repeated(result: TrialResult, times: np.ndarray) -> TrialResult:
        (item,) = result.evaluations
        at = np.repeat(np.arange(50), times)
        arrays = {name: getattr(item.scores, name)[at] for name in ("chosen", "rejected", "longer")}
        scores = dataclasses.replace(item.scores, **arrays, index=np.arange(len(at)), prompts=at)
        metrics = summary(scores.chosen, scores.rejected)
        return dataclasses.replace(
            result, evaluations=(dataclasses.replace(item, scores=scores, metrics=metrics),)
        )

    fourfold = Analysis([repeated(result, np.full(50, 4)) for result in once])
    here = scope(fourfold, "domain shift")
    for kinds in ("ex_rm", "im_rm"):
        alone, four = (
            analysis.mean(here, kinds, "accuracy", ["llama-64"]) for analysis in (Analysis(once), fourfold)
        )
        assert (four.estimate.low, four.estimate.high) == pytest.approx(
            (alone.estimate.low, alone.estimate.high)
        )
    assert four.over == "1 seed, 200 pairs of 50 prompts of this model"
    gaps = [analysis.difference(here, "accuracy") for analysis in (Analysis(once), fourfold)]
    assert gaps[1].estimate.p == pytest.approx(gaps[0].estimate.p)
    right = dataclasses.replace(once[0].evaluations[0].scores, chosen=np.ones(50), rejected=np.zeros(50))
    sure = dataclasses.replace(
        once[0], evaluations=(dataclasses.replace(once[0].evaluations[0], scores=right),)
    )
    uneven = Analysis([repeated(sure, np.arange(50) % 5 + 1)]).mean(here, "ex_rm", "accuracy", ["llama-64"])
    assert uneven.estimate.low == pytest.approx(0.929, abs=1e-3)


def test_the_best_three_of_many_types_are_told(store: Store):
    kinds = {"ex_rm": 0.2, "a": 0.8, "b": 0.9, "c": 1.0, "d": 1.7}
    sets = (("one", "in-distribution"), ("two", "domain shift"))
    declared = simulated_sweep(
        store,
        models=("llama-64",),
        rewards=(*kinds,),
        seeds=(0,),
        sets=sets,
        pairs=60,
        strengths={(kind, category): strength for kind, strength in kinds.items() for _, category in sets},
    )
    results = sweep_results(declared, store)
    results[-1] = dataclasses.replace(results[-1], evaluations=results[-1].evaluations[:1])
    answer, *_ = conclusions(Analysis(results))
    assert [kind for kind in "abcd" if f"EX-RM − {kind}" in answer] == ["b", "c", "d"]
    assert "the table of differences has 1 more" in answer
