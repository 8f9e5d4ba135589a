"""Checkpoints in a bucket: nodes that share no folder write one together, and any nodes go on from it bit for bit."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import gang
from tests.trainers.gang import Job

OPTIM = {"lr": 1e-3, "epochs": 3, "effective_batch": 4, "schedule": "cosine"}
STOPPED_AT = 4


def job(name, model, folder, world, **options):
    placement = {"zero_stage": 2, "world_size": world, "forward_tokens": 1}
    where = {"name": name, "model": str(model), "out": str(folder / name)}
    return Job(
        **where,
        reward={"kind": "ex_rm"},
        placement=placement,
        optim=OPTIM,
        pairs=10,
        every_steps=2,
        **options,
    )


def assert_same_weights(folder):
    again, whole = (load_file(folder / name / "model" / "model.safetensors") for name in ("again", "whole"))
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_two_nodes_write_a_checkpoint_and_two_others_go_on_from_it(tiny_model, bucket, tmp_path):
    whole = job("whole", tiny_model, tmp_path, 2)
    mirrored = {"mirror": bucket.uri, "checkpoints": str(tmp_path / "first")}
    cut = job("cut", tiny_model, tmp_path, 2, stop_after=STOPPED_AT, **mirrored)
    gang.launch([whole, cut], tmp_path / "launched", 2)
    shards = [path.name for path in bucket.root.sizes() if path.name.endswith("optim_states.pt")]
    # One of each node, of two checkpoints; and nothing stays on the nodes.
    assert len(shards) == 4
    assert [file for file in (tmp_path / "first").rglob("*") if file.is_file()] == []
    again = dataclasses.replace(cut, name="again", out=str(tmp_path / "again"), stop_after=None)
    found = gang.launch(
        [dataclasses.replace(again, checkpoints=str(tmp_path / "second"))], tmp_path / "again-launched", 2
    )
    assert [row["step"] for row in found["again"]["log"]][:5] == [1, 2, 3, 4, 5]
    assert_same_weights(tmp_path)


def test_alone_it_goes_on_bit_for_bit_and_a_damaged_checkpoint_is_passed_over(tiny_model, bucket, tmp_path):
    whole = job("whole", tiny_model, tmp_path, 1)
    mirrored = {"mirror": bucket.uri, "checkpoints": str(tmp_path / "node")}
    cut = job("cut", tiny_model, tmp_path, 1, stop_after=STOPPED_AT, **mirrored)
    for each in (whole, cut):
        gang._run(each)
    markers = sorted(bucket.root.glob("*.json"))
    assert [marker.name[:12] for marker in markers] == ["step00000002", "step00000004"]
    shard = next(path for path in (bucket.root / markers[-1].stem).sizes() if "optim_states" in path.name)
    shard.write_bytes(b"cut short")
    notices = []
    result = gang._run(
        dataclasses.replace(cut, name="again", out=str(tmp_path / "again"), stop_after=None), notices.append
    )
    said = " ".join(row["notice"] for row in notices if "notice" in row)
    assert "is passed over" in said
    assert "resumed at step 2 of 9" in said
    assert len(result["log"]) == 9
    assert_same_weights(tmp_path)
