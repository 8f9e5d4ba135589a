"""sweeps/theory.py at its smallest: what an analysis computes once, keeps, shows and refuses."""

import json

import pytest
from pyarrow import parquet

from orchestrator.store.artifacts import Store
from orchestrator.store.gc import garbage, kept_artifacts
from sweeps import theory
from tests.sweep_runs import artifacts, run_analysis

SMALL = (
    "--betas",
    "0.1",
    "--deltas",
    "0.5",
    "--masses",
    "1e-6",
    "--seeds",
    "1",
    "--pairs",
    "6",
    "--width",
    "12",
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory") / "store"
    assert run_analysis(theory, folder, *SMALL) == 0
    return folder


def test_both_theorems_hold(storage):
    ((_, folder),) = artifacts(storage).items()
    results = json.loads((folder / "results.json").read_text())
    assert results["theorem_1_points_above_bound"] == 0
    assert results["theorem_1_largest_margin_error"] < 1e-9
    assert results["im_rm_largest_unseen_difference"] == 0
    assert results["im_rm_unseen_accuracy"] == 0.5
    assert results["ex_rm_cosine"] > 0.999
    (point,) = parquet.read_table(folder / "theorem_1.parquet").to_pylist()
    assert point["log_correct"] < point["log_bound"] < 0


def test_the_report_holds_figures_tables_and_a_summary(storage):
    folder = storage / "sweeps" / "theory" / "report"
    assert {file.name for file in (folder / "figures").iterdir()} == {"theory.png", "theory.svg"}
    assert "of pairs of unseen tokens the IM-RM ranks 0.500 right" in (folder / "summary.md").read_text()


def test_mlflow_shows_the_report(storage):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rmsweep")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("theory", "FINISHED")
    assert {"report/summary.md", "report/figures"} <= {
        item.path for item in client.list_artifacts(run.info.run_id, "report")
    }


def test_a_second_command_computes_nothing_and_another_parameter_only_its_own(storage, capfd):
    before = artifacts(storage)
    assert run_analysis(theory, storage, *SMALL) == 0
    assert "1 analyses, 1 complete" in capfd.readouterr().out
    assert artifacts(storage) == before
    assert run_analysis(theory, storage, "plan", *SMALL[:-1], "13", "--json") == 0
    (planned,) = json.loads(capfd.readouterr().out)
    assert planned["missing"] == ["analyse"]
    assert planned["key"] not in before


def test_gc_keeps_what_the_last_command_declared(storage):
    store = Store(storage)
    assert not [item for item in garbage(store, kept_artifacts(store)) if item.owner.startswith("analyse/")]
    assert [item.owner for item in garbage(store, frozenset())] == [
        f"analyse/{key}" for key in artifacts(storage)
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--betas", "0"), "--betas 0.0: give positive"),
        (("--deltas", "nan"), "--deltas nan: give positive"),
        (("--masses", "1"), "--masses 1.0: give probabilities"),
        (("--pairs", "0"), "give at least one"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_anything_is_computed(tmp_path, capfd, words, said):
    assert run_analysis(theory, tmp_path / "store", *words) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_report_of_nothing_is_a_hole(tmp_path):
    assert run_analysis(theory, tmp_path / "store", "report", *SMALL) == 3
