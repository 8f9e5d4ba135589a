"""One small sweep from --keep-weights best to gc --delete, on the command line: what is freed, and what comes back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store.leases import heartbeat
from tests.faults.lives import lived

SMALL = ("--backend", "inline", "--train-sets", "tiny_world")
SMALL += ("--epochs", "1", "--max-train-pairs", "16", "--max-eval-pairs", "8")
NARROW = ("--eval-sets", "tiny_world", "--rewards", "ex_rm", "--seeds", "0")
WIDE = ("--eval-sets", "tiny_world", "--seeds", "0", "1")
WIDER = ("--eval-sets", "tiny_world", "hamiltonian", "--seeds", "0", "1")


def grid(storage: Path, *arguments: str) -> str:
    """Run the command, which must end well; what it says, as one line."""
    said = lived(storage, arguments)
    return said if "--json" in arguments else " ".join(said.split())


def trainings(storage: Path) -> dict[str, dict[str, Any]]:
    """Training key → its manifest."""
    files = (storage / "artifacts" / "train").glob("*/manifest.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def with_weights(storage: Path) -> set[str]:
    """Keys of trainings whose weights are there."""
    found = (storage / "artifacts" / "weights").glob("*/*/model/model.safetensors")
    return {file.parent.parent.parent.name for file in found}


def artifacts(storage: Path) -> set[str]:
    """Every artifact as stage/key."""
    return {f"{folder.parent.name}/{folder.name}" for folder in (storage / "artifacts").glob("*/*")}


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
    assert "of weights evicted (--keep-weights best)" in grid(
        folder, "run", *small, *WIDE, "--keep-weights", "best"
    )
    return folder


@pytest.fixture
def storage(swept, tmp_path):
    """A copy, as each test changes it."""
    return shutil.copytree(swept, tmp_path / "store")


def test_weights_go_and_come_back_and_garbage_goes(small, storage):
    first, kept = trainings(storage), with_weights(storage)
    assert len(first) == 4
    assert len(kept) == 2
    assert "4 trials in sqlite" in grid(storage, "sync")
    assert trainings(storage) == first

    # An added evaluation set needs the evicted trainings, and no other, again.
    took = sum(manifest["seconds"] for key, manifest in first.items() if key not in kept)
    said = f"2 train again, as their weights were evicted; they took {took:,.0f} s"
    assert said in grid(storage, "plan", *small, *WIDER)
    rows = json.loads(grid(storage, "plan", *small, *WIDER, "--json"))["trials"]
    assert sum(row["trains_again_s"] or 0 for row in rows) == pytest.approx(took)
    assert said in grid(storage, "run", *small, *WIDER)
    assert trainings(storage) == first
    assert with_weights(storage) == set(first)
    for stage in ("train", "weights"):
        for folder in (storage / "artifacts" / stage).iterdir():
            manifest = json.loads((folder / "manifest.json").read_text())
            assert {item.name for item in folder.iterdir()} == {"manifest.json", manifest["attempt"]}

    # Another grid takes no name by chance, and what a replaced one needs is garbage only where one asks; looking removes nothing.
    assert "nothing to remove" in grid(storage, "gc")
    before = everything(storage)
    refused = " ".join(lived(storage, ["run", *small, *NARROW], exits=2).split())
    assert "· ex_rm · tiny_world · s0 on hamiltonian, " in refused
    assert "s1 and 1 more. Nothing was started: give it a name of its own (--name full_grid-2)" in refused
    assert "all 1 trials are complete" in grid(storage, "run", *small, *NARROW, "--replace")
    assert "nothing to remove" in grid(storage, "gc")
    listed = json.loads(grid(storage, "gc", "--drop-earlier", "--json"))
    stages = [item["path"].split("/")[1] for item in listed]
    assert {stage: stages.count(stage) for stage in stages} == {
        "dataset": 1,
        "evaluate": 7,
        "prepare": 1,
        "reference": 3,
        "train": 3,
        "weights": 3,
    }
    assert not any(item["removed"] for item in listed)
    assert "nothing is removed without --delete" in grid(storage, "gc", "--drop-earlier")
    assert everything(storage) == before

    total = sum(item["bytes"] for item in listed)
    assert f"18 of 18 items removed, {total / 1e9:.4f} GB freed" in grid(
        storage, "gc", "--drop-earlier", "--delete"
    )
    assert sum(everything(storage).values()) == sum(before.values()) - total
    assert "nothing to remove" in grid(storage, "gc")

    # What was removed is computed again, and nothing else.
    (survivor,) = trainings(storage).items()
    again = grid(storage, "run", *small, *WIDER)
    assert "4 trials, 0 complete; to run: 7 evaluate, 1 prepare, 3 reference, 3 train" in again
    assert "train again" not in again
    third = trainings(storage)
    assert third[survivor[0]] == survivor[1]
    accuracies = {key: manifest["info"]["train_accuracy"] for key, manifest in third.items()}
    assert accuracies == {key: manifest["info"]["train_accuracy"] for key, manifest in first.items()}


def test_a_narrowed_grid_stays_the_sweep_that_it_is_part_of(small, storage):
    said = grid(storage, "run", *small, *WIDE, "--only", "seed=0", "reward=ex_rm")
    assert "all 1 trials are complete" in said
    rows = json.loads(grid(storage, "status", "--json"))
    assert len(rows) == 4
    assert "nothing to remove" in grid(storage, "gc", "--drop-earlier")
    # One that it has with other settings is no part of it; beside it a grid adds up.
    other = ["run", *small, *WIDE, "--lr", "0.01", "--only", "seed=0"]
    assert "with other data or settings" in lived(storage, other, exits=2)
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
    assert {"ex_rm · s7 · tiny-model · tiny_world", "ex_rm · s8 · tiny-model · tiny_world"} < {
        run.info.run_name for run in runs
    }
    for run in runs:
        assert run.info.artifact_uri.startswith(f"{there.as_uri()}/")
        assert client.list_artifacts(run.info.run_id)


def test_a_sweep_to_drop_that_nobody_declared_is_refused(storage):
    before = everything(storage)
    said = lived(storage, ["gc", "--drop", "fullgrid", "--delete"], exits=2)
    assert "did you mean full_grid" in said
    assert everything(storage) == before


def test_a_dropped_sweep_leaves_what_another_one_needs_and_its_own_report(small, storage):
    narrow = ["run", *small, *NARROW, "--name", "narrow"]
    assert "all 1 trials are complete" in grid(storage, *narrow)
    assert "nothing to remove" in grid(storage, "gc")
    kept = json.loads((storage / "sweeps" / "narrow" / "sweep.json").read_text())["artifacts"]
    before = artifacts(storage)
    state = storage / "sweeps" / "full_grid" / "state.json"
    noted = state.read_text()
    with heartbeat(storage) as running:
        state.write_text(json.dumps({**json.loads(noted), "driver": running.driver}))
        assert "it runs now" in lived(storage, ["gc", "--drop", "full_grid", "--delete"], exits=2)
    state.write_text(noted)
    assert "items removed" in grid(storage, "gc", "--drop", "full_grid", "--delete")
    # Weights are a training's.
    assert (
        artifacts(storage) == {name for name in before if name.replace("weights/", "train/") in kept} < before
    )
    assert (storage / "sweeps" / "full_grid" / "report" / "report.html").is_file()
    assert "all 1 trials are complete" in grid(storage, *narrow)
