"""What a run does before its trials. Nothing is trained, and no Ray is started."""

import dataclasses

from benchmarks.load import Load, make_session
from orchestrator.cli import run
from sweeps.full_grid import full_grid
from trainers.errors import StorageError

LOAD = Load(trials=2, sets=1, backend="inline")


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
