"""One small sweep from --keep-weights best to gc --delete, on the command line: what is freed, and what comes back."""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.store.leases import heartbeat
from tests.faults.lives import lived

SMALL = ("--backend", "inline", "--train-sets", "tiny_world")
SMALL += ("--epochs", "1", "--max-train-pairs", "16", "--max-eval-pairs", "8")
NARROW = ("--eval-sets", "tiny_world", "--rewards", "ex_rm", "--seeds", "0")
WIDE = ("--eval-sets", "tiny_world", "--seeds", "0", "1")
WIDER = ("--eval-sets", "tiny_world", "hamiltonian", "--seeds", "0", "1")


def grid(storage: Path, *arguments: str, exits: int = 0) -> str:
    """Run the command; what it says, as one line."""
    said = lived(storage, arguments, exits=exits)
    return said if "--json" in arguments else " ".join(said.split())


def trainings(storage: Path) -> dict[str, str]:
    """Training key → its manifest."""
    files = (storage / "artifacts" / "train").glob("*/manifest.json")
    return {file.parent.name: file.read_text() for file in files}


def with_weights(storage: Path) -> set[str]:
    """Keys of trainings whose weights are there."""
    found = (storage / "artifacts" / "weights").glob("*/*/model/model.safetensors")
    return {file.parent.parent.parent.name for file in found}


def everything(storage: Path) -> dict[Path, int]:
    files = [file for file in (storage / "artifacts").rglob("*") if file.is_file()]
    return {file: file.stat().st_size for file in files}


@pytest.fixture(scope="module")
def small(tiny_model):
    """Words of every command that declares the sweep."""
    return (*SMALL, "--models", str(tiny_model))


@pytest.fixture(scope="module")
def swept(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    said = grid(folder, "run", *small, *WIDE, "--keep-weights", "best")
    assert "of weights evicted (--keep-weights best)" in said
    return folder


@pytest.fixture
def storage(swept, tmp_path):
    """A copy, as each test changes it."""
    return shutil.copytree(swept, tmp_path / "store")


def test_weights_go_and_come_back_and_garbage_goes(small, storage):
    first, kept = trainings(storage), with_weights(storage)
    assert (len(first), len(kept)) == (4, 2)
    assert "4 trials in sqlite" in grid(storage, "sync")
    # An added evaluation set needs the evicted trainings, and no other, again.
    took = sum(json.loads(manifest)["seconds"] for key, manifest in first.items() if key not in kept)
    said = f"2 train again, as their weights were evicted; they took {took:,.0f} s"
    assert said in grid(storage, "plan", *small, *WIDER)
    rows = json.loads(grid(storage, "plan", *small, *WIDER, "--json"))["trials"]
    assert sum(row["trains_again_s"] or 0 for row in rows) == pytest.approx(took)
    assert said in grid(storage, "run", *small, *WIDER)
    assert (trainings(storage), with_weights(storage)) == (first, {*first})

    # Another grid takes no name by chance, and what a replaced one needs is garbage only where one asks.
    before = everything(storage)
    refused = grid(storage, "run", *small, *NARROW, exits=2)
    assert "· ex_rm · tiny_world · s0 on hamiltonian, " in refused
    assert "s1 and 1 more. Nothing was started: give it a name of its own (--name full_grid-2)" in refused
    assert "all 1 trials are complete" in grid(storage, "run", *small, *NARROW, "--replace")
    assert "nothing to remove" in grid(storage, "gc")
    listed = json.loads(grid(storage, "gc", "--drop-earlier", "--json"))
    stages = [item["path"].split("/")[1] for item in listed]
    counts = {
        stage: stages.count(stage) for stage in ("evaluate", "train", "weights", "reference", "prepare")
    }
    assert counts == {"evaluate": 7, "train": 3, "weights": 3, "reference": 3, "prepare": 1}
    assert "nothing is removed without --delete" in grid(storage, "gc", "--drop-earlier")
    assert everything(storage) == before
    total = sum(item["bytes"] for item in listed)
    said = f"18 of 18 items removed, {total / 1e9:.4f} GB freed"
    assert said in grid(storage, "gc", "--drop-earlier", "--delete")
    assert sum(everything(storage).values()) == sum(before.values()) - total

    # What was removed is computed again, and nothing else.
    (survivor,) = trainings(storage).items()
    again = grid(storage, "run", *small, *WIDER)
    assert "4 trials, 0 complete; to run: 7 evaluate, 1 prepare, 3 reference, 3 train" in again
    assert "train again" not in again
    assert trainings(storage)[survivor[0]] == survivor[1]


def test_a_narrowed_grid_stays_the_sweep_that_it_is_part_of(small, storage):
    said = grid(storage, "run", *small, *WIDE, "--only", "seed=0", "reward=ex_rm")
    assert "all 1 trials are complete" in said
    assert len(json.loads(grid(storage, "status", "--json"))) == 4
    # One that it has with other settings is no part of it; beside it a grid adds up.
    other = ("run", *small, *WIDE, "--lr", "0.01", "--only", "seed=0")
    assert "with other data or settings" in grid(storage, *other, exits=2)
    assert "1 trials" in grid(storage, "run", *small, *NARROW[:-1], "2", "--extend")
    assert len(json.loads(grid(storage, "status", "--json"))) == 5


def test_a_storage_that_lies_elsewhere_now_has_its_mlflow_files_there(small, swept, tmp_path):
    from mlflow import MlflowClient

    here, there = tmp_path / "here", tmp_path / "there, 偏好 too"
    shutil.copytree(swept, here)
    grid(here, "run", *small, *NARROW[:-1], "7", "--extend")
    here.rename(there)
    grid(there, "run", *small, *NARROW[:-1], "8", "--extend")
    assert not here.exists()
    client = MlflowClient(tracking_uri=f"sqlite:///{there / 'mlflow.db'}")
    runs = client.search_runs(["1"])
    # What the trials differ in stands first.
    names = {f"ex_rm · s{seed} · tiny-model · tiny_world" for seed in (7, 8)}
    assert names < {run.info.run_name for run in runs}
    for run in runs:
        assert run.info.artifact_uri.startswith(f"{there.as_uri()}/")
        assert client.list_artifacts(run.info.run_id)


def test_a_sweep_that_runs_is_not_dropped(storage):
    before, state = everything(storage), storage / "sweeps" / "full_grid" / "state.json"
    with heartbeat(storage) as running:
        state.write_text(json.dumps({**json.loads(state.read_text()), "driver": running.driver}))
        assert "it runs now" in grid(storage, "gc", "--drop", "full_grid", "--delete", exits=2)
    assert everything(storage) == before
