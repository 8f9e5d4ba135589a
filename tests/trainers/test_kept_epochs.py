"""Weights kept at the end of an epoch outlive a training that is cut short after it."""

import dataclasses
import functools
import itertools
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import trainings
from tests.trainers.gang import together
from trainers.errors import Interrupted, StorageError
from trainers.pairs.tokens import TokenPair
from trainers.specs import OptimSpec, Placement
from trainers.storage import parse_uri
from trainers.train import checkpoints, loop
from trainers.train.checkpoints import Checkpoints, Later
from trainers.train.loop import train

PAIRS = [TokenPair(index=i, prompt=[1, 5 + i], chosen=[3, 6 + i], rejected=[4, 9]) for i in range(4)]


@pytest.fixture
def inputs(tiny_model):
    optim = OptimSpec(lr=1e-3, epochs=3, effective_batch=2)
    return trainings.inputs(tiny_model, PAIRS, optim=optim, keep_epochs=(1, 2))


def run(inputs, out, **options):
    train(inputs, report=lambda row: None, out_dir=out, **options)
    return {folder.name: load_file(folder / "model.safetensors") for folder in out.iterdir()}


def cut_short(inputs, tmp_path, **options):
    """The checkpoints of a training that was stopped at step 3 of 6, in its second epoch."""
    kept = Checkpoints(folder=tmp_path / "checkpoints", every_steps=1, **options)
    asked = itertools.count(1)
    with pytest.raises(Interrupted):
        run(inputs, tmp_path / "cut", checkpoints=kept, stop=lambda: 100.0 if next(asked) >= 3 else None)
    return kept


@pytest.mark.parametrize("mirrored", [False, True], ids=["folder", "bucket"])
def test_a_training_that_goes_on_has_the_weights_of_the_epochs_before_it_was_cut(
    inputs, bucket, tmp_path, mirrored
):
    mirror = bucket.root if mirrored else None
    whole = run(inputs, tmp_path / "whole")
    kept = cut_short(inputs, tmp_path, mirror=mirror)
    assert (kept.kept / "model-epoch-1").is_dir()
    assert not (kept.kept / "model-epoch-2").is_dir()
    if mirrored:
        assert [file for file in kept.folder.rglob("*") if file.is_file()] == []
        kept = dataclasses.replace(kept, folder=tmp_path / "another machine")
    again = run(inputs, tmp_path / "again", checkpoints=kept)
    assert set(again) == set(whole) == {"model", "model-epoch-1", "model-epoch-2"}
    for name, weights in whole.items():
        assert all(torch.equal(again[name][key], weight) for key, weight in weights.items()), name
    first, second = whole["model-epoch-1"], whole["model-epoch-2"]
    assert not all(torch.equal(second[key], weight) for key, weight in first.items())


@pytest.mark.parametrize("mirrored", [False, True], ids=["folder", "bucket"])
def test_kept_weights_that_are_gone_or_damaged_are_said_and_not_passed_over(
    inputs, bucket, tmp_path, mirrored
):
    kept = cut_short(inputs, tmp_path, mirror=bucket.root if mirrored else None)
    if mirrored:
        (bucket.root / "model-epoch-1" / "model.safetensors").write_bytes(b"rotten")
    else:
        shutil.rmtree(kept.folder / "model-epoch-1")
    with pytest.raises(StorageError, match="model-epoch-1 are gone or not what was written"):
        run(inputs, tmp_path / "again", checkpoints=kept)


def test_weights_that_a_bucket_refuses_fail_the_training(inputs, bucket, tmp_path, monkeypatch):
    def refuse(folder, names, target):
        raise StorageError("the bucket is full")

    monkeypatch.setattr(checkpoints, "upload", refuse)
    kept = Checkpoints(folder=tmp_path / "checkpoints", every_steps=100, mirror=bucket.root)
    with pytest.raises(StorageError, match="the bucket is full"):
        run(inputs, tmp_path / "out", checkpoints=kept)


def test_the_finished_model_is_written_when_the_group_of_ranks_is_gone(inputs, tmp_path, monkeypatch):
    groups = []
    save = loop.save_model
    monkeypatch.setattr(
        loop, "save_model", lambda *given: groups.append(torch.distributed.is_initialized()) or save(*given)
    )
    run(dataclasses.replace(inputs, keep_epochs=()), tmp_path / "out")
    assert groups == [False]


def slowly(act, until):
    """`act` on weights of an epoch only once `until` is set, for which it waits at most 30 s."""

    def write(folder, names, target):
        if target.name.startswith("model-epoch"):
            assert until.wait(30), "no step was taken while the weights were on their way"
        act(folder, names, target)

    return write


def train_beside_a_slow_bucket(inputs, uri, folder):
    """A rank's training, in which weights of the first epoch are stored only after the second has begun."""
    began, rows = threading.Event(), []

    def follow(row):
        rows.append(row.get("step"))
        if row.get("step") == 4:
            began.set()

    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    kept = Checkpoints(folder=folder / os.environ["RANK"], every_steps=2, mirror=parse_uri(uri))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "upload", slowly(checkpoints.upload, began))
        train(inputs, report=follow, out_dir=folder / f"out{os.environ['RANK']}", checkpoints=kept)
    return rows


def test_a_slow_bucket_keeps_no_rank_from_the_next_steps(inputs, bucket, tmp_path):
    inputs = dataclasses.replace(inputs, placement=Placement(world_size=2, forward_tokens=4096))
    work = functools.partial(train_beside_a_slow_bucket, inputs, bucket.uri, tmp_path)
    assert together(work, tmp_path / "gang", 2)[-1] == 6
    made = {folder.name for folder in (tmp_path / "out0").iterdir()}
    assert made == {"model", "model-epoch-1", "model-epoch-2"}
    # Weights, then the checkpoint of the step at which the epoch ended.
    assert [path.name for path in tmp_path.glob("?/*")] == []
    assert len([*bucket.root.glob("step*.json")]) == 2


def test_after_a_write_that_failed_there_are_no_more_and_its_error_is_raised():
    written, go = [], threading.Event()

    def fail():
        assert go.wait(30)
        raise StorageError("the bucket is full")

    def give():
        with Later() as later:
            # A checkpoint would be without its epoch's weights.
            for act in (lambda: written.append("weights"), fail, lambda: written.append("marker")):
                later.write(act)
            go.set()

    with pytest.raises(StorageError, match="the bucket is full"):
        give()
    assert written == ["weights"]
