"""The MLflow view on an embedded database: complete, and the same however often it is written; its writer never waits.

tests/faults/test_tracking_server.py has the same on a real server, and its faults.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from pyarrow import parquet

from orchestrator.cli.running import StateWriter
from orchestrator.report.page import said_conclusions
from orchestrator.report.results import CURVE_POINTS, CURVES, TrialResult, thinned
from orchestrator.run.events import Failed
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import evict_weights
from orchestrator.store.leases import heartbeat
from orchestrator.store.records import Declaration, SweepState, TrialRecord, read_state, write_state
from orchestrator.tracking import mlflow
from orchestrator.tracking.database import EXPERIMENT, default_uri
from orchestrator.tracking.mlflow import SHOWN, Tracker, is_shown, sync
from orchestrator.tracking.view import MARK_TAG, View
from tests.faults.tracking_server import free_port, runs_of, snapshot, without_sweep
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


@pytest.fixture
def database(store: Store, empty_database: Path) -> str:
    """The URI of an empty database in the store's root."""
    store.root.mkdir(parents=True)
    shutil.copy(empty_database, store.root / "mlflow.db")
    return default_uri(store)


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


def statuses(uri: str) -> list[str]:
    return [run["status"] for run in snapshot(uri, "demo")]


def test_a_sweep_is_one_parent_with_its_report_and_a_child_per_trial_with_all_that_is_known_of_it(
    database: str, store: Store
):
    secret = "hf_" + "a" * 34
    explicit, implicit = two_trials(store)
    explicit = with_parameters(explicit, note=f"https://user:word@host/{secret}")
    with store.write("weights", explicit.key) as attempt:
        (attempt.directory / "model.safetensors").write_bytes(b"weights")
    declared = declaration(explicit, implicit)
    written = write_report(declared, store)
    pages = {"summary.md", "report.html", "figures/margins.svg", "compare-other/compare.html"}
    for name in pages:
        (written.folder / name).parent.mkdir(exist_ok=True)
        (written.folder / name).touch()
    sync(database, store, declared, written)
    client = MlflowClient(tracking_uri=database)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    found = client.search_runs([experiment.experiment_id], 'params.reward = "im_rm"')
    assert [run.info.run_name for run in found] == ["im_rm · llama-64 · tiny_world · s0"]
    parent, first, second = snapshot(database, "demo")
    assert (parent["name"], parent["status"], parent["parent"]) == ("demo", "FINISHED", None)
    assert parent["tags"] == {"rmsweep.sweep": "demo", "rmsweep.role": "sweep"}
    assert {f"report/{name}" for name in pages} <= set(parent["files"])
    said = runs_of(database, "demo")[0].data.tags["mlflow.note.content"]
    assert said.split("\n\n") == said_conclusions(written.folder) != []
    for child, trial in ((first, explicit), (second, implicit)):
        # What the trials differ in stands first.
        name = f"{trial.reward} · llama-64 · tiny_world · s0"
        assert (child["name"], child["status"], child["parent"]) == (name, "FINISHED", "demo")
        assert child["tags"] == {
            "rmsweep.sweep": "demo",
            "rmsweep.role": "trial",
            "rmsweep.key": trial.key,
            "rmsweep.weights": str(store.read("weights", trial.key)) if trial is explicit else "not kept",
            MARK_TAG: child["tags"][MARK_TAG],
        }
    assert secret not in str(first["params"])
    assert second["params"] == {name: str(value) for name, value in implicit.parameters.items()}
    last = {name: points[-1][2] for name, points in first["history"].items()}
    assert last["eval/tiny_world/accuracy"] == last["category/in-distribution/accuracy"] == 0.9
    assert last["eval/hamiltonian/accuracy"] == last["category/domain-shift/accuracy"] == 0.5
    assert last["perf/pairs_per_s"] == 10.0
    assert {"eval/hamiltonian/loss", "eval/hamiltonian/abs_margin"} < last.keys()
    assert len(last) < 60
    assert not [name for name in last if " " in name]
    assert first["inputs"] == [
        ("hamiltonian", "1" * 32, "evaluation"),
        ("tiny_world", "0" * 32, "evaluation"),
        ("tiny_world", "d" * 32, "training"),
    ]
    for item in runs_of(database, "demo")[-1].inputs.dataset_inputs:
        columns = json.loads(item.dataset.schema)["mlflow_colspec"]
        assert [column["name"] for column in columns] == ["prompt", "chosen", "rejected"]
    for name in ("loss", "accuracy", "margin", "grad_norm", "lr"):
        points = first["history"][f"train/{name}"]
        assert (len(points), points[0][0], points[-1][0]) == (CURVE_POINTS, 1, STEPS)
        assert len(second["history"][f"train/{name}"]) == 3
    assert first["history"]["train/loss"][-1] == (STEPS, 1_700_000_000_000 + 1000 * STEPS, 1.0 / STEPS)
    run = runs_of(database, "demo")[1]
    folder = Path(client.download_artifacts(run.info.run_id, ""))
    config = json.loads((folder / "config.json").read_text())
    assert (config["key"], config["parameters"]["lr"]) == (explicit.key, 1e-4)
    assert [item["key"] for item in config["evaluations"]] == [item.key for item in explicit.evaluations]
    assert secret not in (folder / "config.json").read_text()
    scores = parquet.read_table(folder / "scores.parquet").to_pandas()
    right = (scores.chosen_reward > scores.rejected_reward).groupby(scores.dataset).sum()
    assert dict(right) == {"tiny_world": 9, "hamiltonian": 5}


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


def test_a_sweep_that_grows_renames_its_runs_and_shows_the_means_that_hold_now(database: str, store: Store):
    worse, better = record(seed=1), record()
    commit_trial(store, worse, 1, 1)
    commit_trial(store, better, 9, 5)
    first = replace(better, evaluations=better.evaluations[1:])
    name = "category/in-distribution/accuracy"

    def shown(*trials: TrialRecord) -> tuple[float | None, float | None]:
        for _ in range(2):
            sync_all(database, store, declaration(*trials))
            parent, *children = runs_of(database, "demo")
            (child,) = [run for run in children if run.data.tags["rmsweep.key"] == better.key]
        return parent.data.metrics.get(f"{name}/ex_rm"), child.data.metrics.get(name)

    assert shown(first) == (None, None)
    assert shown(better) == (0.9, 0.9)
    assert [run["name"] for run in snapshot(database, "demo")[1:]] == ["llama-64 · ex_rm · tiny_world · s0"]
    assert shown(better, worse) == (0.5, 0.9)
    # What its trials differ in stands first now.
    assert {run["name"][:2] for run in snapshot(database, "demo")[1:]} == {"s0", "s1"}
    assert shown(better) == (0.9, 0.9)
    points = snapshot(database, "demo")[0]["history"][f"{name}/ex_rm"]
    assert [value for _, _, value in points] == [0.9, 0.5, 0.9]


def test_a_sweep_lasts_from_its_first_stage_to_its_last_however_often_it_is_looked_at(
    database: str, store: Store
):
    declared = declaration(*two_trials(store))
    written = write_report(declared, store)
    sync(database, store, declared, written)
    (parent, *_) = runs_of(database, "demo")
    begun = min(result.started for result in written.results)
    ended = max(result.finished for result in written.results)
    assert (parent.info.start_time, parent.info.end_time) == (round(begun * 1000), round(ended * 1000))
    time.sleep(0.05)
    (written.folder / "note.txt").write_text("another report")
    assert Tracker(database, store, declared).close(written, complete=True) is None
    assert runs_of(database, "demo")[0].info.end_time == parent.info.end_time


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
    assert requests_of == ["log_artifacts", "set_tag"], "whole runs are left alone"
    store.discard("evaluate", implicit.evaluations[0].key, evaluated["attempt"])
    commit_scores(store, implicit.evaluations[0].key, right=3)
    requests_of.clear()
    sync_all(database, store, declaration(explicit, implicit))
    assert requests_of.count("log_inputs") == 1, "only the run of the trial that has changed"
    (last,) = [run for run in snapshot(database, "demo") if run["tags"].get("rmsweep.key") == implicit.key]
    assert last["history"]["eval/tiny_world/accuracy"][-1][2] == 0.3
    # What did not change has no second point.
    assert len(last["history"]["eval/hamiltonian/accuracy"]) == 1


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


def test_a_trial_that_the_driver_noted_as_failed_stays_failed_until_it_is_complete(
    database: str, store: Store
):
    broken, waiting = record(), record(seed=1)
    declared = declaration(broken, waiting)
    tracker = Tracker(database, store, declared)
    tracker.note(broken.key)
    failed(store, broken.key)
    tracker.note(broken.key)
    assert tracker.close(write_report(declared, store), complete=False) is None
    for _ in range(2):
        assert statuses(database) == ["FAILED", "FAILED", "RUNNING"]
        sync_all(database, store, declared)
    with heartbeat(store.root) as leases:
        notes = read_state("demo", store).trials
        write_state("demo", store, SweepState(driver=leases.driver, trials=notes))
        sync_all(database, store, declared)
        assert statuses(database) == ["RUNNING", "FAILED", "RUNNING"]
    commit_trial(store, broken, 9, 5)
    sync_all(database, store, declared)
    assert statuses(database) == ["FAILED", "FINISHED", "RUNNING"]


def test_the_tracker_shows_a_trial_that_runs_and_ends_where_sync_ends(database: str, store: Store):
    followed = declaration(record(), record(reward="im_rm", beta=0.01))
    tracker = Tracker(database, store, followed)
    tracker.note(followed.trials[0].key)
    assert tracker.close() is None
    parent, child = snapshot(database, "demo")
    assert (parent["status"], child["status"], child["history"]) == ("RUNNING", "RUNNING", {})
    assert child["params"]["model"] == "llama-64"
    two_trials(store)
    tracker = Tracker(database, store, followed)
    for trial in followed.trials:
        tracker.note(trial.key)
    assert tracker.close(write_report(followed, store), complete=True) is None
    sync_all(database, store, declaration(*followed.trials, name="rebuilt"))
    assert without_sweep(snapshot(database, "demo")) == without_sweep(snapshot(database, "rebuilt"))


def test_what_is_in_no_training_key_may_change_and_the_run_stays(database: str, store: Store):
    trial = record()
    commit_trial(store, trial, 9, 5)
    for pairs, source in ((20, "/old/place"), (40, "/new/place")):
        changed = with_parameters(trial, max_eval_pairs=pairs, model_source=source)
        sync_all(database, store, declaration(changed))
    _, run = snapshot(database, "demo")
    assert run["tags"]["rmsweep.max_eval_pairs"] == "40"
    assert run["tags"]["rmsweep.model_source"] == "/new/place"


def test_two_sweeps_have_a_run_each_of_one_trial_and_two_drivers_of_a_sweep_share_it(
    database: str, store: Store
):
    trial = record()
    commit_trial(store, trial, 9, 5)
    for name in ("one", "two"):
        views = [View(database, store, declaration(trial, name=name)) for _ in range(2)]
        for view in views:
            view.log_trial(trial_result(trial, store), failed=False)
        assert [run["name"] for run in snapshot(database, name)] == [name, trial.name]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:{port}", "nonsense://host", "sqlite:///{file}/mlflow.db"], ids=str
)
def test_sync_to_what_cannot_be_written_raises_and_says_what_to_check(uri: str, store: Store, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TrackingError, match="--tracking-uri"):
        sync_all(uri.format(file=tmp_path / "file", port=free_port()), store, declaration(*two_trials(store)))


def test_the_view_is_owed_whenever_a_report_changes_a_trial_begins_or_a_driver_is_killed(
    database: str, store: Store, monkeypatch: pytest.MonkeyPatch
):
    trial = record()
    commit_trial(store, trial, 9)
    declared = declaration(trial)

    def shown() -> bool:
        write_report(declared, store)
        return is_shown(database, store, "demo")

    assert not shown(), "a sweep that no command has shown"
    sync_all(database, store, declared)
    assert shown()
    assert not is_shown("http://elsewhere", store, "demo")
    commit_scores(store, trial.evaluations[1].key, right=5)
    assert not shown()
    sync_all(database, store, declared)
    assert shown()
    killed = Tracker(database, store, declared)
    killed.note(trial.key)
    assert killed.close() is None
    assert not shown()
    sync_all(database, store, declared)
    assert shown()
    results, log_report = write_report(declared, store), View.log_report

    def and_another_command_reports(self: View, folder: Path, *arguments: Any) -> None:
        log_report(self, folder, *arguments)
        (folder / "summary.md").write_text("the next report")

    monkeypatch.setattr(View, "log_report", and_another_command_reports)
    sync(database, store, declared, results)
    assert not is_shown(database, store, "demo"), "a report that was replaced while it was being logged"
    replace_text(store.sweep_dir("demo") / SHOWN, "[]")
    assert not is_shown(database, store, "demo"), "a damaged mark"


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


class FakeView:
    """A view that passes on whether a trial that it is told of has failed; `told` may wait."""

    def __init__(self, told: Callable[[bool], None]) -> None:
        self._told = told

    def set_status(self, key: str, status: str) -> None:
        pass

    def log_trial(self, result: TrialResult, live: object, *, failed: bool) -> None:
        self._told(failed)


def test_a_server_that_fails_is_tried_again_after_a_pause_and_warned_of_once_and_close_waits_for_none(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tries: list[float] = []

    def refuse(*arguments: object) -> None:
        tries.append(time.monotonic())
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(mlflow, "View", refuse)
    tracker = Tracker("http://host", store, declaration(record()), every_s=0.01, again_s=1.0)
    tracker.close()
    assert not tries, "there was nothing to say"
    tracker = Tracker("http://host", store, declaration(record()), every_s=0.01, again_s=3.0)
    tracker.note(record().key)
    while len(tries) < 2:
        time.sleep(0.02)
    before = time.monotonic()
    assert tracker.close() == "http://host: ConnectionRefusedError: refused"
    assert time.monotonic() - before < 2.5
    assert tries[1] - tries[0] >= 3.0
    assert len(tries) == 3
    assert len([said for said in caplog.messages if "to be tried again" in said]) == 1


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


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 250, 10_000])
def test_a_curve_is_thinned_evenly_keeps_its_ends_and_has_the_points_of_the_unfinished_one(count: int):
    rows = [{"step": float(step)} for step in range(1, count + 1)]
    kept = thinned(rows, count, 100)
    assert len(kept) == min(count, 100)
    assert kept[:1] == rows[:1]
    assert kept[-1:] == rows[-1:]
    steps = [row["step"] for row in kept]
    assert steps == sorted(set(steps))
    for done in {1, count // 3, count - 1} & set(range(1, count)):
        assert thinned(rows[:done], count, 100) == [row for row in kept if row["step"] <= done]
