"""From artifacts to tables: means over seeds, EX-RM − IM-RM, trials that did not learn, and what is missing."""

import csv
import io
import json

import pytest
from pyarrow import parquet
from rich.console import Console

from orchestrator.report.comparison import Analysis
from orchestrator.report.results import sweep_results, trial_states, with_scores
from orchestrator.report.summary import accuracy_table, by_category, ensemble_table
from orchestrator.report.tables import Value
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, read_declaration, write_declaration
from tests.orchestrator.sweep_samples import (
    commit_scores,
    commit_train,
    commit_trial,
    declaration,
    record,
    trial_result,
    write_report,
)
from trainers.errors import SpecError

TOKENS = (
    ("tiny_world", "in-distribution"),
    ("french", "token-level shift"),
    ("spanish", "token-level shift"),
)


def rows_of(store: Store, declared: Declaration) -> dict[tuple[object, object], dict[str, Value]]:
    rows = by_category(Analysis(sweep_results(declared, store)), "accuracy").rows
    return {(row["category"], row["model"]): row for row in rows}


def test_a_result_is_read_from_the_scores_and_complete_with_its_training_and_all_sets(store: Store):
    trial = record()
    untouched = trial_result(trial, store)
    assert (untouched.trained, untouched.complete, untouched.learned, untouched.evaluations) == (
        False,
        False,
        False,
        (),
    )
    for item in trial.evaluations:
        commit_scores(store, item.key, right=9)
    assert not trial_result(trial, store).complete
    other = record(seed=1)
    commit_trial(store, other, 9)
    assert (trial_result(other, store).trained, trial_result(other, store).complete) == (True, False)
    commit_scores(store, other.evaluations[1].key, right=5)
    result = trial_result(other, store)
    assert (result.complete, result.learned) == (True, True)
    assert [(item.dataset, item.metrics["accuracy"], item.metrics["n"]) for item in result.evaluations] == [
        ("tiny_world", 0.9, 10),
        ("hamiltonian", 0.5, 10),
    ]
    assert result.category_accuracy() == {"in-distribution": 0.9, "domain shift": 0.5}


@pytest.mark.parametrize(
    ("accuracy", "pairs", "learned"), [(0.6, 100, False), (0.61, 100, True), (0.52, 4000, True)]
)
def test_learned_means_above_chance_by_two_standard_errors(
    store: Store, accuracy: float, pairs: int, learned: bool
):
    commit_train(store, record().key, accuracy=accuracy, pairs=pairs)
    assert trial_result(record(), store).learned is learned


def test_scores_that_were_tampered_with_are_not_reported(store: Store):
    trial = record()
    commit_trial(store, trial, 9, 5)
    folder = store.read("evaluate", trial.evaluations[0].key)
    (folder / "scores.parquet").write_bytes(b"other")
    result = trial_result(trial, Store(store.root))
    assert len(result.evaluations) == len(trial.evaluations) - 1
    assert not result.complete
    assert str(folder / "scores.parquet") in "".join(result.faults)


def test_a_cell_is_the_mean_of_its_sets_and_then_of_the_seeds_that_learned(store: Store):
    trials = [record(seed=seed, sets=TOKENS) for seed in range(4)]
    for trial, right, accuracy in zip(trials, (8, 9, 10, 1), (1.0, 1.0, 1.0, 0.5), strict=True):
        commit_trial(store, trial, right, 4, right, accuracy=accuracy)
    rows = rows_of(store, declaration(*trials))
    assert [*rows] == [("in-distribution", "llama-64"), ("token-level shift", "llama-64")]
    row = rows["in-distribution", "llama-64"]
    assert (row["ex_rm"].value, row["ex_rm"].std) == pytest.approx((0.9, 0.1))
    assert row["remarks"] == "EX-RM: 1 not learned (0.100)"
    assert rows["token-level shift", "llama-64"]["ex_rm"].value == pytest.approx(0.65)
    (alone,) = [
        row for row in rows_of(store, declaration(trials[0])).values() if row["category"] == "in-distribution"
    ]
    assert (alone["ex_rm"].value, alone["ex_rm"].std, alone.get("ex_rm_minus_im_rm")) == (0.8, None, None)


def test_the_mean_over_models_takes_only_models_where_both_types_learned(store: Store):
    plan = {
        ("llama-64", "ex_rm"): (10, 1.0),
        ("llama-64", "im_rm"): (6, 1.0),
        ("qwen2-64", "ex_rm"): (8, 1.0),
        ("qwen2-64", "im_rm"): (8, 1.0),
        ("gemma2-64", "ex_rm"): (1, 1.0),
        ("gemma2-64", "im_rm"): (1, 0.5),
    }
    trials = [record(model=model, reward=reward) for model, reward in plan]
    for trial, (right, accuracy) in zip(trials, plan.values(), strict=True):
        commit_trial(store, trial, 10, right, accuracy=accuracy)
    row = rows_of(store, declaration(*trials))["domain shift", "mean of 2"]
    values = [row[name].value for name in ("ex_rm", "im_rm", "ex_rm_minus_im_rm")]
    assert values == pytest.approx([0.9, 0.7, 0.2])


def shown(store: Store, declared: Declaration, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The mean over models in domain shift, as each of the four views says it."""
    folder, _, tables, _ = write_report(declared, store)
    Console(width=200).print(accuracy_table(tables[0]).terminal())
    texts = {"terminal": capsys.readouterr().out, "summary": (folder / "summary.md").read_text()}
    lines = {
        name: next(line for line in text[text.index("domain shift") :].splitlines() if "mean of" in line)
        for name, text in texts.items()
    }
    written = csv.DictReader(io.StringIO((folder / "tables" / "accuracy_by_category.csv").read_text()))
    for view, rows in (("csv", written), ("json", tables[0].records())):
        (row,) = [row for row in rows if row["category"] == "domain shift" and "mean" in row["model"]]
        # An interval may hold any number.
        lines[view] = str({key: value for key, value in row.items() if not key.endswith(("_low", "_high"))})
    return lines


@pytest.mark.parametrize("rewards", [("ex_rm", "im_rm"), ("ex_rm", "im_rm", "ex_grm")])
def test_a_trial_that_is_missing_enters_no_mean(
    store: Store, capsys: pytest.CaptureFixture[str], rewards: tuple[str, ...]
):
    trials = [record(model=model, reward=reward) for model in ("llama-64", "qwen2-64") for reward in rewards]
    for trial in trials:
        if (trial.model, trial.reward) != ("qwen2-64", "im_rm") and trial.reward != "ex_grm":
            commit_trial(store, trial, 10, 10 if trial.model == "llama-64" else 8)
    row = rows_of(store, declaration(*trials))["domain shift", "mean of 1"]
    assert [row[name].value for name in ("ex_rm", "im_rm", "ex_rm_minus_im_rm")] == [1.0, 1.0, 0.0]
    found = shown(store, declaration(*trials), capsys)
    assert not [view for view, text in found.items() if "mean of 1" not in text]
    assert not [view for view, text in found.items() if "0.5" in text]


def test_a_reward_type_that_was_not_asked_for_has_no_number(store: Store, capsys: pytest.CaptureFixture[str]):
    trials = [record(model=model, reward="im_rm") for model in ("llama-64", "qwen2-64")]
    for trial in trials:
        commit_trial(store, trial, 9, 9)
    row = rows_of(store, declaration(*trials))["domain shift", "mean of 2"]
    assert (row.get("ex_rm"), row["im_rm"].value, row.get("ex_rm_minus_im_rm")) == (None, 0.9, None)
    assert not [view for view, text in shown(store, declaration(*trials), capsys).items() if "0.0" in text]


def test_a_mean_over_fewer_models_says_so(store: Store):
    declared = [("llama-64", "ex_rm"), ("qwen2-64", "ex_rm"), ("llama-64", "ex_rm_mean")]
    trials = [record(model=model, reward=reward) for model, reward in declared]
    for trial in trials:
        commit_trial(store, trial, 10, 9)
    assert ("domain shift", "mean of 2 EX-RM, 1 EX-RM mean") in rows_of(store, declaration(*trials))


def test_a_difference_is_over_the_seeds_that_both_types_have(store: Store):
    trials = [
        record(model=model, reward=kind, seed=seed)
        for model in ("llama-64", "qwen2-64")
        for kind in ("ex_rm", "im_rm")
        for seed in (0, 1)
    ]
    rights = (10, 2, 8, None, 10, 10, 7, 7)
    for trial, right in zip(trials, rights, strict=True):
        if right is not None:
            commit_trial(store, trial, 10, right)
    rows = rows_of(store, declaration(*trials))
    alone, mean = (rows["domain shift", model] for model in ("llama-64", "mean of 2"))
    assert (alone["ex_rm_minus_im_rm"].value, alone["im_rm"].value) == pytest.approx((0.2, 0.8))
    assert alone["remarks"] == "IM-RM: 1 missing; EX-RM − IM-RM: over 1 seed"
    assert (mean["ex_rm_minus_im_rm"].value, mean["ex_rm"].value) == pytest.approx((0.25, 0.8))


def test_an_ensemble_of_the_seeds_that_have_a_set_does_not_need_the_first_seed(store: Store):
    trials = [record(seed=seed) for seed in range(3)]
    for trial, rights in zip(trials, ((9,), (9, 8), (9, 8)), strict=True):
        commit_trial(store, trial, *rights)
    rows = ensemble_table(sweep_results(declaration(*trials), store)).rows
    assert [(row["evaluation_set"], row["seeds"]) for row in rows] == [("hamiltonian", 2), ("tiny_world", 3)]


def test_a_report_says_what_is_missing(store: Store):
    done, half, untouched = record(), record(seed=1), record(seed=2)
    empty = write_report(declaration(untouched), store)
    assert empty.tables[0].rows == []
    assert "0 of 1 trials complete" in (empty.folder / "summary.md").read_text()
    commit_trial(store, done, 9, 5)
    commit_trial(store, half, 8)
    summary = (write_report(declaration(done), store).folder / "summary.md").read_text()
    assert "1 of 1 trials complete" in summary
    assert "What is missing" not in summary
    summary = (write_report(declaration(done, half, untouched), store).folder / "summary.md").read_text()
    assert "1 of 3 trials complete" in summary
    missing = summary.split("What is missing")[1]
    assert [name.name in missing for name in (done, half, untouched)] == [False, True, True]


def test_trials_parquet_has_one_row_per_trial_and_set_missing_ones_too(store: Store):
    untouched, half, done = record(), record(seed=1), record(seed=2, beta=0.5)
    commit_trial(store, half, 8)
    commit_trial(store, done, 9, 5)
    write_report(declaration(untouched, half, done), store)
    rows = parquet.read_table(store.sweep_dir("demo") / "trials.parquet").to_pylist()
    assert [(row["seed"], row["evaluation_set"], row["accuracy"], row["state"]) for row in rows] == [
        (0, "tiny_world", None, "missing"),
        (0, "hamiltonian", None, "missing"),
        (1, "tiny_world", 0.8, "missing"),
        (1, "hamiltonian", None, "missing"),
        (2, "tiny_world", 0.9, "complete"),
        (2, "hamiltonian", 0.5, "complete"),
    ]
    assert json.loads(rows[5]["parameters"])["beta"] == 0.5


def test_a_report_written_again_is_the_same(store: Store):
    commit_trial(store, record(), 9, 5)
    folder, *_ = write_report(declaration(record()), store)
    files = [file for file in sorted(folder.parent.rglob("*")) if file.is_file()]
    before = [file.read_bytes() for file in files]
    write_report(declaration(record()), Store(store.root))
    assert [file.read_bytes() for file in files] == before
    assert sorted(file for file in folder.parent.rglob("*") if file.is_file()) == files


def test_a_declaration_is_read_as_it_was_written_and_an_unknown_one_is_refused(store: Store):
    with pytest.raises(SpecError, match=r"'demo'.*--name"):
        read_declaration("demo", store)
    declared = declaration(record(beta=0.5), record(seed=1))
    write_declaration(declared, store)
    assert read_declaration("demo", store) == declared


def test_scores_that_another_driver_replaces_meanwhile_are_read_with_their_own_manifest(store: Store):
    trial = record()
    commit_trial(store, trial, 9, 5)
    states = trial_states([trial], store)
    first = trial.evaluations[0].key
    manifest = store.manifest("evaluate", first)
    assert manifest is not None
    store.discard("evaluate", first, manifest["attempt"])
    assert [item.key for item in with_scores(states, store)[0].evaluations] == [trial.evaluations[1].key]
    commit_scores(store, first, right=2)
    (result,) = with_scores(states, store)
    assert result.evaluations[0].metrics["accuracy"] == 0.2
    assert result.evaluations[0].attempt != states[0].evaluations[0].attempt
