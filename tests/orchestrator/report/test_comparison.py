"""From scores to means and differences: what is paired with what, what is left out, and what is concluded."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from orchestrator.report.comparison import CONTROLS, Analysis, Scope, added_by_pairs, pair_groups
from orchestrator.report.conclusions import conclusions
from orchestrator.report.results import TrialResult, _metrics, _on, sweep_results
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
    for item in (whole, alone):
        assert len(item.sets) == (3 if item is whole else 1)
    three, one = (analysis.mean(item, "ex_rm", "accuracy", ["llama-64"]).estimate for item in (whole, alone))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))
    three_p, one_p = (analysis.difference(item, "accuracy").p_pairs for item in (whole, alone))
    assert one_p > 0.02
    assert three_p == pytest.approx(one_p, abs=2e-3)


def test_a_set_belongs_to_what_it_rewrites_even_where_it_is_another_domain(store: Store):
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), pairs=4)
    results = sweep_results(declared, store)
    assert pair_groups(results) == {
        **{name: "ultrafeedback" for name, category in ULTRAFEEDBACK if category != "domain shift"},
        **{name: name for name, category in ULTRAFEEDBACK if category == "domain shift"},
    }
    elsewhere = simulated_sweep(
        store,
        name="else",
        models=("llama-64",),
        seeds=(0,),
        pairs=4,
        sets=[(name, "domain shift") for name, _ in ULTRAFEEDBACK[:4]],
    )
    assert {*pair_groups(sweep_results(elsewhere, store)).values()} == {"ultrafeedback"}
    # The same rows under two names are no more pairs than under one.
    alike = [dataclasses.replace(item, dataset_digest="rows") for item in results[0].record.evaluations]
    again = dataclasses.replace(
        results[0], record=dataclasses.replace(results[0].record, evaluations=tuple(alike))
    )
    assert {*pair_groups([again]).values()} == {"ultrafeedback"}


def first_pairs(result: TrialResult, dataset: str, count: int) -> TrialResult:
    """The trial with only so many pairs of a set."""
    kept = [_on(item, np.arange(count)) if item.dataset == dataset else item for item in result.evaluations]
    return dataclasses.replace(result, evaluations=tuple(kept))


def test_a_rewriting_of_some_of_the_pairs_adds_what_its_pairs_vary(store: Store):
    sets = (("a", "token-level shift"), ("bc", "token-level shift"))
    declared = simulated_sweep(
        store, models=("llama-64",), rewards=("ex_rm",), seeds=(0,), sets=sets, strengths=EVEN
    )
    (result,) = sweep_results(declared, store)
    analysis = Analysis([first_pairs(result, "bc", 30)])
    found = analysis.mean(scope(analysis, "token-level shift"), "ex_rm", "accuracy", ["llama-64"])
    whole, part = (1.0 * (item.scores.chosen > 0) for item in analysis.results[0].evaluations)
    influence = (whole - whole.mean()) / 120 / 2
    influence[:30] += (part - part.mean()) / 30 / 2
    assert found.spread.variance == pytest.approx(120 / 119 * (influence**2).sum())
    assert found.over == "30 to 120 pairs of one training of this model"
    # Where all pairs agree, the smaller set says how rare an exception is.
    sure = [with_accuracy(item, 1.0) for item in analysis.results]
    low = Analysis(sure).mean(found.scope, "ex_rm", "accuracy", ["llama-64"]).estimate.low
    assert low == pytest.approx(0.025 ** (1 / 30))


def test_a_rewriting_of_a_few_pairs_is_no_more_evidence_than_these(store: Store):
    """Two hundred pairs without a difference, and five rewritten ones that all favour one type."""
    sets = (("a", "token-level shift"), ("bc", "token-level shift"))
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), pairs=200, sets=sets, strengths=EVEN)
    results = []
    for result, right in zip(sweep_results(declared, store), (1.0, 0.0), strict=True):
        known, few = with_accuracy(first_pairs(result, "bc", 5), right).evaluations
        even = with_accuracy(result, 0.5).evaluations[0]
        assert known.dataset == even.dataset == "a"
        results.append(dataclasses.replace(result, evaluations=(even, few)))
    found = Analysis(results).difference(scope(Analysis(results), "token-level shift"), "accuracy")
    assert (found.value, found.p_pairs) == (0.5, 2 / 2**5)


def test_a_mean_over_sets_is_at_chance_as_so_many_pairs_are(store: Store):
    sets = (("a", "in-distribution"), ("bc", "in-distribution"))
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), pairs=200, sets=sets)
    results = [first_pairs(item, "bc", 20) for item in sweep_results(declared, store)]
    told = []
    for right in (0.6, 0.65):
        analysis = Analysis([with_accuracy(item, right) for item in results])
        told.append(analysis.mean(scope(analysis, "in-distribution"), "ex_rm", "accuracy").at_chance)
    # 0.5 + 2 · √(¼/200 + ¼/20)/2 = 0.617
    assert told == [True, False]


def test_of_one_pair_every_metric_is_what_it_adds(store: Store):
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0,), pairs=1, sets=ULTRAFEEDBACK[:1])
    (item,) = sweep_results(declared, store)[0].evaluations
    scores = dataclasses.replace(item.scores, longer=np.zeros(1))
    item = dataclasses.replace(item, scores=scores, metrics=_metrics(scores, np.array([False])))
    for metric in ("accuracy", "loss", "abs_margin", *CONTROLS):
        assert added_by_pairs(item, metric) == pytest.approx([item.metrics[metric]])


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
        (1, 2, "2 seeds, 20 pairs of this model"),
        (3, 1, "20 pairs of one training of these 3 models"),
    ],
)
def test_an_interval_names_what_it_is_over(simulated, models: int, seeds: int, over: str):
    names = tuple(f"m{number}" for number in range(models))
    analysis = simulated(models=names, seeds=range(seeds), pairs=20, sets=ULTRAFEEDBACK[:1])
    found = analysis.difference(scope(analysis, "in-distribution"), "accuracy")
    assert found.over == over
    # One training of each can give no p of trainings.
    assert (found.estimate.p is None) == (seeds == 1)
    assert ("nothing can be said of a model that was not tried" in conclusions(analysis)[1]) == (models < 4)


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
    turned = [
        item.difference(here, "accuracy", other=kind).value
        for item, kind in ((analysis, "dpo"), (other, "simpo"))
    ]
    assert turned[0] == pytest.approx(-turned[1])
    said = conclusions(other)[0]
    assert "dpo − simpo: trained on ultrafeedback, dpo is ahead of simpo in-distribution (+0." in said
    assert "dpo is ahead of orpo" in said
    titles = {table.title_of(name) for table in statistics_tables(other) for name in table.names}
    assert not [title for title in titles if "RM" in title]
    (first, *_) = statistics_tables(other)
    assert {row["difference"] for row in first.rows} == {"dpo − simpo", "dpo − orpo"}


def test_p_values_of_several_comparisons_are_corrected(simulated):
    analysis = simulated(pairs=60)
    (table, *_) = statistics_tables(analysis)
    means = [row for row in table.rows if str(row["model"]).startswith("mean")]
    assert len(means) == 3
    assert [row["p_holm"] for row in means] == [*analysis.holm.values()]
    assert all(row["p_holm"] >= row["p"] for row in means)
    assert min(row["p_holm"] / row["p"] for row in means) >= 1
    assert max(row["p_holm"] / row["p"] for row in means) == pytest.approx(3)


def test_a_cell_that_learned_by_heart_is_marked(store: Store):
    declared = simulated_sweep(store, pairs=100, seeds=(0,))
    results = [
        with_accuracy(item, 0.47) if item.record.name.startswith("llama-64 · im_rm") else item
        for item in sweep_results(declared, store)
    ]
    analysis = Analysis(results)
    assert (
        "llama-64 as IM-RM on ultrafeedback (0.470) fits its training pairs but is at chance"
        in conclusions(analysis)[2]
    )
    row = next(
        row
        for row in by_category(analysis, "accuracy").rows
        if (row["category"], row["model"]) == ("in-distribution", "llama-64")
    )
    assert row["remarks"] == "IM-RM: at chance"


def test_what_did_not_learn_enters_nothing(simulated):
    said = conclusions(simulated(models=("llama-64",), seeds=(0, 1), pairs=40, unlearned=2))
    assert "rests on 1 model, 1 seed and" in said[1]
    assert "2 trials (EX-RM and IM-RM) did not learn their training pairs and enter no mean" in said[2]


def test_a_type_that_no_model_has_keeps_the_others_from_no_mean(store: Store):
    declared = simulated_sweep(store, seeds=(0,), pairs=40)
    found = sweep_results(declared, store)
    bare = [
        dataclasses.replace(item, trained=False, train_accuracy=None, evaluations=())
        if item.record.reward == "im_rm"
        else item
        for item in found
    ]
    analysis = Analysis(bare)
    assert analysis.mean(scope(analysis, "in-distribution"), "ex_rm", "accuracy").models == (
        "llama-64",
        "qwen2-64",
    )
    # One type of each model alone.
    crossed = [found[0], bare[1], dataclasses.replace(bare[1], record=found[2].record), found[3]]
    assert "no model has every reward type" in conclusions(Analysis(crossed))[0]


def test_win_rates_count_cells(simulated):
    analysis = simulated(pairs=80)
    found = analysis.win_rate(scope(analysis, "token-level shift"), "im_rm")
    assert (found.cells, found.ahead) == (2 * 3 * 3, 18)
    assert analysis.win_rate(scope(analysis, "domain shift"), "im_rm").behind == 18


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
    assert "no trial has been trained" in nothing[0]
    assert "12 of 12 trials are missing" in nothing[2]
    short = conclusions(simulated(name="short", pairs=30, unlearned=12))[0]
    assert (
        "no training fits its own pairs after 5 epochs at lr 1e-06: try a higher --lr, more --epochs" in short
    )


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
    without, plain = Analysis(results), conclusions(Analysis(results))
    assert "length-controlled accuracy was not measured; leak-free accuracy was not measured" in plain[2]
    assert {row["accuracy_leak_free"] for row in by_set(without).records()} == {None}
    controlled = Analysis(with_side_metrics(results, 0.5, 0.5))
    assert {row["accuracy_length_controlled"] for row in by_set(controlled).records()} == {0.5}
    said = conclusions(controlled)[2]
    assert "length-controlled, EX-RM − IM-RM is +0.000 in-distribution where it was +0." in said
    assert "leak-free" not in said
    # Of the seed that only EX-RM has, nothing enters the comparison.
    changed = with_side_metrics(results, 0.7, 0.5)
    odd = with_side_metrics(results, 0.1, 0.5)
    alone = [odd[number] if item.record.seed == 2 else item for number, item in enumerate(changed)]
    alone = [item for item in alone if (item.record.seed, item.record.reward) != (2, "im_rm")]
    assert (
        "length-controlled, EX-RM − IM-RM is +0.200 under token-level shift"
        in conclusions(Analysis(alone))[2]
    )


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
    assert four.over == "200 pairs of 50 prompts of one training of this model"
    gaps = [analysis.difference(here, "accuracy") for analysis in (Analysis(once), fourfold)]
    assert gaps[1].p_pairs == pytest.approx(gaps[0].p_pairs)
    right = dataclasses.replace(once[0].evaluations[0].scores, chosen=np.ones(50), rejected=np.zeros(50))
    sure = dataclasses.replace(
        once[0], evaluations=(dataclasses.replace(once[0].evaluations[0], scores=right),)
    )
    uneven = Analysis([repeated(sure, np.arange(50) % 5 + 1)]).mean(here, "ex_rm", "accuracy", ["llama-64"])
    assert uneven.estimate.low == pytest.approx(0.929, abs=1e-3)


def test_the_best_three_types_are_told_by_their_means_over_the_categories_that_they_have(store: Store):
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
    answer, support, _ = conclusions(Analysis(results))
    assert [kind for kind in "abcd" if f"EX-RM − {kind}" in answer] == ["b", "c", "d"]
    assert "the table of differences has 1 more" in answer
    assert "corrected for 7 comparisons" in support
