"""Whatever the tracking server does, the sweep goes on, and the view is complete afterwards, with nothing twice."""

import base64
import logging
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli.options import Options
from orchestrator.cli.running import StateWriter, catch_up
from orchestrator.cli.session import Session
from orchestrator.report.summary import Written
from orchestrator.run.events import Failed
from orchestrator.spec.redaction import shown_uri, without_credentials
from orchestrator.store.artifacts import Store
from orchestrator.store.records import (
    Declaration,
    SweepState,
    TrialNote,
    write_declaration,
    write_state,
)
from orchestrator.tracking.database import EXPERIMENT, default_uri
from orchestrator.tracking.mlflow import SHOWN, Tracker, is_shown, sync
from orchestrator.tracking.view import View, run_names
from tests.faults.lives import forked
from tests.faults.proxy import Proxy, proxy_to
from tests.faults.tracking_server import runs_of, snapshot, tracking_server, without_sweep
from tests.orchestrator.sweep_samples import commit_trial, declaration, record, write_report
from trainers.errors import TrackingError

# MLflow's and SQLAlchemy's own deprecations are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).resolve().parents[2]
SOON = {"every_s": 0.05, "again_s": 0.2}
DRIVER_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A sweep whose artifacts are all there, and what its view must look like in the end."""

    store: Store
    declared: Declaration
    expected: list[dict[str, Any]]

    @property
    def file(self) -> Path:
        return self.store.sweep_dir(self.declared.sweep) / SHOWN


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """The real server behind every proxy."""
    with tracking_server(tmp_path_factory.mktemp("mlflow"), empty_database) as uri:
        yield uri


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    """A proxy of the test's own."""
    with proxy_to(server) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A request that is answered may take long on a busy machine; every writer has ended when its test has."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    yield
    wait_for(lambda: not writers(), "a writer goes on")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Case:
    """Two complete trials, and the view that an undisturbed `sync` makes of them."""
    store = Store(tmp_path_factory.mktemp("finished") / "store")
    declared = declaration(record(), record(reward="im_rm", beta=0.01))
    commit_trial(store, declared.trials[0], 9, 5)
    commit_trial(store, declared.trials[1], 8, 4)
    shutil.copy(empty_database, store.root / "mlflow.db")
    sync(default_uri(store), store, declared, write_report(declared, store))
    expected = snapshot(default_uri(store), declared.sweep)
    assert [run["status"] for run in expected] == ["FINISHED"] * 3
    return Case(store=store, declared=declared, expected=without_sweep(expected))


@pytest.fixture
def case(request: pytest.FixtureRequest, finished: Case, tmp_path: Path) -> Case:
    """The finished sweep under a name of the test's own, as tests share the server."""
    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root / "artifacts", store.root / "artifacts")
    name = re.sub(r"\W+", "_", request.node.name)
    return replace(finished, store=store, declared=replace(finished.declared, sweep=name))


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlflow-writer"]


def wait_for(condition: Callable[[], object], otherwise: str, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a request that is not answered end, after more than DRIVER_S, and MLflow's client not ask again by itself."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def told(tracker: Tracker) -> bool:
    """Whether the view has taken all that was said."""
    return not tracker._news


def tell_everything(tracker: Tracker, case: Case) -> Written:
    """Say what the driver says in the course of a sweep; none of it may wait for the server. The report is returned."""
    before = time.monotonic()
    for trial in case.declared.trials:
        tracker.note(trial.key)
        tracker.note(trial.key)
    assert time.monotonic() - before < DRIVER_S, "calls wait for the server"
    return write_report(case.declared, case.store)


def assert_complete(uri: str, case: Case) -> None:
    """The view is what an undisturbed one is: every run once, ended, with every point once."""
    runs = snapshot(uri, case.declared.sweep)
    assert without_sweep(runs) == case.expected
    assert [run["parent"] for run in runs] == [None, *[case.declared.sweep] * (len(runs) - 1)]


def assert_shown(uri: str, case: Case) -> None:
    """The next command finds nothing to do."""
    write_report(case.declared, case.store)
    assert is_shown(uri, case.store, case.declared.sweep)


def deleted_runs(uri: str, name: str) -> list[Any]:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    tag = f"tags.`rmsweep.sweep` = '{name}'"
    return list(client.search_runs([experiment.experiment_id], tag, run_view_type=ViewType.DELETED_ONLY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A fault of the server (`closed`: nobody listens), and how the sweep meets it.

    With `middle`, after the first trial is shown. It ends once `felt` by the writer, or once that has said everything all the same.
    """

    fault: Any
    only: str = ""
    times: float = math.inf
    middle: bool = False
    felt: bool = False
    # MLflow's client asks again by itself, and then the writer does: each leaves a run.
    twice: bool = False


TROUBLES = {
    "down at the start": Trouble(fault="closed", felt=True),
    "dies": Trouble(fault="closed", middle=True, felt=True),
    "answers 500": Trouble(fault="error", middle=True, felt=True),
    "hangs": Trouble(fault="hang", middle=True, felt=True),
    "loses answers": Trouble(fault="lost", middle=True, felt=True),
    "answers slowly": Trouble(fault="slow"),
    "loses a run's answer": Trouble(fault="lost", only="runs/create", times=1, twice=True),
    "loses the answers of several tries": Trouble(fault="lost", only="runs/create", times=4, twice=True),
    "loses the experiment's answer": Trouble(fault="lost", only="experiments/create", times=1),
    "creates the parent late": Trouble(fault="late", only="runs/create", times=1, twice=True),
    "creates a trial late": Trouble(fault="late", only="runs/create", times=1, middle=True, twice=True),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_the_view_is_whole_in_the_end_whatever_the_server_did(
    trouble: Trouble, server: str, proxy: Proxy, case: Case, monkeypatch: pytest.MonkeyPatch
):
    if trouble.fault in ("hang", "late"):
        impatient(monkeypatch)
    if "experiments" in trouble.only:
        for module in ("orchestrator.tracking.view", "tests.faults.tracking_server"):
            monkeypatch.setattr(f"{module}.EXPERIMENT", "another experiment")
    tracker = Tracker(f"http://{proxy.host}", case.store, case.declared, **SOON)
    if trouble.middle:
        tracker.note(case.declared.trials[0].key)
        wait_for(lambda: told(tracker), "the first trial does not appear")
    if trouble.fault == "closed":
        proxy.close()
    else:
        proxy.behave(trouble.fault, only=trouble.only, times=trouble.times, delay_s=0.1)
    written = tell_everything(tracker, case)
    wait_for(lambda: tracker._trouble if trouble.felt else told(tracker), "the fault has no end or no effect")
    if trouble.fault == "closed":
        assert {key for key, _ in tracker._news} == {trial.key for trial in case.declared.trials}
        proxy.open()
        wait_for(lambda: told(tracker), "it was not tried again")
        trials = snapshot(server, case.declared.sweep)[1:]
        assert [run["history"] for run in trials] == [run["history"] for run in case.expected[1:]]
    else:
        proxy.behave("none")
    if trouble.fault == "late":
        # The parent, two trials, and the late one.
        wait_for(lambda: sum("runs/create" in path for path in proxy.forwarded) >= 4, "it was not late")
    assert tracker.close(written, complete=True) is None
    assert_complete(server, case)
    assert_shown(f"http://{proxy.host}", case)
    assert bool(trouble.twice) <= bool(deleted_runs(server, case.declared.sweep)), "no run was created twice"


def test_a_run_that_is_re_opened_after_its_end_by_a_late_request_is_ended_again(
    server: str, proxy: Proxy, case: Case, monkeypatch: pytest.MonkeyPatch
):
    """The first trial fails with its last scores missing, and is done again."""
    impatient(monkeypatch)
    first, second = case.declared.trials
    scores = case.store.root / "artifacts" / "evaluate" / first.evaluations[-1].key
    scores.rename(scores.with_name("elsewhere"))
    tracker = Tracker(f"http://{proxy.host}", case.store, case.declared, **SOON)

    def note(key: str, state: Any) -> None:
        states = SweepState(trials={first.key: TrialNote(state=state)})
        write_state(case.declared.sweep, case.store, states)
        tracker.note(key)
        wait_for(lambda: told(tracker), "a trial is not logged")

    note(second.key, "failed")
    note(first.key, "failed")
    updates = sum("runs/update" in path for path in proxy.forwarded)
    proxy.behave("late", only="runs/update", times=1)
    note(first.key, "running")
    scores.with_name("elsewhere").rename(scores)
    note(first.key, "complete")
    proxy.behave("none")
    # Two in time: the trial re-opened, and ended.
    wait_for(lambda: sum("runs/update" in path for path in proxy.forwarded) >= updates + 3, "it was not late")
    statuses = [run.info.status for run in runs_of(server, case.declared.sweep)]
    assert statuses.count("FINISHED") == 1, "the late request changes nothing"
    assert tracker.close(write_report(case.declared, case.store), complete=True) is None
    assert_complete(server, case)


def next_command(uri: str, case: Case) -> str:
    """What a command says that has nothing to run, after it has completed the view."""
    say = Console(width=200, record=True)
    session = Session(
        options=Options(),
        sweep_name=case.declared.sweep,
        store=case.store,
        tracking_uri=uri,
        folder=ROOT,
        console=say,
    )
    catch_up(session, case.declared, write_report(case.declared, case.store))
    return say.export_text()


def test_a_hanging_server_holds_up_no_command_and_the_next_one_catches_up(
    server: str, proxy: Proxy, case: Case, monkeypatch: pytest.MonkeyPatch
):
    impatient(monkeypatch)
    uri = f"http://{proxy.host}"
    proxy.behave("hang")
    tracker = Tracker(uri, case.store, case.declared, **SOON)
    written = tell_everything(tracker, case)
    before = time.monotonic()
    assert "within 0 s" in tracker.close(written, complete=True, timeout_s=0.2)
    assert time.monotonic() - before < 0.2 + DRIVER_S
    wait_for(lambda: not writers(), "a request to a hanging server does not end")
    assert not case.file.exists()
    proxy.behave("none")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert next_command(uri, case) == ""
    assert_complete(server, case)
    assert_shown(uri, case)
    # What is shown already takes no second look.
    monkeypatch.setattr("orchestrator.tracking.mlflow.Tracker", None)
    assert next_command(uri, case) == ""


def noting_and_killed(uri: str, store: Store, declared: Declaration) -> None:
    """A driver of two trials, the second of which fails, that is killed before its writer has said anything."""
    tracker = Tracker(uri, store, declared)
    complete, broken = declared.trials
    state = StateWriter(declared.sweep, store, "", [], [broken.key])
    state.on_event(Failed(trial=broken.key, cause="Diverged", message="loss is nan"))
    for trial in (complete, broken, complete):
        tracker.note(trial.key)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_driver_has_not_shown_is_logged_by_the_next_one(
    server: str, proxy: Proxy, case: Case, tmp_path: Path
):
    broken = record(seed=7)
    declared = replace(case.declared, trials=(case.declared.trials[0], broken))
    write_declaration(declared, case.store)
    proxy.close()
    uri = f"http://{proxy.host}"
    life = forked(tmp_path / "life", noting_and_killed, (uri, case.store, declared))
    life.join(60.0)
    assert life.exitcode == -signal.SIGKILL
    proxy.open()
    written = write_report(declared, case.store)
    assert not is_shown(uri, case.store, declared.sweep)
    assert Tracker(uri, case.store, declared, **SOON).close(written) is None
    names = run_names(declared.trials)
    statuses = {run.info.run_name: run.info.status for run in runs_of(server, declared.sweep)}
    assert statuses == {
        declared.sweep: "FAILED",
        names[declared.trials[0].key]: "FINISHED",
        names[broken.key]: "FAILED",
    }
    assert is_shown(uri, case.store, declared.sweep)


def test_a_password_reaches_the_server_and_nothing_else(
    server: str, proxy: Proxy, case: Case, caplog: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    uri = f"http://somebody:pa%40ss%2Fword@{proxy.host}"
    proxy.close()
    caplog.set_level(logging.DEBUG)
    tracker = Tracker(uri, case.store, case.declared, **SOON)
    written = tell_everything(tracker, case)
    wait_for(lambda: tracker._trouble, "nothing was tried")
    said = [tracker.close(written, complete=True)]
    with pytest.raises(TrackingError) as raised:
        sync(uri, case.store, case.declared, write_report(case.declared, case.store))
    said.append(str(raised.value))
    proxy.open()
    sync(uri, case.store, case.declared, write_report(case.declared, case.store))
    assert_complete(server, case)
    said.append(case.file.read_text())
    assert View(uri, case.store, case.declared)._client.tracking_uri == f"http://{proxy.host}"
    sent = "Basic " + base64.b64encode(b"somebody:pa@ss/word").decode()
    assert {headers.get("Authorization") for headers in proxy.headers} == {sent}
    said += [caplog.text, *capfd.readouterr()]
    said += [file.read_text(errors="replace") for file in case.store.root.rglob("*.json")]
    assert proxy.host in "".join(said)
    for secret in ("pa%40ss", "pa@ss", "somebody"):
        assert not [text for text in said if secret in text]


def test_an_address_is_shown_without_what_is_secret():
    shown = {
        "http://user:password@host:5000/p": "http://host:5000/p",
        "https://user:p@ss/wo:rd@host": "https://host",
        "http://token@host": "http://host",
        "postgresql://user:password@host/db?sslpassword=password": "postgresql://host/db",
        "sqlite:////home/me@work/mlflow.db": "sqlite:////home/me@work/mlflow.db",
        "databricks": "databricks",
    }
    for uri, said in shown.items():
        assert shown_uri(uri) == said
        assert without_credentials(f"no answer from {uri}/api", uri) == f"no answer from {said}/api"
    text = without_credentials("tried p%40ss, then p@ss, at user:p%40ss@host", "http://user:p%40ss@host")
    assert text == "tried ***, then ***, at host"
