"""The MLflow view, on an embedded database and on a real server: complete, and the same however often it is written."""

import itertools
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from pyarrow import parquet

from orchestrator.cli.running import StateWriter
from orchestrator.report.page import said_conclusions, write_full_report
from orchestrator.report.results import CURVE_POINTS, CURVES, TrialResult, thinned
from orchestrator.report.summary import Written
from orchestrator.run.events import Failed
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import evict_weights
from orchestrator.store.leases import heartbeat
from orchestrator.store.records import (
    Declaration,
    SweepState,
    TrialNote,
    TrialRecord,
    read_state,
    write_declaration,
    write_state,
)
from orchestrator.tracking import mlflow
from orchestrator.tracking.database import EXPERIMENT, default_uri
from orchestrator.tracking.mlflow import SHOWN, Tracker, is_shown, sync
from orchestrator.tracking.view import MARK_TAG, View
from tests.faults.tracking_server import free_port, runs_of, snapshot, tracking_server, without_sweep
from tests.orchestrator.sweep_samples import (
    commit_scores,
    commit_train,
    commit_trial,
    declaration,
    record,
    trial_result,
    with_parameters,
    write_report,
)
from trainers.errors import TrackingError
from trainers.storage import replace as replace_text

# MLflow's and SQLAlchemy's own deprecations are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("default")
STEPS = 250


@pytest.fixture(autouse=True)
def _no_writer_survives() -> Iterator[None]:
    """A writer that was given up ends before the next test."""
    yield
    for thread in threading.enumerate():
        if thread.name == "mlflow-writer":
            thread.join(60.0)
            assert not thread.is_alive()


@pytest.fixture
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own settings win over ours: no second try."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """A tracking server of its own."""
    with tracking_server(tmp_path_factory.mktemp("mlflow"), empty_database) as uri:
        yield uri


@pytest.fixture
def database(store: Store, empty_database: Path) -> str:
    """The URI of an empty database in the store's root."""
    store.root.mkdir(parents=True)
    shutil.copy(empty_database, store.root / "mlflow.db")
    return default_uri(store)


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    """Both kinds of places to write to."""
    return str(request.getfixturevalue("database" if request.param == "sqlite" else "server"))


@pytest.fixture
def sweep_name(request: pytest.FixtureRequest) -> str:
    """One name per test, as tests share the server."""
    return re.sub(r"\W+", "_", request.node.name)


def two_trials(store: Store) -> tuple[TrialRecord, TrialRecord]:
    explicit, implicit = record(), record(reward="im_rm", beta=0.01)
    commit_trial(store, explicit, 9, 5, steps=STEPS)
    commit_trial(store, implicit, 8, 4)
    return explicit, implicit


def failed(store: Store, key: str) -> None:
    """What the driver notes of a trial that has failed."""
    state = StateWriter("demo", store, "", [], [key])
    state.on_event(Failed(trial=key, cause="Diverged", message="loss is nan"))
    state.close()


def sync_all(uri: str, store: Store, declared: Declaration) -> None:
    sync(uri, store, declared, write_report(declared, store))


def test_a_sweep_is_one_parent_and_a_child_per_trial(uri: str, store: Store, sweep_name: str):
    explicit, implicit = two_trials(store)
    sync_all(uri, store, declaration(explicit, implicit, name=sweep_name))
    parent, first, second = snapshot(uri, sweep_name)
    assert (parent["name"], parent["status"], parent["parent"]) == (sweep_name, "FINISHED", None)
    assert parent["tags"] == {"rmsweep.sweep": sweep_name, "rmsweep.role": "sweep"}
    for child, trial in ((first, explicit), (second, implicit)):
        # What the trials differ in stands first.
        name = f"{trial.reward} · llama-64 · tiny_world · s0"
        assert (child["name"], child["status"], child["parent"]) == (name, "FINISHED", sweep_name)
        assert child["tags"] == {
            "rmsweep.sweep": sweep_name,
            "rmsweep.role": "trial",
            "rmsweep.key": trial.key,
            "rmsweep.weights": "not kept",
            MARK_TAG: child["tags"][MARK_TAG],
        }
        assert child["params"] == {name: str(value) for name, value in trial.parameters.items()}


def test_a_run_holds_metrics_curves_inputs_and_the_parent_the_report(uri: str, store: Store, sweep_name: str):
    explicit, implicit = two_trials(store)
    sync_all(uri, store, declaration(explicit, implicit, name=sweep_name))
    parent, first, second = snapshot(uri, sweep_name)
    last = {name: points[-1][2] for name, points in first["history"].items()}
    assert last["eval/tiny_world/accuracy"] == 0.9
    assert last["eval/hamiltonian/accuracy"] == 0.5
    assert last["category/in-distribution/accuracy"] == 0.9
    assert last["category/domain-shift/accuracy"] == 0.5
    assert last["perf/pairs_per_s"] == 10.0
    for name in ("accuracy", "loss", "abs_margin"):
        assert f"eval/hamiltonian/{name}" in last
    assert len(last) < 60
    for name in ("loss", "accuracy", "margin", "grad_norm", "lr"):
        points = first["history"][f"train/{name}"]
        assert len(points) == CURVE_POINTS
        assert (points[0][0], points[-1][0]) == (1, STEPS)
        assert len(second["history"][f"train/{name}"]) == 3
    assert first["history"]["train/loss"][-1] == (STEPS, 1_700_000_000_000 + 1000 * STEPS, 1.0 / STEPS)
    assert first["inputs"] == [
        ("hamiltonian", "1" * 32, "evaluation"),
        ("tiny_world", "0" * 32, "evaluation"),
        ("tiny_world", "d" * 32, "training"),
    ]
    assert {"report/summary.md", "report/report.html"} <= set(parent["files"])
    assert first["files"] == second["files"] == ["config.json", "scores.parquet"]


def test_the_page_and_its_figures_are_artifacts_of_the_parent(database: str, store: Store):
    commit_trial(store, record(), 9, 5)
    declared = declaration(record())
    written = write_report(declared, store)
    folder = written.folder
    for name in ("report.html", "figures/margins.svg", "compare-other/compare.html"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("<p>")
    sync(database, store, declared, written)
    files = snapshot(database, "demo")[0]["files"]
    assert {"report/report.html", "report/figures/margins.svg", "report/compare-other/compare.html"} <= set(
        files
    )


def test_a_run_keeps_its_trial_s_record_and_every_score(database: str, store: Store):
    secret = "hf_" + "a" * 34
    trial = with_parameters(record(), note=f"https://user:word@host/{secret}")
    commit_trial(store, trial, 9, 5)
    sync_all(database, store, declaration(trial))
    run = runs_of(database, "demo")[-1]
    folder = Path(MlflowClient(tracking_uri=database).download_artifacts(run.info.run_id, ""))
    config = json.loads((folder / "config.json").read_text())
    assert (config["key"], config["parameters"]["lr"]) == (trial.key, 1e-4)
    assert [item["key"] for item in config["evaluations"]] == [item.key for item in trial.evaluations]
    assert secret not in (folder / "config.json").read_text()
    scores = parquet.read_table(folder / "scores.parquet").to_pandas()
    right = (scores.chosen_reward > scores.rejected_reward).groupby(scores.dataset).sum()
    assert dict(right) == {"tiny_world": 9, "hamiltonian": 5}


def test_a_filter_of_the_page_finds_a_reward_type(database: str, store: Store):
    sync_all(database, store, declaration(*two_trials(store)))
    client = MlflowClient(tracking_uri=database)
    (experiment,) = [item for item in client.search_experiments() if item.name == EXPERIMENT]
    found = client.search_runs([experiment.experiment_id], 'params.reward = "im_rm"')
    assert [run.info.run_name for run in found] == ["im_rm · llama-64 · tiny_world · s0"]


def test_a_sweep_lasts_from_its_first_stage_to_its_last_however_often_it_is_looked_at(
    uri: str, store: Store, sweep_name: str
):
    declared = declaration(*two_trials(store), name=sweep_name)
    written = write_report(declared, store)
    sync(uri, store, declared, written)
    (parent, *_) = runs_of(uri, sweep_name)
    begun = min(result.started for result in written.results)
    ended = max(result.finished for result in written.results)
    assert (parent.info.start_time, parent.info.end_time) == (round(begun * 1000), round(ended * 1000))
    time.sleep(0.05)
    (written.folder / "note.txt").write_text("another report")
    assert Tracker(uri, store, declared).close(written, complete=True) is None
    sync(uri, store, declared, written)
    assert runs_of(uri, sweep_name)[0].info.end_time == parent.info.end_time


def test_the_sweep_s_run_says_what_the_report_concludes(database: str, store: Store):
    declared = declaration(*two_trials(store))
    written = write_full_report(declared, store)
    sync(database, store, declared, written)
    said = runs_of(database, "demo")[0].data.tags["mlflow.note.content"]
    assert said.startswith("In accuracy (95 % intervals over ")
    assert said.split("\n\n") == said_conclusions(written.folder)


def test_the_experiment_is_of_the_kind_that_trains_models(database: str, store: Store):
    sync_all(database, store, declaration(*two_trials(store)))
    experiment = MlflowClient(tracking_uri=database).get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def models_of(uri: str) -> list[LoggedModel]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return list(client.search_logged_models([experiment.experiment_id]))


def test_a_trained_trial_is_a_logged_model_with_its_place_parameters_and_metrics(database: str, store: Store):
    explicit, implicit = two_trials(store)
    waiting = record(seed=1)
    with store.write("weights", explicit.key) as attempt:
        (attempt.directory / "model.safetensors").write_bytes(b"weights")
    declared = declaration(explicit, implicit, waiting)
    sync_all(database, store, declared)
    by_run = {item.source_run_id: item for item in models_of(database)}
    runs = {run.data.tags.get("rmsweep.key"): run for run in runs_of(database, "demo")}
    assert set(by_run) == {runs[explicit.key].info.run_id, runs[implicit.key].info.run_id}
    model = by_run[runs[explicit.key].info.run_id]
    assert (model.name, model.status) == ("ex_rm · s0 · llama-64 · tiny_world", "READY")
    assert model.params == {name: str(value) for name, value in explicit.parameters.items()}
    assert {"eval/tiny_world/accuracy": 0.9, "eval/hamiltonian/accuracy": 0.5}.items() <= {
        metric.key: metric.value for metric in model.metrics
    }.items()
    assert not [metric.key for metric in model.metrics if metric.key.startswith("train/")]
    place = Path(model.tags["rmsweep.weights"])
    assert (
        place == Path(runs[explicit.key].data.tags["rmsweep.weights"]) == store.read("weights", explicit.key)
    )
    assert runs[explicit.key].outputs.model_outputs[0].model_id == model.model_id
    evict_weights(store, "demo", [explicit.key])
    commit_trial(store, waiting, 7, 7)
    for _ in range(2):
        sync_all(database, store, declared)
        assert len(models_of(database)) == 3
        assert {item.tags["rmsweep.weights"] for item in models_of(database)} == {"not kept"}


def test_a_sweep_that_grows_renames_its_runs(database: str, store: Store):
    explicit, implicit = two_trials(store)
    sync_all(database, store, declaration(explicit))
    assert [run["name"] for run in snapshot(database, "demo")[1:]] == ["llama-64 · ex_rm · tiny_world · s0"]
    sync_all(database, store, declaration(explicit, implicit))
    assert sorted(run["name"] for run in snapshot(database, "demo")[1:]) == [
        "ex_rm · llama-64 · tiny_world · s0",
        "im_rm · llama-64 · tiny_world · s0",
    ]


def test_the_sweep_s_run_has_the_mean_accuracies_of_each_reward_type(database: str, store: Store):
    unlearned = record(seed=2)
    commit_trial(store, unlearned, 1, 1, accuracy=0.5)
    sync_all(database, store, declaration(*two_trials(store), record(seed=1), unlearned))
    last = {name: points[-1][2] for name, points in snapshot(database, "demo")[0]["history"].items()}
    assert last == {
        "trials/declared": 4.0,
        "trials/complete": 3.0,
        "category/in-distribution/accuracy/ex_rm": 0.9,
        "category/in-distribution/accuracy/im_rm": 0.8,
        "category/domain-shift/accuracy/ex_rm": 0.5,
        "category/domain-shift/accuracy/im_rm": 0.4,
    }


def test_data_sets_have_the_columns_of_their_rows(database: str, store: Store):
    sync_all(database, store, declaration(*two_trials(store)))
    for item in runs_of(database, "demo")[-1].inputs.dataset_inputs:
        columns = json.loads(item.dataset.schema)["mlflow_colspec"]
        assert [column["name"] for column in columns] == ["prompt", "chosen", "rejected"]


def test_no_metric_has_a_space_in_its_name(database: str, store: Store):
    sync_all(database, store, declaration(*two_trials(store)))
    for run in snapshot(database, "demo")[1:]:
        assert not [name for name in run["history"] if " " in name]


def test_syncing_twice_changes_nothing(uri: str, store: Store, sweep_name: str):
    declared = declaration(*two_trials(store), name=sweep_name)
    sync_all(uri, store, declared)
    before = snapshot(uri, sweep_name)
    sync_all(uri, store, declared)
    assert snapshot(uri, sweep_name) == before
    assert len(before) == 3


@pytest.fixture
def requests_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every request that changes a run, in order."""
    made: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        request = getattr(MlflowClient, name)

        def note(*arguments: Any, **named: Any) -> Any:
            made.append(name)
            return request(*arguments, **named)

        return note

    for name in ("create_run", "log_batch", "log_inputs", "log_artifacts", "set_terminated", "set_tag"):
        monkeypatch.setattr(MlflowClient, name, noting(name))
    return made


def test_sync_asks_once_for_each_part_of_a_run_and_leaves_a_whole_run_alone(
    database: str, store: Store, requests_of: list[str]
):
    explicit, implicit = two_trials(store)
    sync_all(database, store, declaration(explicit, implicit))
    of_a_run = [
        "create_run",
        "log_batch",
        "log_inputs",
        "log_artifacts",
        *["log_batch"] * 2,
        "set_terminated",
    ]
    report = ["log_artifacts", "log_batch", "set_tag"]
    assert requests_of == ["create_run", *of_a_run, *of_a_run, *report, "set_terminated"]
    requests_of.clear()
    evaluated = store.manifest("evaluate", implicit.evaluations[0].key)
    sync_all(database, store, declaration(explicit, implicit))
    assert requests_of == report, "whole runs are left alone"
    store.discard("evaluate", implicit.evaluations[0].key, evaluated["attempt"])
    commit_scores(store, implicit.evaluations[0].key, right=3)
    requests_of.clear()
    sync_all(database, store, declaration(explicit, implicit))
    assert requests_of.count("log_inputs") == 1, "only the run of the trial that has changed"
    (last,) = [run for run in snapshot(database, "demo") if run["tags"].get("rmsweep.key") == implicit.key]
    assert last["history"]["eval/tiny_world/accuracy"][-1][2] == 0.3


def test_a_run_that_was_left_in_the_middle_is_made_whole(
    database: str, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """As by a server that ends between two requests: what is there already is taken for what it is."""
    trial = record()
    commit_trial(store, trial, 9, 5)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sync_all(database, store, declaration(trial))
    assert snapshot(database, "demo")[-1]["history"] == {}
    sync_all(database, store, declaration(trial))
    child = snapshot(database, "demo")[-1]
    assert (child["status"], child["history"]["eval/hamiltonian/accuracy"][0][2]) == ("FINISHED", 0.5)


def test_a_trial_that_the_driver_noted_as_failed_stays_failed_after_sync(database: str, store: Store):
    broken, waiting = record(), record(seed=1)
    failed(store, broken.key)
    for _ in range(2):
        sync_all(database, store, declaration(broken, waiting))
        assert [run["status"] for run in snapshot(database, "demo")] == ["FAILED", "FAILED", "RUNNING"]
    with heartbeat(store.root) as leases:
        notes = read_state("demo", store).trials
        write_state("demo", store, SweepState(driver=leases.driver, trials=notes))
        sync_all(database, store, declaration(broken, waiting))
        assert [run["status"] for run in snapshot(database, "demo")] == ["RUNNING", "FAILED", "RUNNING"]


def test_the_tracker_ends_where_sync_ends(uri: str, store: Store, sweep_name: str):
    explicit, implicit = record(), record(reward="im_rm", beta=0.01)
    followed = declaration(explicit, implicit, name=f"{sweep_name}_followed")
    tracker = Tracker(uri, store, followed)
    for trial in followed.trials:
        tracker.note(trial.key)
    deadline = time.monotonic() + 30.0
    while sum("epochs" in run.data.params for run in runs_of(uri, followed.sweep)) < 2:
        assert time.monotonic() < deadline, "the trials that were started do not appear"
        time.sleep(0.1)
    two_trials(store)
    for trial in followed.trials:
        tracker.note(trial.key)
    assert tracker.close(write_report(followed, store), complete=True) is None
    rebuilt = replace(followed, sweep=f"{sweep_name}_rebuilt")
    sync_all(uri, store, rebuilt)
    assert without_sweep(snapshot(uri, followed.sweep)) == without_sweep(snapshot(uri, rebuilt.sweep))


def test_a_run_is_seen_while_its_trial_runs(database: str, store: Store):
    trial = record()
    tracker = Tracker(database, store, declaration(trial))
    tracker.note(trial.key)
    assert tracker.close() is None
    parent, child = snapshot(database, "demo")
    assert (parent["status"], child["status"]) == ("RUNNING", "RUNNING")
    assert child["params"]["model"] == "llama-64"
    assert child["history"] == {}


def test_a_failed_trial_is_failed_and_reopened_by_its_retry(database: str, store: Store):
    trial = record()
    commit_train(store, trial.key)
    declared = declaration(trial)
    tracker = Tracker(database, store, declared)
    tracker.note(trial.key)
    failed(store, trial.key)
    tracker.note(trial.key)
    assert tracker.close(write_report(declared, store), complete=False) is None
    parent, child = snapshot(database, "demo")
    assert (parent["status"], child["status"]) == ("FAILED", "FAILED")
    commit_trial(store, trial, 9, 5)
    sync_all(database, store, declared)
    parent, child = snapshot(database, "demo")
    assert (parent["status"], child["status"]) == ("FINISHED", "FINISHED")


def test_an_incomplete_sweep_is_not_finished(database: str, store: Store):
    done, untouched = record(), record(seed=1)
    commit_trial(store, done, 9, 5)
    sync_all(database, store, declaration(done, untouched))
    parent, first, second = snapshot(database, "demo")
    assert parent["status"] != "FINISHED"
    assert first["status"] == "FINISHED"
    assert second["status"] != "FINISHED"
    assert second["history"] == {}


def test_a_later_evaluation_adds_no_second_point_to_an_earlier_one(database: str, store: Store):
    trial = record()
    commit_trial(store, trial, 9)
    sync_all(database, store, declaration(trial))
    time.sleep(0.05)
    commit_scores(store, trial.evaluations[1].key, right=5)
    sync_all(database, store, declaration(trial))
    _, child = snapshot(database, "demo")
    counts = {
        name: len(points) for name, points in child["history"].items() if name.startswith(("eval/", "perf/"))
    }
    assert "eval/hamiltonian/accuracy" in counts
    assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize(
    ("name", "before", "after"), [("max_eval_pairs", 20, 40), ("model_source", "/old/place", "/new/place")]
)
def test_what_is_in_no_training_key_may_change_and_the_run_stays(
    name: str, before: Any, after: Any, database: str, store: Store
):
    trial = with_parameters(record(), **{name: before})
    commit_trial(store, trial, 9, 5)
    for changed in (trial, with_parameters(trial, **{name: after})):
        sync_all(database, store, declaration(changed))
    _, run = snapshot(database, "demo")
    assert run["tags"][f"rmsweep.{name}"] == str(after)


def test_one_trial_in_two_sweeps_is_a_run_in_each(database: str, store: Store):
    trial = record()
    commit_trial(store, trial, 9, 5)
    for name in ("one", "two"):
        sync_all(database, store, declaration(trial, name=name))
    assert [run["name"] for run in snapshot(database, "one")] == ["one", trial.name]
    assert [run["name"] for run in snapshot(database, "two")] == ["two", trial.name]


def test_two_drivers_of_a_sweep_share_its_runs(database: str, store: Store):
    trial = record()
    views = [View(database, store, declaration(trial)) for _ in range(2)]
    for view in views:
        view.log_trial(trial_result(trial, store), failed=False)
    assert [run["name"] for run in snapshot(database, "demo")] == ["demo", trial.name]


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def test_sync_to_where_nobody_listens_raises_and_says_what_to_check(nobody: str, store: Store):
    with pytest.raises(TrackingError, match="--tracking-uri") as raised:
        sync_all(nobody, store, declaration(*two_trials(store)))
    assert nobody in str(raised.value)


@pytest.mark.parametrize(
    "uri", ["nonsense://host", "sqlite:///{file}/mlflow.db"], ids=["scheme", "unwritable"]
)
def test_sync_to_what_cannot_be_written_raises_a_tracking_error(uri: str, store: Store, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TrackingError, match="--tracking-uri"):
        sync_all(uri.format(file=tmp_path / "file"), store, declaration(*two_trials(store)))


@pytest.mark.usefixtures("_little_patience")
def test_a_tracker_that_reaches_nobody_stops_nothing_and_says_why(nobody: str, store: Store):
    trials = two_trials(store)
    tracker = Tracker(nobody, store, declaration(*trials))
    before = time.monotonic()
    for trial in trials:
        tracker.note(trial.key)
        tracker.note(trial.key)
    assert time.monotonic() - before < 3.0, "calls wait for the server"
    assert "refused" in tracker.close()
    assert time.monotonic() - before < 100.0


def test_a_tracker_that_reaches_nobody_does_not_try_anew_for_every_trial(nobody: str, store: Store):
    """With MLflow's retries one try takes seconds: a grid of trials must not take as many times that."""
    trials = [record(seed=seed) for seed in range(5)]
    tracker = Tracker(nobody, store, declaration(*trials))
    for trial in trials:
        tracker.note(trial.key)
    assert "refused" in tracker.close(timeout_s=12.0)


@pytest.mark.usefixtures("_little_patience")
def test_a_tracker_whose_server_never_answers_gives_up_in_time(store: Store):
    """A server that takes the connection and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracker = Tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", store, declaration(record()))
        tracker.note(record().key)
        before = time.monotonic()
        assert "within 1 s" in tracker.close(timeout_s=1.0)
        assert time.monotonic() - before < 20.0


def test_a_report_that_a_killed_driver_did_not_come_to_is_owed(database: str, store: Store):
    trial, _ = two_trials(store)
    killed = Tracker(database, store, declaration(trial))
    killed.note(trial.key)
    assert killed.close() is None
    written = write_report(declaration(trial), store)
    assert not is_shown(database, store, "demo")
    assert Tracker(database, store, declaration(trial)).close(written, complete=True) is None
    assert is_shown(database, store, "demo")


def test_a_whole_view_is_incomplete_when_scores_come_or_a_trial_begins(database: str, store: Store):
    trial = record()
    commit_trial(store, trial, 9)
    declared = declaration(trial)

    def shown() -> bool:
        write_report(declared, store)
        return is_shown(database, store, "demo")

    assert not shown(), "a sweep that no command has shown"
    sync_all(database, store, declared)
    assert shown()
    commit_scores(store, trial.evaluations[1].key, right=5)
    assert not shown()
    sync_all(database, store, declared)
    assert shown()
    tracker = Tracker(database, store, declared)
    tracker.note(trial.key)
    assert tracker.close() is None
    assert not shown()


def rows_of(first: int, last: int, total: int, *, begun: float) -> list[dict[str, Any]]:
    """Rows of a training's steps, as it reports them."""
    return [
        {
            **dict.fromkeys(CURVES, 1.0 / at),
            "step": float(at),
            "time": begun + at,
            "epoch": 0.0,
            "total": total,
        }
        for at in range(first, last + 1)
    ]


def test_a_running_training_shows_its_curve_live_and_each_step_once(database: str, store: Store):
    trial, total, begun = record(), 250, 1_700_000_000.0

    def loss(*batches: list[dict[str, Any]]) -> dict[int, int]:
        """Step → number of points, once a driver has noted these rows."""
        tracker = Tracker(database, store, declaration(trial))
        for rows in ([], *batches):
            tracker.note(trial.key, rows)
        assert tracker.close() is None
        points = [step for step, _, _ in snapshot(database, "demo")[1]["history"].get("train/loss", [])]
        return {step: points.count(step) for step in points}

    assert loss() == {}
    early = loss(rows_of(1, 60, total, begun=begun), rows_of(61, 100, total, begun=begun))
    assert (min(early), max(early), len(early)) == (1, 99, 40)
    # The next driver's training goes on from a checkpoint, half-written ones aside, and does steps again.
    folder = store.root / "checkpoints" / trial.key
    folder.mkdir(parents=True)
    log = rows_of(1, 110, total, begun=begun)
    (folder / "step110.json").write_text(json.dumps({"step": 110, "total": total, "log": log}))
    (folder / "step150.json").write_text('{"step": 150, "tot')
    resumed = loss(rows_of(80, 120, total, begun=begun + 1000.0))
    assert (max(resumed), set(resumed.values())) == (119, {1})
    commit_train(store, trial.key, steps=total)
    late = loss()
    assert set(early) <= set(resumed) <= set(late)
    assert (len(late), max(late), set(late.values())) == (CURVE_POINTS, total, {1})


def test_a_tracker_with_nothing_to_say_says_nothing(nobody: str, store: Store):
    assert Tracker(nobody, store, declaration(record())).close() is None


class FakeView:
    """A view that passes on whether a trial that it is told of has failed; `told` may wait."""

    def __init__(self, told: Callable[[bool], None]) -> None:
        self._told = told

    def begin(self) -> None:
        pass

    def log_trial(self, result: TrialResult, live: object, *, failed: bool) -> None:
        self._told(failed)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a view was opened, on a server that refuses each time."""
    tries: list[float] = []

    def refuse(*arguments: object) -> None:
        tries.append(time.monotonic())
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(mlflow, "View", refuse)
    return tries


def test_a_server_that_fails_is_tried_again_after_a_pause_and_warned_of_once(
    store: Store, tries: list[float], caplog: pytest.LogCaptureFixture
):
    tracker = Tracker("http://host", store, declaration(record()), every_s=0.01, again_s=0.2)
    began = time.monotonic()
    tracker.note(record().key)
    while len(tries) < 5:
        assert time.monotonic() - began < 60.0, tries
        time.sleep(0.02)
    tracker.close()
    assert min(later - earlier for earlier, later in itertools.pairwise(tries[:5])) >= 0.2
    assert len([said for said in caplog.messages if "to be tried again" in said]) == 1


def test_close_tries_once_more_and_waits_for_no_pause(store: Store, tries: list[float]):
    tracker = Tracker("http://host", store, declaration(record()), every_s=0.01)
    tracker.note(record().key)
    while not tries:
        time.sleep(0.02)
    before = time.monotonic()
    assert tracker.close() == "http://host: ConnectionRefusedError: refused"
    assert time.monotonic() - before < 10.0
    assert len(tries) == 2


def test_what_is_said_of_a_trial_while_it_is_being_logged_is_logged_as_well(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    told: list[bool] = []
    entered, go_on = threading.Event(), threading.Event()

    def wait(has_failed: bool) -> None:
        told.append(has_failed)
        entered.set()
        go_on.wait(10.0)

    monkeypatch.setattr(mlflow, "View", lambda *arguments: FakeView(wait))
    tracker = Tracker("http://host", store, declaration(record()), every_s=0.01)
    tracker.note(record().key)
    assert entered.wait(10.0)
    failed(store, record().key)
    tracker.note(record().key)
    tracker.note(record().key)
    go_on.set()
    assert tracker.close() is None
    assert told == [False, True], "the last word alone counts"


def test_one_trial_that_cannot_be_logged_keeps_no_other_from_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    broken, sound = record(), record(seed=1)
    told: list[str] = []

    class Refusing(FakeView):
        def log_trial(self, result: TrialResult, live: object, *, failed: bool) -> None:
            if result.record.key == broken.key:
                raise OSError("its artifact is damaged")
            told.append(result.record.key)

    monkeypatch.setattr(mlflow, "View", lambda *arguments: Refusing(lambda failed: None))
    tracker = Tracker("http://host", store, declaration(broken, sound))
    tracker.note(broken.key)
    tracker.note(sound.key)
    assert tracker.close() == "http://host: OSError: its artifact is damaged"
    assert told == [sound.key]


@pytest.mark.parametrize("content", ["", "[]", '{"http://host": 3}', '{"http://host": [3]}'])
def test_a_damaged_note_of_what_was_shown_is_none(content: str, nobody: str, store: Store):
    replace_text(store.sweep_dir("demo") / SHOWN, content)
    assert not is_shown("http://host", store, "demo")
    assert Tracker(nobody, store, declaration(record())).close() is None


@pytest.mark.parametrize("done", [1, 60, 100, 101, 400, 999, 1000])
def test_the_points_of_an_unfinished_curve_are_among_those_of_the_finished_one(done: int):
    rows = [{"step": float(step)} for step in range(1, 1001)]
    early, late = thinned(rows[:done], 1000, 100), thinned(rows, 1000, 100)
    assert early == [row for row in late if row["step"] <= done]
    assert early[0]["step"] == 1


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 250, 10_000])
def test_a_curve_is_thinned_evenly_and_keeps_its_ends(count: int):
    rows = [{"step": float(step)} for step in range(1, count + 1)]
    kept = thinned(rows, count, 100)
    assert len(kept) == min(count, 100)
    assert kept[:1] == rows[:1]
    assert kept[-1:] == rows[-1:]
    steps = [row["step"] for row in kept]
    assert steps == sorted(set(steps))


def test_a_report_that_was_written_anew_is_shown_and_a_sweep_that_has_ended_stays_ended(
    database: str, store: Store
):
    done, failed = record(), record(seed=1)
    commit_trial(store, done, 9, 5)
    declared = declaration(done, failed)
    write_declaration(declared, store)

    def written(cause: str) -> Written:
        note = TrialNote(state="failed", cause="Diverged", message=cause)
        write_state("demo", store, SweepState(trials={failed.key: note}))
        with mock.patch("orchestrator.report.page.every_figure", return_value=()):
            return write_full_report(declared, store)

    first = written("it diverged")
    sync(database, store, declared, first)
    assert is_shown(database, store, "demo")
    assert snapshot(database, "demo")[0]["status"] == "FAILED"
    written("it diverged again")
    assert not is_shown(database, store, "demo")
