"""One chain of lives: started, killed at a random moment, started again, until the sweep is complete."""

import contextlib
import random
import shutil
import signal
import sqlite3
import time
from functools import partial

import pytest

from tests.faults.hooks import before_each, signalled
from tests.faults.lives import artifacts, grid_life, leftovers, lived, output

CELLS = ("--backend", "inline", "--profile", "laptop", "--rewards", "ex_rm", "im_rm", "--seeds", *"012345")
SIZE = ("--max-train-pairs", "24", "--max-eval-pairs", "8", "--epochs", "2", "--effective-batch", "4")
SETS = ("--train-sets", "tiny_world", "--eval-sets", "tiny_world", "hamiltonian", "--lr", "1e-3")


@pytest.fixture(scope="module")
def command(tiny_model):
    return (*CELLS, *SIZE, *SETS, "--models", str(tiny_model), "--checkpoint-steps", "3")


def new_storage(folder, empty_database):
    """A storage with a database of MLflow's, whose migration would take longer than most lives."""
    storage = folder / "store"
    storage.mkdir()
    shutil.copy(empty_database, storage)
    return storage


@pytest.fixture(scope="module")
def undisturbed(command, empty_database, tmp_path_factory):
    """The storage of a life that nobody kills, and its seconds until the first checkpoint and the end."""
    storage = new_storage(tmp_path_factory.mktemp("undisturbed"), empty_database)
    life = grid_life(storage, command)
    began = time.monotonic()
    until_checkpoint(life, storage)
    first = time.monotonic() - began
    life.join(300)
    assert life.exitcode == 0, output(storage)
    return storage, first, time.monotonic() - began


def until_checkpoint(life, storage):
    """Wait for the first checkpoint, so that one kill at least is in the middle of a training."""
    while life.exitcode is None and not list((storage / "checkpoints").glob("*/step*.json")):
        life.join(0.005)


def marks(storage):
    """The files that say how far a sweep has come."""
    found = set()
    for pattern in ("artifacts/*/*/manifest.json", "checkpoints/*/step*.json"):
        # Of a training that ends, the checkpoints go.
        with contextlib.suppress(FileNotFoundError):
            found.update(storage.glob(pattern))
    return found


def until_further(life, storage, steps):
    """Wait until that many such files are new."""
    seen = marks(storage)
    while life.exitcode is None and len(marks(storage) - seen) < steps:
        life.join(0.005)


@pytest.mark.parametrize("kills", [16, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(
    command, undisturbed, empty_database, tmp_path, kills
):
    whole, first, end = undisturbed
    storage, moments = new_storage(tmp_path, empty_database), random.Random(0)
    lives, killed, resumed = 0, 0, 0
    while killed < kills or lives == killed:
        life = grid_life(storage, command)
        lives += 1
        if killed == 0:
            until_checkpoint(life, storage)
        elif killed < kills:
            # By what it has come to, as seconds say little on a busy machine: the sweep is some 100 files, so 50 kills fit in.
            steps = moments.randrange(3)
            until_further(life, storage, steps)
            life.join(moments.uniform(0, (end - first) / kills if steps else first / 2))
        else:
            life.join(300)
        if life.exitcode is None:
            life.kill()
            killed += 1
            life.join()
        else:
            assert life.exitcode == 0, output(storage)
            break
    resumed = output(storage).count("resumed at step")
    print(f"{lives} lives, {killed} killed, {resumed} resumed")
    assert life.exitcode == 0, output(storage)
    assert "Traceback" not in output(storage)
    assert killed > kills // 3
    assert resumed >= 1
    assert artifacts(storage) == artifacts(whole)
    assert leftovers(storage) == []


def before_its_log():
    """Kill this process when the weights of a training are committed, and its log is not."""
    from orchestrator.store.artifacts import Store

    commit = Store._commit

    def deadly(self, stage, *rest):
        if stage == "train":
            signalled(signal.SIGKILL)
        return commit(self, stage, *rest)

    Store._commit = deadly


def before(module, function):
    return partial(before_each, module, function, partial(signalled, signal.SIGKILL))


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param(before_its_log, id="the weights and the log"),
        pytest.param(
            before("orchestrator.run.compute", "remove_tree"), id="a training and the end of its checkpoints"
        ),
        pytest.param(
            before("orchestrator.cli.running", "write_full_report"), id="the last trial and the report"
        ),
    ],
)
def test_killed_between_two_ends_nothing_is_left(command, killed, empty_database, tmp_path):
    storage = new_storage(tmp_path, empty_database)
    one_trial = (*command, "--only", "reward=ex_rm", "seed=0")
    lived(storage, one_trial, killed, exits=-signal.SIGKILL)
    assert leftovers(storage) != []
    lived(storage, one_trial)
    assert leftovers(storage) == []
    assert view(storage) == {"sweep": "FINISHED", "trial": "FINISHED"}


def test_killed_while_the_database_of_mlflow_is_made_the_view_is_whole_in_the_end(command, tmp_path):
    storage = tmp_path / "store"
    storage.mkdir()
    one_trial = (*command, "--only", "reward=ex_rm", "seed=0")
    life = grid_life(storage, one_trial)
    while database_bytes(storage) < 100_000:
        assert life.exitcode is None, output(storage)
        life.join(0.005)
    life.kill()
    life.join()
    said = lived(storage, one_trial)
    assert "warning" not in said
    assert leftovers(storage) == []
    assert view(storage) == {"sweep": "FINISHED", "trial": "FINISHED"}


def database_bytes(storage):
    """Size of MLflow's database, or of the draft of one."""
    with contextlib.suppress(FileNotFoundError):
        return max((file.stat().st_size for file in storage.rglob("*.db")), default=0)
    return 0


def view(storage):
    """Role → status of each run of the one sweep."""
    with sqlite3.connect(storage / "mlflow.db") as database:
        rows = database.execute(
            "select value, status from runs join tags using (run_uuid) where key = 'rmsweep.role'"
        ).fetchall()
    assert len(rows) == len(dict(rows))
    return dict(rows)
