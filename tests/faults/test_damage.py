"""Files cut short, with a flipped bit, or gone: no result is of them, and the same command computes just that again."""

import json
import shutil

import pytest

from orchestrator.store.artifacts import MANIFEST, Store
from tests.faults.lives import artifacts, lived


def cut_short(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


DAMAGES = (cut_short, flip_a_bit, remove)


def manifests(storage):
    """stage/key → when its manifest was written, and its bytes."""
    return {
        f"{file.parent.parent.name}/{file.parent.name}": (file.stat().st_mtime_ns, file.read_bytes())
        for file in (storage / "artifacts").glob(f"*/*/{MANIFEST}")
    }


def forget(storage, stage, key):
    shutil.rmtree(storage / "artifacts" / stage / key)


def cells(storage):
    """Trials as declared: (name, training key, evaluation keys)."""
    trials = json.loads((storage / "sweeps" / "full_grid" / "sweep.json").read_text())["trials"]
    return [(trial["name"], trial["key"], [item["key"] for item in trial["evaluations"]]) for trial in trials]


def file_of(storage, stage, key, name):
    return Store(storage).read(stage, key) / name


def inputs(storage, stage, key):
    return json.loads((storage / "artifacts" / stage / key / MANIFEST).read_text())["inputs"]


def mended(storage, four, whole, damaged, recomputed, holes=0):
    """Damage files, run again: exactly `recomputed` is new, all is as it was, and every file was named. What was said.

    What only a stage reads is found when it does: so many commands before the last end with a hole.
    """
    before = manifests(storage)
    for file, damage in damaged:
        damage(file)
    said = "".join(lived(storage, four, exits=3) for _ in range(holes)) + lived(storage, four)
    after = manifests(storage)
    assert {name for name in after if after[name] != before.get(name)} == recomputed, said
    assert artifacts(storage) == artifacts(whole)
    for file, _ in damaged:
        assert said.count(str(file)) == 1, said
    return said


def test_scores_of_a_complete_sweep(storage, four, whole):
    keys = [evaluated[number % 2] for number, (_, _, evaluated) in enumerate(cells(storage)[:3])]
    files = [file_of(storage, "evaluate", key, "scores.parquet") for key in keys]
    recomputed = {f"evaluate/{key}" for key in keys}
    said = mended(storage, four, whole, [*zip(files, DAMAGES, strict=True)], recomputed)
    assert "to run: 3 evaluate" in said


def test_manifests(storage, four, whole):
    (_, trained, _), (_, _, evaluated), (_, gone, _), _ = cells(storage)
    recomputed = {f"train/{trained}", f"train/{gone}", f"evaluate/{evaluated[0]}"}
    folder = storage / "artifacts"
    # One that is gone is a stage that never was.
    remove(folder / "train" / gone / MANIFEST)
    damaged = [
        (folder / "train" / trained / MANIFEST, cut_short),
        (folder / "evaluate" / evaluated[0] / MANIFEST, flip_a_bit),
    ]
    before = manifests(whole)
    assert before.keys() - manifests(storage).keys() == {f"train/{gone}"}
    mended(storage, four, whole, damaged, recomputed)


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))])
def test_what_a_missing_stage_reads(storage, four, whole, turn):
    damages = DAMAGES[turn:] + DAMAGES[:turn]
    (_, scored, evaluated), (_, trained, _), *_ = cells(storage)
    # The first cell lacks an evaluation, the second with its reference model its training, and the set its pairs.
    names = [name for name, _, _ in cells(storage)]
    assert ["im_rm" in name for name in names] == [False, True, False, True], names
    data = inputs(storage, "train", trained)["data"]
    (reference,) = (
        file.parent.name
        for file in (storage / "artifacts" / "reference").glob(f"*/{MANIFEST}")
        if inputs(storage, "reference", file.parent.name)["data"] == data
    )
    damaged = [
        (file_of(storage, "weights", scored, "model/model.safetensors"), damages[0]),
        (file_of(storage, "prepare", data, "pairs.arrow"), damages[1]),
        (file_of(storage, "reference", reference, "reference.parquet"), damages[2]),
    ]
    forget(storage, "evaluate", evaluated[0])
    forget(storage, "train", trained)
    recomputed = {f"train/{scored}", f"weights/{scored}", f"evaluate/{evaluated[0]}", f"prepare/{data}"}
    recomputed |= {f"reference/{reference}", f"train/{trained}"}
    # The second cell reads its pairs first, and its reference once these are there.
    said = mended(storage, four, whole, damaged, recomputed, holes=2)
    assert said.count("is computed anew by the same command") == len(damaged)


def test_the_manifest_of_weights_that_a_missing_evaluation_reads(storage, one, whole):
    _, trained, evaluated = cells(storage)[0]
    forget(storage, "evaluate", evaluated[0])
    file = storage / "artifacts" / "weights" / trained / MANIFEST
    recomputed = {f"weights/{trained}", f"evaluate/{evaluated[0]}"}
    mended(storage, (*one, "--replace"), whole, [(file, cut_short)], recomputed)


@pytest.mark.parametrize("damage", [flip_a_bit, remove])
def test_rows_that_a_missing_preparation_reads(storage, one, whole, damage):
    _, trained, _ = cells(storage)[0]
    prepared = inputs(storage, "train", trained)["data"]
    digest = inputs(storage, "prepare", prepared)["dataset"]
    forget(storage, "train", trained)
    forget(storage, "prepare", prepared)
    file = file_of(storage, "dataset", digest, "pairs.jsonl")
    recomputed = {f"dataset/{digest}", f"prepare/{prepared}", f"train/{trained}"}
    mended(storage, (*one, "--replace"), whole, [(file, damage)], recomputed)


@pytest.mark.parametrize("damage", [cut_short, remove])
def test_a_log_costs_no_training(storage, one, damage):
    _, trained, evaluated = cells(storage)[0]
    file = file_of(storage, "train", trained, "log.parquet")
    # An evaluation is missing, so that the weights beside the log are read.
    forget(storage, "evaluate", evaluated[0])
    before = manifests(storage)
    damage(file)
    said = lived(storage, (*one, "--replace"))
    after = manifests(storage)
    assert {name for name in after if after[name] != before.get(name)} == {f"evaluate/{evaluated[0]}"}
    assert f"{file} is missing or not what was written; MLflow does not show its curve" in said
    assert "MLflow view is incomplete" not in said


@pytest.mark.parametrize("what", ["scores", "manifest"])
def test_status_and_report_name_what_is_damaged(storage, four, what):
    name, _, evaluated = cells(storage)[1]
    if what == "scores":
        file = file_of(storage, "evaluate", evaluated[0], "scores.parquet")
    else:
        file = storage / "artifacts" / "evaluate" / evaluated[0] / MANIFEST
    flip_a_bit(file)
    said = lived(storage, ["status", "--json"], exits=3)
    (row,) = [row for row in json.loads(said) if row["state"] != "complete"]
    assert (row["trial"], row["state"], row["evaluations"]) == (name, "missing", "1/2")
    assert str(file) in row["cause"]
    said = lived(storage, ["report"], exits=3)
    assert f"missing: {name}: {file}" in said
    assert lived(storage, four).count("damaged: ") == 1
