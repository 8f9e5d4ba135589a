"""Weights kept at the end of an epoch outlive a training that is cut short after it."""

import dataclasses
import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import trainings
from trainers.errors import Interrupted, StorageError
from trainers.pairs.tokens import TokenPair
from trainers.specs import OptimSpec
from trainers.train import checkpoints, loop
from trainers.train.checkpoints import Checkpoints
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


@pytest.mark.parametrize("mirrored", [False, True], ids=["folder", "bucket"])
def test_kept_weights_that_are_gone_or_damaged_are_said_and_not_passed_over(
    inputs, bucket, tmp_path, mirrored
):
    kept = cut_short(inputs, tmp_path, mirror=bucket.root if mirrored else None)
    if mirrored:
        (bucket.root / "model-epoch-1" / "model.safetensors").write_text("rotten")
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
