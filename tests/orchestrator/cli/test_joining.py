"""When a run has to do with a Ray cluster: a sweep of which nothing is left to run joins none. No Ray here."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.load import Load, make_session
from benchmarks.load_stages import AT_ONCE, NoView, standing_in
from orchestrator.cli import run
from orchestrator.cli.session import Session
from orchestrator.store.artifacts import Store
from sweeps.full_grid import full_grid
from trainers.errors import StorageError

LOAD = Load(trials=2, sets=1, backend="inline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a sweep is complete, its models and data sets beside the store."""
    folder = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.tracking.mlflow.Tracker", NoView)
        patch.setattr(run, "cluster_address", lambda: None)
        session = make_session(LOAD, folder)
        with standing_in(AT_ONCE):
            assert run.run(session, full_grid) == 0, session.console.file.getvalue()
    return folder


@pytest.fixture
def complete(folder, tmp_path, monkeypatch) -> Session:
    """The same sweep on Ray, with a store of its own, where a cluster is up."""
    monkeypatch.setattr("orchestrator.tracking.mlflow.Tracker", NoView)
    monkeypatch.setattr(run, "cluster_address", lambda: "127.0.0.1:6379")
    shutil.copytree(folder / "store", tmp_path / "store")
    session = make_session(dataclasses.replace(LOAD, backend="ray"), folder)
    return dataclasses.replace(session, store=Store(tmp_path / "store"))


def refuse(*_: object):
    raise StorageError("joined")


def test_a_complete_sweep_has_nothing_to_do_with_a_cluster(complete, monkeypatch):
    # None in the place of a module is one that cannot be imported.
    monkeypatch.setitem(sys.modules, "orchestrator.run.ray.cluster", None)
    monkeypatch.delattr("orchestrator.run.ray.cluster", raising=False)
    assert run.run(complete, full_grid) == 0
    assert "all 2 trials are complete" in complete.console.file.getvalue()


def test_a_sweep_with_something_missing_or_damaged_joins(complete, monkeypatch):
    from orchestrator.run.ray import cluster

    monkeypatch.setattr(cluster, "join_ray", refuse)
    evaluated = next((complete.store.root / "artifacts" / "evaluate").glob("*/*/scores.parquet"))
    evaluated.write_bytes(b"half")
    with pytest.raises(StorageError, match="joined"):
        run.run(complete, full_grid)


def test_models_are_fetched_and_compiled_layers_are_a_switch_of_the_placement_and_in_no_key(
    tmp_path, monkeypatch
):
    seen, placements = [], []

    def stop(session, declared, todo, placed, done):
        seen.append("run")
        placements.append(placed)
        raise StorageError("enough")

    monkeypatch.setattr(run, "cluster_address", lambda: None)
    monkeypatch.setattr(run, "fetch_models_here", lambda session, todo: seen.append(len(todo)))
    monkeypatch.setattr(run, "run_missing", stop)
    session = make_session(LOAD, tmp_path)
    run.run(session, full_grid)
    options = dataclasses.replace(session.options, compile=True)
    run.run(dataclasses.replace(session, options=options), full_grid)
    assert seen == [LOAD.trials, "run"] * 2
    plain, compiled = placements
    assert {placed.compile for placed in plain.values()} == {False}
    assert {key: dataclasses.replace(placed, compile=True) for key, placed in plain.items()} == compiled
