"""`status --watch` follows a driver to its end; `ui` says where runs are, and refuses a port that is taken."""

import dataclasses
import io
import socket
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cli import inspect
from orchestrator.cli.analyses import Analyses, AnalysisOptions, analyses_of_models
from orchestrator.cli.options import Options, Report
from orchestrator.cli.running import StateWriter
from orchestrator.cli.session import HOLES, Session
from orchestrator.report.studies import Study
from orchestrator.run.events import RowsLogged, Started
from orchestrator.spec.stages import AnalyseStage
from orchestrator.store.artifacts import WEIGHTS, Store
from orchestrator.store.records import write_declaration
from tests.orchestrator.sweep_samples import TINY_WORLD, commit_scores, commit_trial, declaration, record
from trainers.errors import SpecError


def session(store: Store, uri: str = "") -> tuple[Session, io.StringIO]:
    """An invocation, and what it prints."""
    said = io.StringIO()
    console = Console(file=said, width=160)
    place = {"store": store, "tracking_uri": uri, "folder": Path(), "console": console}
    return Session(options=Options(), sweep_name="demo", **place), said


def test_watching_says_each_change_and_ends_with_the_driver(store: Store, monkeypatch: pytest.MonkeyPatch):
    trial = record()
    commit_trial(store, trial, 9)
    write_declaration(declaration(trial), store)
    writer = StateWriter("demo", store, "driver-1", [], [trial.key])
    writer.on_event(Started(trial=trial.key))
    row = {"step": 1, "total": 4, "loss": 0.5, "pairs": 8, "step_s": 2.0}
    monkeypatch.setattr("orchestrator.cli.running.WRITE_EVERY_S", 0.0)
    changes = iter(
        [
            lambda: None,
            lambda: writer.on_event(RowsLogged(trial=trial.key, stage="train", rows=[row])),
            lambda: commit_scores(store, trial.evaluations[1].key, right=5),
            lambda: drivers.clear(),
        ]
    )
    drivers = {"driver-1": {}}
    monkeypatch.setattr(inspect, "live_drivers", lambda root: drivers)
    monkeypatch.setattr(inspect.time, "sleep", lambda seconds: next(changes)())
    watched, said = session(store)
    assert inspect.status(watched, watch=True) == 0
    tables = said.getvalue().split("demo in ")[1:]
    assert len(tables) == 3
    assert "1/2" in tables[0]
    assert "train 1/4" in tables[1]
    assert "0.5000" in tables[1]
    assert "complete" in tables[2]


def test_without_watch_a_running_sweep_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trial, store = record(), Store(tmp_path / "[old]")
    write_declaration(declaration(trial), store)
    StateWriter("demo", store, "driver-1", [], [trial.key])
    monkeypatch.setattr(inspect, "live_drivers", lambda root: {"driver-1": {}})
    asked, said = session(store)
    assert inspect.status(asked) == HOLES
    # The title is as wide as the table, and breaks where the folder is long.
    assert "".join(said.getvalue().split()).count("/[old]:running") == 1


def test_the_page_of_a_server_is_named_without_its_password(store: Store):
    asked, said = session(store, "https://user:word@host:8443")
    assert inspect.ui(asked, 5000) == 0
    assert "host:8443" in said.getvalue()
    assert "word" not in said.getvalue()


def test_a_port_that_is_taken_is_refused(store: Store):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SpecError, match=f"--port {port}"):
            inspect.ui(session(store, "sqlite:////nowhere.db")[0], port)


def test_status_says_where_weights_are(store: Store):
    done, lost = record(), record(seed=1)
    commit_trial(store, done, 9)
    with store.write(WEIGHTS, done.key) as attempt:
        (attempt.directory / "model").mkdir()
    write_declaration(declaration(done, lost), store)
    asked, said = session(store)
    inspect.status(asked, paths=True)
    weights = store.root / "artifacts" / WEIGHTS
    assert f"{weights}/{done.key}/{attempt.directory.name}\n" in said.getvalue()
    assert "not kept" in said.getvalue()


def test_a_table_that_would_be_empty_is_not_printed_but_explained(store: Store):
    trial = record()
    commit_trial(store, trial, 9)
    commit_scores(store, trial.evaluations[1].key, right=9)
    write_declaration(declaration(trial), store)
    write_declaration(dataclasses.replace(declaration(), sweep="other"), store)
    asked, said = session(store)
    assert inspect.report(asked, Report(ensemble=True, compare="other")) == 0
    assert "--ensemble: no model and reward type has two complete seeds" in said.getvalue()
    assert "Ensembles" not in said.getvalue()
    assert "demo and other share no model and seed" in said.getvalue()
    assert said.getvalue().count("┃ trained on") == 1


def test_a_report_of_missing_analyses_names_them_and_keeps_the_last_one(store: Store):
    summary = store.local_sweep_dir("demo") / "report" / "summary.md"
    summary.parent.mkdir(parents=True)
    summary.touch()
    stage = AnalyseStage(analysis="how far", version=1, compute=print, parameters=TINY_WORLD)
    asked, said = session(store)
    analyses = Analyses(options=AnalysisOptions, declare=lambda *_: [stage])
    assert analyses.run(AnalysisOptions(command=Report()), asked) == HOLES
    assert said.getvalue() == "missing: how far; `run` with the same flags computes it\n"
    assert summary.is_file()


def test_a_study_of_one_model_twice_is_refused(store: Store):
    study = analyses_of_models(Study(name="how far", version=1, find=print))
    with pytest.raises(SpecError, match="--models: two have the same name"):
        study.declare(study.options(models=("llama-64", "llama-64")), session(store)[0])
