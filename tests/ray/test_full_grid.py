"""The main job on a real Ray: four built-in cells, two of them gangs; then what a second command does and does not."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.faults.lives import lived
from tests.faults.test_security import CANARIES, require_no_secret
from tests.faults.watching import LOOPBACK, leaks, listening
from tests.processes import command_line, processes

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent.parent
# gemma2-64 on the tiny world is laid on two processes, under ZeRO 3 and 2; on tiny_requests it runs in local mode.
CELLS = ("--profile", "laptop", "--models", "gemma2-64", "--epochs", "2")
MARK = "GRID_TEST_STORAGE"
SETS = ("--eval-sets", "tiny_world", "tiny_world_paraphrase")


def start_grid(storage: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start the command; its output, errors included, is one stream."""
    command = [sys.executable, str(ROOT / "sweeps" / "full_grid.py"), *arguments, "--storage", str(storage)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RMSWEEP_"))}
    # Every process that a command starts inherits the mark, and can be found by it afterwards.
    return subprocess.Popen(
        command,
        cwd=storage,
        env={**kept, MARK: str(storage), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def grid(storage: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with start_grid(storage, *arguments, **more) as running:
        output, _ = running.communicate(timeout=1200)
    return subprocess.CompletedProcess(running.args, running.returncode, output, "")


def manifests(storage: Path, stage: str) -> dict[str, dict]:
    files = sorted((storage / "artifacts" / stage).glob("*/manifest.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stdout + done.stderr).split())


@dataclass(frozen=True, slots=True)
class Watched:
    """A command that holds secrets, its home, and what is seen of its Ray from outside while it runs."""

    storage: Path
    home: Path
    ray: Path
    sockets: set[tuple[str, str, str]] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def run(self, *arguments: str) -> int:
        """Start the command and watch it to its end; return its exit code."""
        more = {"HOME": str(self.home), "RAY_TMPDIR": str(self.ray), **CANARIES}
        with start_grid(self.storage, "run", *arguments, **more) as running:
            reader = threading.Thread(target=lambda: self.said.append(running.stdout.read()))
            reader.start()
            while running.poll() is None:
                self.sockets.update(listening(f"{MARK}={self.storage}"))
                gcs = [port for _, port, command in self.sockets if "gcs_server" in command]
                if gcs and not self.refusals:
                    self.refusals.append(unauthenticated(f"127.0.0.1:{gcs[0]}", self.storage))
                time.sleep(1.0)
            reader.join()
        return running.returncode


CLIENT = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print('LET IN', len(ray.nodes()))"


def unauthenticated(address: str, folder: Path) -> str:
    """What a client without a token is told."""
    # The last lets a client keep to 127.0.0.1, as Ray's own processes there do.
    without = {
        "RAY_AUTH_MODE": "disabled",
        "HOME": str(folder),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, address],
        env={**os.environ, **without},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    # Tests below fork from it; it imports while Ray starts.
    forkserver.ensure_running()
    # Ray's sockets need a path of fewer than 108 bytes.
    ray = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    watched = Watched(tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("home"), ray)
    try:
        code = watched.run(*CELLS, *SETS)
        assert code == 0, watched.said
        yield watched
    finally:
        shutil.rmtree(ray, ignore_errors=True)


@pytest.fixture(scope="module")
def swept(watched):
    return watched.storage, subprocess.CompletedProcess([], 0, watched.said[0], "")


def test_four_cells_are_trained_and_evaluated_and_shared_stages_run_once(swept):
    storage, done = swept
    counts = {
        stage: len(manifests(storage, stage))
        for stage in ("pretrain", "prepare", "reference", "train", "evaluate")
    }
    assert counts == {"pretrain": 1, "prepare": 4, "reference": 4, "train": 4, "evaluate": 8}
    assert "4/4 complete" in done.stdout
    assert "accuracy by category" in done.stdout
    assert "full_grid.py ui --storage" in done.stdout


def test_chatter_goes_to_a_log(swept):
    storage, done = swept
    assert "WARNING" not in done.stdout
    assert "DeepSpeed" not in done.stdout
    # What it says of Ray itself is that it starts it.
    assert "ray" not in done.stdout.replace("starting Ray", "").lower()
    assert (storage / "sweeps" / "full_grid" / "logs" / "driver.log").is_file()


def test_its_ray_listens_on_loopback_asks_for_its_token_and_logs_no_secret(watched, swept):
    _, done = swept
    assert len({command for _, _, command in watched.sockets}) >= 4, "Ray's servers were seen"
    assert [found for found in watched.sockets if found[0] not in LOOPBACK] == []
    assert "LET IN" not in watched.refusals[0], "a client without the token"
    assert "Unauthenticated" in watched.refusals[0], watched.refusals[0]
    token = watched.home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) & 0o077 == 0
    assert (watched.ray / "ray").is_dir()
    roots = (watched.storage, watched.home, watched.ray)
    require_no_secret(done, *roots)
    assert [leak for leak in leaks([token.read_text().strip()], *roots) if "auth_token" not in leak] == []


def test_manifests_say_how_each_cell_was_trained(swept):
    storage, _ = swept
    infos = [manifest["info"] for manifest in manifests(storage, "train").values()]
    layouts = sorted((info["placement"]["world_size"], info["placement"]["zero_stage"]) for info in infos)
    assert layouts == [(1, 0), (1, 0), (2, 2), (2, 3)]
    for info in infos:
        assert info["backend"] == "ray"
        assert info["tune_trial_id"]
        assert info["train_run_name"].startswith("train-")
        assert info["local_mode"] == (info["placement"]["world_size"] == 1)
    assert len({info["tune_trial_id"] for info in infos}) == 4


def test_mlflow_holds_a_parent_and_a_child_for_every_cell(swept):
    storage, _ = swept
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    (experiment,) = [item for item in client.search_experiments() if item.name == "rmsweep"]
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if run.data.tags["rmsweep.role"] == "trial"]
    (parent,) = [run for run in runs if run.data.tags["rmsweep.role"] == "sweep"]
    assert len(children) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in children:
        assert len(run.data.metrics) < 60
        assert 0 <= run.data.metrics["eval/tiny_world/accuracy"] <= 1
        assert run.inputs.dataset_inputs
    assert [item.path for item in client.list_artifacts(parent.info.run_id, "report")]


def test_the_same_command_again_runs_nothing_and_says_so_in_seconds(swept):
    storage, _ = swept
    before = manifests(storage, "train"), manifests(storage, "evaluate")
    started = time.monotonic()
    done = grid(storage, "run", *CELLS, *SETS)
    assert done.returncode == 0
    assert "all 4 trials are complete" in done.stdout
    assert "nothing to run" in said(done)
    assert time.monotonic() - started < 15
    assert (manifests(storage, "train"), manifests(storage, "evaluate")) == before


def test_one_more_evaluation_set_runs_four_evaluations_and_no_training(swept):
    storage, _ = swept
    before = manifests(storage, "train")
    printed = lived(storage, ("run", *CELLS, *SETS, "hamiltonian", "--backend", "inline"))
    assert "to run: 4 evaluate" in printed
    assert len(manifests(storage, "evaluate")) == 12
    assert manifests(storage, "train") == before


def test_one_more_seed_runs_the_new_trials_only(swept):
    storage, _ = swept
    before = manifests(storage, "train")
    wider = (*CELLS, *SETS, "hamiltonian", "--seeds", "0", "1")
    assert "8 trials, 4 complete" in lived(storage, ("run", *wider, "--backend", "inline"))
    after = manifests(storage, "train")
    assert len(after) == 8
    assert {key: after[key] for key in before} == before


def test_the_report_needs_no_mlflow(swept, tmp_path):
    storage, _ = swept
    lived(storage, ("run", *CELLS, *SETS, "--replace"))
    copy = tmp_path / "copy"
    shutil.copytree(storage, copy)
    (copy / "mlflow.db").unlink()
    original, rebuilt = (json.loads(lived(folder, ("report", "--json"))) for folder in (storage, copy))
    assert original == rebuilt != []
    rows = parquet.read_table(copy / "sweeps" / "full_grid" / "trials.parquet").to_pylist()
    assert len(rows) == 8
    assert {row["state"] for row in rows} == {"complete"}
    lived(copy, ("sync",))
    assert (copy / "mlflow.db").is_file()


def test_no_process_of_ours_is_left(swept):
    storage, _ = swept
    assert marked_processes(storage) == []


def marked_processes(storage: Path) -> list[str]:
    """Command lines of live processes that a command on this storage has started."""
    return [command_line(pid) for pid in processes(f"{MARK}={storage}")]
