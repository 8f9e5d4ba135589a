"""Pairs over the length limits: models are compared on what all have, and everything a user reads says what is left out."""

import dataclasses
import io
from unittest import mock

import pytest
from pyarrow import parquet
from rich.console import Console

from orchestrator.cli.terminal import say
from orchestrator.report import two_sweeps
from orchestrator.report.comparison import Analysis
from orchestrator.report.results import (
    ScoredTrials,
    left_out_lines,
    on_common_pairs,
    results_of,
    sweep_results,
)
from orchestrator.report.two_sweeps import other_sweep, write_comparison
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, write_declaration
from tests.orchestrator.simulated import simulated_sweep
from tests.orchestrator.sweep_samples import (
    commit_prepared,
    commit_scores,
    commit_train,
    declaration,
    record,
    write_report,
)

SETS = (("tiny_world", "in-distribution"), ("hamiltonian", "domain shift"))


@pytest.fixture
def declared(store: Store) -> Declaration:
    """Of 20 pairs of a set, qwen2-64's tokenizer leaves out the 10 that llama-64 ranks wrong; it trains on 10 of 20."""
    commit_prepared(store, "half", too_long=10)
    commit_prepared(store, "whole", too_long=0)
    trials = [
        record(model=model, reward=reward, sets=SETS)
        for model in ("llama-64", "qwen2-64")
        for reward in ("ex_rm", "im_rm")
    ]
    for trial in trials:
        part = trial.model == "qwen2-64"
        commit_train(store, trial.key, pairs=10 if part else 20, prepared="half" if part else "whole")
        for item, right in zip(trial.evaluations, (20, 10), strict=True):
            short = part and item.dataset == "hamiltonian"
            prepared = "half" if short else "whole"
            commit_scores(
                store,
                item.key,
                right=min(right, 10 if short else 20),
                pairs=10 if short else 20,
                prepared=prepared,
            )
    return declaration(*trials)


def test_models_are_compared_on_what_all_have_and_every_view_says_what_was_left_out(
    store: Store, declared: Declaration
):
    written = write_report(declared, store)
    found = written.tables[0].records()
    rows = {row["model"]: row for row in found if row["category"] == "domain shift"}
    assert [rows[name]["ex_rm"] for name in ("llama-64", "qwen2-64", "mean of 2")] == [1.0] * 3
    table = parquet.read_table(written.folder / "tables" / "sets.parquet").to_pylist()
    assert {(row["accuracy"], row["n"]) for row in table if row["evaluation_set"] == "hamiltonian"} == {
        (1.0, 10)
    }
    # What a trial has scored stays in its own row.
    own = parquet.read_table(store.sweep_dir("demo") / "trials.parquet").to_pylist()
    mine = {(row["model"], row["evaluation_set"]): row for row in own}
    llama, qwen = (mine[model, "hamiltonian"] for model in ("llama-64", "qwen2-64"))
    assert (llama["accuracy"], llama["n"], llama["left_out"], llama["train_left_out"]) == (0.5, 20, 0, 0)
    assert (qwen["accuracy"], qwen["n"], qwen["left_out"], qwen["train_left_out"]) == (1.0, 10, 10, 10)
    terminal = io.StringIO()
    say(Console(width=60, file=terminal), *written.left_out)
    summary, page = ((written.folder / name).read_text() for name in ("summary.md", "report.html"))
    for text in (terminal.getvalue(), summary, page):
        assert (
            "eft out for length, trained on tiny_world: 0 of 20 pairs for llama-64, 10 of 20 pairs for qwen2-64"
            in text
        )
        assert "evaluated on hamiltonian" in text
        assert "compared on the 10 pairs that all have (llama-64 has 20, qwen2-64 has 10)" in text
        assert "evaluated on tiny_world" not in text
    assert "What could be fooling us: pairs over the length limits are left out" in summary


def test_an_analysis_of_scores_is_of_the_common_pairs_and_says_so(store: Store, declared: Declaration):
    results, said = results_of(ScoredTrials(trials=declared.trials, missing=0), store)
    found = [item for result in results for item in result.final]
    assert {(item.dataset, len(item.scores.index)) for item in found} == {
        ("tiny_world", 20),
        ("hamiltonian", 10),
    }
    assert "compared on the 10 pairs that all have" in said


def test_what_all_models_lack_is_said_and_where_nothing_is_lacking_nothing(store: Store):
    commit_prepared(store, "half", too_long=10)
    trials = [record(model=model) for model in ("llama-64", "qwen2-64")]
    other = [dataclasses.replace(item, train_set="other", key=f"{item.key}-other") for item in trials]
    for trial in (*trials, *other):
        commit_train(store, trial.key, pairs=20)
    for trial in trials:
        commit_scores(store, trial.evaluations[0].key, right=9)
    results = sweep_results(declaration(*trials, *other), store)
    compared = on_common_pairs(results)
    assert compared == results
    assert left_out_lines(results, compared) == []
    for trial in trials:
        commit_scores(store, trial.evaluations[1].key, right=9, prepared="half")
    results = sweep_results(declaration(*trials, *other), store)
    assert left_out_lines(results, on_common_pairs(results)) == [
        f"left out for length, trained on {train_set}, evaluated on hamiltonian: 10 of 20 pairs for "
        "llama-64 and qwen2-64"
        for train_set in ("tiny_world", "other")
    ]


def test_models_without_a_pair_in_common_are_not_compared_on_the_set(store: Store):
    trials = [record(model=model) for model in ("llama-64", "qwen2-64")]
    for number, trial in enumerate(trials):
        commit_train(store, trial.key)
        commit_scores(store, trial.evaluations[0].key, right=9)
        commit_scores(store, trial.evaluations[1].key, right=9, first=10 * number)
    # A trial that is not evaluated on the set yet does not bring it back.
    results = sweep_results(declaration(*trials, record(seed=1)), store)
    compared = on_common_pairs(results)
    assert [scope.category for scope in Analysis(compared).categories()] == ["in-distribution"]
    assert [item.complete for item in compared] == [True, True, False]
    assert "compared on the 0 pairs that all have" in left_out_lines(results, compared)[0]


def test_sweeps_are_compared_on_the_pairs_sets_and_models_that_both_have(store: Store):
    sets = (("a", "domain shift"), ("b", "domain shift"))
    ours = simulated_sweep(store, seeds=(0,), sets=sets, pairs=40)
    few = simulated_sweep(store, name="few", seeds=(0,), sets=sets[:1], pairs=30, models=("llama-64",))
    write_declaration(few, store)
    with mock.patch.object(two_sweeps, "every_figure", return_value=()):
        found = write_comparison(ours, store, *other_sweep("few", store))
    scores = next(item.scores for item in sweep_results(ours, store)[0].evaluations if item.dataset == "a")
    expected = float((scores.chosen > scores.rejected)[:30].mean())
    # One model in both: no mean of models.
    rows = {row["train_set"]: row for row in found.table.rows}
    assert {row["model"] for row in found.table.rows} == {"llama-64"}
    assert rows["ultrafeedback as EX-RM"]["demo"].value == expected
    assert "compared on the 30 pairs that all have" in found.file.read_text()
