"""sweeps/theory.py at its smallest: what an analysis computes once, keeps, shows and refuses."""

import json
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from pyarrow import parquet

from orchestrator.store.artifacts import Store
from orchestrator.store.gc import garbage, kept_artifacts
from sweeps import theory
from tests.sweep_runs import artifacts, run_analysis

SMALL = theory.Parameters(betas=(0.1,), deltas=(0.5,), masses=(1e-6,), seeds=(1,), pairs=6, width=12)


@pytest.fixture(autouse=True, scope="module")
def storage(tmp_path_factory):
    """The storage of the analysis with the smallest parameters, which stand in the place of the usual ones."""
    folder = tmp_path_factory.mktemp("theory") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory, "Parameters", lambda: SMALL)
        assert run_analysis(theory, folder) == 0
        yield folder


def test_both_theorems_hold_and_the_report_and_mlflow_show_it(storage):
    (folder,) = artifacts(storage).values()
    results = json.loads((folder / "results.json").read_text())
    assert results["theorem_1_points_above_bound"] == 0
    assert results["theorem_1_largest_margin_error"] < 1e-9
    assert results["im_rm_largest_unseen_difference"] == 0
    assert results["im_rm_unseen_accuracy"] == 0.5
    assert results["ex_rm_cosine"] > 0.999
    report = storage / "sweeps" / "theory" / "report"
    (point,) = parquet.read_table(report / "theorem_1.parquet").to_pylist()
    assert point["log_correct"] < point["log_bound"] < 0
    assert "of pairs of unseen tokens the IM-RM ranks 0.500 right" in (report / "summary.md").read_text()
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rmsweep").experiment_id])
    assert (run.info.run_name, run.info.status) == ("theory", "FINISHED")
    assert "report/summary.md" in {item.path for item in client.list_artifacts(run.info.run_id, "report")}


def test_a_second_command_computes_nothing_and_another_parameter_only_its_own(storage, capfd, monkeypatch):
    before = artifacts(storage)
    assert run_analysis(theory, storage) == 0
    assert "1 analyses, 1 complete" in capfd.readouterr().out
    assert artifacts(storage) == before
    monkeypatch.setattr(theory, "Parameters", lambda: replace(SMALL, width=13))
    assert run_analysis(theory, storage, "plan", "--json") == 0
    (planned,) = json.loads(capfd.readouterr().out)
    assert planned["missing"] == ["analyse"]
    assert planned["key"] not in before


def test_gc_keeps_what_the_last_command_declared(storage):
    store = Store(storage)
    assert not [item for item in garbage(store, kept_artifacts(store)) if item.owner.startswith("analyse/")]
    assert [item.owner for item in garbage(store, frozenset())] == [
        f"analyse/{key}" for key in artifacts(storage)
    ]


def test_a_report_of_nothing_is_a_hole(tmp_path):
    assert run_analysis(theory, tmp_path / "store", "report") == 3
