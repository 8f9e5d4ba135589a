"""The audit of a sweep's data and the accuracies that length and leaks cannot lend: in report, table and view."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.cli.run import audit_errors
from orchestrator.report import audit as audits
from orchestrator.report.audit import audit_sweep
from orchestrator.report.comparison import Analysis
from orchestrator.report.studies import right_by_prompt
from orchestrator.spec.datasets import DatasetReader
from orchestrator.spec.stages import Split
from orchestrator.store.artifacts import Store
from orchestrator.store.records import EvaluationRecord, TrialRecord
from orchestrator.tracking.view import EVALUATION_METRICS, MOST_KEYS, final_points
from tests.orchestrator.sweep_samples import (
    commit_train,
    commit_trial,
    dataset_folder,
    declaration,
    record,
    rows,
    trial_result,
    write_report,
)

PAIRS = 40
LEAKED = 10


@pytest.fixture
def splits(store: Store, tmp_path: Path) -> dict[str, Split]:
    """A training split, an evaluation split of whose first ten prompts training has seen, and a rewriting of it."""
    train, test = rows(60, "seen"), rows(PAIRS, "new")
    for number in range(LEAKED):
        test[number]["prompt"] = train[number]["prompt"].upper()
    rewritten = [{**row, "chosen": "tout autre chose", "rejected": "rien de cela"} for row in test]
    specs = {
        "seen": dataset_folder(tmp_path / "seen", train=train, test=test),
        "rewritten": dataset_folder(tmp_path / "rewritten", test=rewritten),
    }
    reader = DatasetReader(store)
    return {
        "train": reader.split(specs["seen"], "train"),
        "test": reader.split(specs["seen"], "test"),
        "rewritten": reader.split(specs["rewritten"], "test"),
    }


def trial_on(splits: dict[str, Split], **labels: Any) -> TrialRecord:
    """A trial trained on `seen` and evaluated on its test split and on the rewriting of it."""
    trial = record(**labels)
    sets = (("seen", "test", "in-distribution"), ("rewritten", "rewritten", "token-level shift"))
    return dataclasses.replace(
        trial,
        train_set="seen",
        train_digest=splits["train"].digest,
        evaluations=tuple(
            EvaluationRecord(
                dataset=name,
                key=f"{trial.key}-{name}",
                category=category,
                dataset_digest=splits[which].digest,
            )
            for name, which, category in sets
        ),
    )


def commit_rewards(
    store: Store, key: str, margins: Sequence[float], longer: Sequence[int], index: Sequence[int] = ()
) -> None:
    """Scores of pairs with these margins, the chosen response being by so many tokens the longer one."""
    table = pa.table(
        {
            "dataset": ["set"] * len(margins),
            "index": list(index or range(len(margins))),
            "chosen_reward": [float(margin) for margin in margins],
            "rejected_reward": [0.0] * len(margins),
            "chosen_tokens": [50 + difference for difference in longer],
            "rejected_tokens": [50] * len(margins),
        }
    )
    with store.write("evaluate", key) as attempt:
        parquet.write_table(table, attempt.directory / "scores.parquet")


def commit_length_reward(store: Store, trial: TrialRecord) -> None:
    """A trial whose reward is minus the length on the first set, where 30 of 40 chosen responses are shorter."""
    commit_train(store, trial.key)
    longer = [-3] * 20 + [3] * 10 + [-3] * 10
    commit_rewards(store, trial.evaluations[0].key, [-x for x in longer], longer)
    # All leaked pairs right, all others wrong.
    margins = [1.0] * LEAKED + [-1.0] * (PAIRS - LEAKED)
    commit_rewards(store, trial.evaluations[1].key, margins, [0] * PAIRS)


def test_without_the_rows_in_the_store_nothing_is_said_of_leaks(store: Store, splits: dict[str, Split]):
    assert audits.leaked_rows(store, "absent", splits["test"].digest) is None
    commit_trial(store, record(), 9, 5)
    assert "accuracy_leak_free" not in trial_result(record(), store).evaluations[0].metrics
    assert not (store.root / "audits").exists()


def test_the_index_of_a_score_names_the_row_that_leaks(store: Store, splits: dict[str, Split]):
    """A draw keeps other rows in another order: of rows 39, 5 and 20 only 5 leaks."""
    trial = trial_on(splits)
    commit_train(store, trial.key)
    commit_rewards(store, trial.evaluations[0].key, [1.0, -1.0, 1.0], [0, 0, 0], index=[39, 5, 20])
    found = trial_result(trial, store).evaluations[0].metrics
    assert (found["accuracy_leak_free"], found["n_leak_free"]) == (1.0, 2.0)


def test_pairs_that_share_a_prompt_are_one_unit(store: Store, tmp_path: Path):
    """Ten questions, each with four answers beside the right one: forty pairs are no more than ten prompts."""
    ten = rows(10, "new")
    several = [{**row, "rejected": f"wrong {number}"} for number in range(4) for row in ten]
    test = dataset_folder(tmp_path / "seen", train=rows(60, "seen"), test=several)
    reader = DatasetReader(store)
    splits = {"train": reader.split(test, "train"), "test": reader.split(test, "test")}
    trial = trial_on({**splits, "rewritten": splits["test"]})
    trial = dataclasses.replace(trial, evaluations=trial.evaluations[:1])
    commit_train(store, trial.key)
    right = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    commit_rewards(store, trial.evaluations[0].key, list(np.tile(2 * right - 1, 4)), [0] * 40)
    analysis = Analysis([trial_result(trial, store)])
    (scope,) = analysis.categories()
    found = analysis.mean(scope, trial.reward, "accuracy")
    assert found.over == "40 pairs of 10 prompts of one training of this model"
    assert found.spread.variance == pytest.approx(right.var(ddof=1) / 10)
    assert right_by_prompt(analysis.results[0], "seen").tolist() == right.tolist()


def test_the_report_has_the_audit_and_all_accuracies(store: Store, splits: dict[str, Split]):
    trial = trial_on(splits)
    commit_length_reward(store, trial)
    folder = write_report(declaration(trial), store).folder
    said = json.loads((folder / "audit.json").read_text())
    assert [item["name"] for item in said["sets"]] == ["seen/train", "seen/test", "rewritten/test"]
    assert [item["leaked"] for item in said["between"]] == [[*range(LEAKED)]] * 2
    assert (said["findings"][0]["what"], said["findings"][0]["severity"]) == ("leak", "error")
    summary, page = ((folder / name).read_text() for name in ("summary.md", "report.html"))
    assert "10 of 40 pairs (prompts 10)" in page
    assert summary.index("accuracy by category") < summary.index("10 of 40 pairs (prompts 10)")
    assert (folder / "tables" / "audit_sets.csv").is_file()
    rows = parquet.read_table(folder / "tables" / "sets.parquet").to_pylist()
    columns = ("accuracy_length_controlled", "accuracy_leak_free", "n_leak_free", "longer_wins")
    (row,) = [item for item in rows if item["evaluation_set"] == "seen"]
    assert [row[name] for name in columns] == [0.5, pytest.approx(20 / 30), 30, 0.25]
    own = parquet.read_table(store.sweep_dir("demo") / "trials.parquet").to_pylist()
    assert [own[0][name] for name in columns] == [row[name] for name in columns]
    assert [own[1][name] for name in columns] == [0.25, 0.0, 30, 0.5]
    # The same is told before a run.
    lines = audit_errors(declaration(trial), store)
    assert [line.partition(":")[0] for line in lines] == ["data"] * 2
    assert "seen/test evaluated, seen/train trained on: 10 of 40 pairs" in lines[0]


def test_a_declared_rewriting_is_compared_with_the_originals_of_the_same_prompts(
    store: Store, splits: dict[str, Split]
):
    audit = audit_sweep(declaration(trial_on(splits)), store)
    rewritings = {item.name: item.rewriting for item in audit.sets}
    assert rewritings["seen/test"] is None
    found = rewritings["rewritten/test"]
    assert found is not None
    assert found.responses == 2 * PAIRS
    assert found.overlap < found.itself


def test_an_audit_is_made_once_per_content(
    store: Store, splits: dict[str, Split], monkeypatch: pytest.MonkeyPatch
):
    declared = declaration(trial_on(splits), trial_on(splits, seed=1))
    first = audit_sweep(declared, store)
    files = sorted((store.root / "audits").iterdir())
    # Three sets and two overlaps, whatever the number of trials.
    assert len(files) == 5
    monkeypatch.delattr(audits, "pairs_of")
    audits._train_index.cache_clear()
    assert audit_sweep(declared, Store(store.root)) == first


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"not json"])
def test_a_damaged_audit_is_made_again(store: Store, splits: dict[str, Split], damage: bytes):
    def leaked() -> list[int]:
        found = audits.leaked_rows(store, splits["train"].digest, splits["test"].digest)
        return [] if found is None else found.tolist()

    expected = leaked()
    (file,) = (store.root / "audits").iterdir()
    sound = file.read_bytes()
    file.write_bytes(damage)
    assert leaked() == expected
    assert file.read_bytes() == sound
    file.write_bytes(sound.replace(b"[0, 1, ", b"[0, 2, "))
    assert leaked() == expected, "a flipped row is noticed, too"


NOTED = {"pairs": 40, "too_long": 0, "identical": 0, "tokens": 1000, "unknown_tokens": 0}


def prepared_trial(store: Store, splits: dict[str, Split], model: str, **test: int) -> TrialRecord:
    """A trial whose two tests sets share one preparation, which noted `test` in the place of what is usual."""
    for key, noted in ((f"{model}-train", {}), (f"{model}-test", test)):
        with store.write("prepare", key) as attempt:
            attempt.info.update({**NOTED, **noted})
    trial = trial_on(splits, model=model)
    evaluations = tuple(dataclasses.replace(item, prepared=f"{model}-test") for item in trial.evaluations[:1])
    return dataclasses.replace(trial, evaluations=evaluations, prepared=f"{model}-train")


@pytest.mark.parametrize(
    ("noted", "severity", "what", "number"),
    [
        ({"identical": 1}, "warn", "chosen = rejected in tokens", "1 of 40 pairs"),
        ({"identical": 3}, "error", "chosen = rejected in tokens", "3 of 40 pairs"),
        ({"unknown_tokens": 51}, "error", "unknown tokens", "0.051 of 1000 tokens"),
        ({"unknown_tokens": 50}, "", "", ""),
    ],
)
def test_what_models_read_is_audited_once_for_all_of_which_it_is_the_same(
    store: Store, splits: dict[str, Split], noted: dict[str, int], severity: str, what: str, number: str
):
    trials = [prepared_trial(store, splits, model, **noted) for model in ("a", "b")]
    trials.append(prepared_trial(store, splits, "c"))
    audit = audit_sweep(declaration(*trials), store)
    found = [(item.severity, item.what, item.where, item.number) for item in audit.tokens]
    assert found == ([(severity, what, "seen/test, read by a, b", number)] if severity else [])
    assert set(audit.tokens) <= set(audit.findings)
    folder = write_report(declaration(*trials), store).folder
    said = (folder / "summary.md").read_text(), (folder / "audit.json").read_text()
    assert all((f"{what}" in text and "read by a, b" in text) == bool(severity) for text in said)
    errors = audit_errors(declaration(*trials), store)
    assert any("read by a, b" in line for line in errors) == (severity == "error")


def test_a_view_of_many_sets_keeps_the_most_telling_metrics_within_its_keys(store: Store):
    for count, kept in ((2, 5), (9, 5), (12, 3), (40, 1)):
        sets = [(f"set{number}", "domain shift") for number in range(count)]
        trial = record(seed=count, sets=sets)
        commit_train(store, trial.key)
        for item in trial.evaluations:
            commit_rewards(store, item.key, [1.0] * 4, [0] * 4)
        result = trial_result(trial, store)
        told = {name for name, *_ in final_points(result) if name.startswith("eval/set0/")}
        # Leaks are not known here.
        expected = set(EVALUATION_METRICS[:kept]) - {"accuracy_leak_free"}
        assert told == {f"eval/set0/{name}" for name in expected}
        assert count * kept <= MOST_KEYS
