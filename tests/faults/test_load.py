"""Sweeps of many trials whose stages compute nothing: every row is there, and none is computed twice."""

import asyncio
import itertools
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from benchmarks.load import NAME, Load, make_session
from benchmarks.load_stages import AT_ONCE, CHATTY, CHATTY_ROWS, NoView, shared_at_once, standing_in
from orchestrator.cli import run as commands
from orchestrator.plan.durations import Durations
from orchestrator.plan.hardware import local_capacity
from orchestrator.plan.placement import place
from orchestrator.run.events import Completed, Failed, RowsLogged
from orchestrator.run.inline import run_inline
from orchestrator.run.ray.coordinator import Coordinator
from orchestrator.run.trial import Execution
from orchestrator.spec.stages import PrepareStage
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import Leases
from orchestrator.store.records import read_state
from sweeps.full_grid import full_grid
from tests.orchestrator.sweep_samples import EX_RM, plan, trial
from trainers.train.stopping import StopRequest

ROOT = Path(__file__).resolve().parent.parent.parent
THREADS = 16


def manifests(storage: Path, stage: str) -> dict[str, dict[str, Any]]:
    files = (storage / "artifacts" / stage).glob("*/manifest.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def assert_every_row(storage: Path, trials: int, sets: int) -> None:
    rows = parquet.read_table(storage / "sweeps" / NAME / "trials.parquet").to_pylist()
    assert len({(row["key"], row["evaluation_set"]) for row in rows}) == len(rows) == trials * sets
    assert {(row["state"], row["evaluated"], row["n"]) for row in rows} == {("complete", True, 8.0)}
    assert len(manifests(storage, "train")) == trials
    assert len(manifests(storage, "evaluate")) == trials * sets
    notes = read_state(NAME, Store(storage)).trials
    assert [note.state for note in notes.values()] == ["complete"] * trials


@pytest.mark.parametrize("trials", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_hundreds_of_trials_inline_leave_every_row_and_nothing_to_do(tmp_path, monkeypatch, trials):
    monkeypatch.setattr("orchestrator.tracking.mlflow.Tracker", NoView)
    monkeypatch.setattr(commands, "cluster_address", lambda: None)
    session = make_session(Load(trials=trials, sets=2, backend="inline"), tmp_path)
    with standing_in(AT_ONCE):
        assert commands.run(session, full_grid) == 0, session.console.file.getvalue()
    assert_every_row(session.store.root, trials, 2)
    before = {stage: manifests(session.store.root, stage) for stage in ("prepare", "train", "evaluate")}
    # Another process would have checked no file yet; a cluster that is up is nothing to it.
    monkeypatch.setattr(commands, "cluster_address", lambda: "127.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "orchestrator.run.ray.cluster", None)
    again = make_session(Load(trials=trials, sets=2), tmp_path)
    began = time.monotonic()
    assert commands.run(again, full_grid) == 0
    assert time.monotonic() - began < 20
    assert f"all {trials} trials are complete" in again.console.file.getvalue()
    assert {stage: manifests(session.store.root, stage) for stage in before} == before


@pytest.mark.ray
def test_thirty_trials_on_ray_leave_every_row_and_share_processes(tmp_path):
    words = ("--trials", "30", "--sets", "2", "--backend", "ray", "--storage", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 of 60" in done.stdout
    assert_every_row(tmp_path / "store", 30, 2)
    infos = [item["info"] for item in manifests(tmp_path / "store", "train").values()]
    assert len({info["tune_trial_id"] for info in infos}) == 30
    # Three trial processes on two CPUs, and as many again where a machine is slow enough to let some go.
    assert len({info["pid"] for info in infos}) <= 12
    evaluated = [item["info"]["pid"] for item in manifests(tmp_path / "store", "evaluate").values()]
    assert len(set(evaluated)) <= 12


@pytest.fixture
def coordinator(tmp_path):
    """The one actor that trials talk to, in a thread with a loop of its own: threads stand in for 16 processes."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield (
        Coordinator(None, (), {}, Durations(store=Store(tmp_path))),
        lambda call: asyncio.run_coroutine_threadsafe(call, loop).result(),
    )
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_sixteen_trials_at_once_lose_no_row_and_report_once_a_second(tmp_path, coordinator):
    actor, ask = coordinator
    plans = [plan(trial(reward=EX_RM, seed=seed)) for seed in range(THREADS)]
    store = Store(tmp_path)
    execution = Execution(store=store, leases=Leases(store.root, "driver"))
    # Threads of one driver would share each other's leases on what all of them need.
    for stage in {stage for item in plans for stage in item.stages() if isinstance(stage, PrepareStage)}:
        shared_at_once(stage, store, print)
    sent: dict[str, list[float]] = {item.key: [] for item in plans}
    seen: dict[str, list[int]] = {item.key: [] for item in plans}
    ended: list[str] = []

    def post(event):
        if isinstance(event, RowsLogged):
            sent[event.trial].append(time.monotonic())
        ask(actor.post(event))

    def drain():
        for event in ask(actor.drain()):
            if isinstance(event, RowsLogged):
                seen[event.trial] += [row["step"] for row in event.rows]
            elif isinstance(event, Completed | Failed):
                ended.append(type(event).__name__)

    def run(item):
        placement = place(item.spec, local_capacity())
        run_inline([item], {item.key: placement}, post, execution, StopRequest())

    with standing_in(CHATTY), ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(run, item) for item in plans]
        while not all(future.done() for future in running):
            drain()
            time.sleep(0.3)
    drain()
    assert ended == ["Completed"] * THREADS
    assert set(map(tuple, seen.values())) == {tuple(range(1, CHATTY_ROWS + 1))}
    for moments in sent.values():
        *regular, _ = moments
        assert len(regular) >= 2
        assert all(after - before >= 1.0 for before, after in itertools.pairwise(regular))
