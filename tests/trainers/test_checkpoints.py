"""A training that was cut short goes on from its checkpoint: bit for bit where it was, within 1e-5 elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import gang
from tests.trainers.gang import Job
from trainers.checkpoints import latest

PAIRS, EFFECTIVE_BATCH, EPOCHS = 10, 4, 3
STOPPED_AT = 4
OPTIM = {"lr": 1e-3, "epochs": EPOCHS, "effective_batch": EFFECTIVE_BATCH, "schedule": "cosine"}


def job(model: Path, out: Path, *, zero: int, world: int, kind: str = "im_rm", **options) -> Job:
    placement = {
        "zero_stage": zero,
        "world_size": world,
        "micro_batch": 1,
        "accumulation": EFFECTIVE_BATCH // world,
    }
    return Job(
        name=out.name,
        model=str(model),
        out=str(out),
        reward={"kind": kind, "beta": 0.1 if kind == "im_rm" else None},
        placement=placement,
        optim=OPTIM,
        pairs=PAIRS,
        every_steps=STOPPED_AT,
        **options,
    )


CASES = [
    (0, "fp32", "im_rm"),
    (1, "bf16", "ex_rm"),
    (1, "fp32", "im_rm"),
    (2, "fp32", "ex_rm"),
    (3, "fp32", "im_rm"),
]


def case_name(case) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="module")
def world2(tiny_model, tmp_path_factory):
    """At world size 2: each case whole, cut short, and gone on with; the checkpoints kept as the cut left them."""
    out = tmp_path_factory.mktemp("world2")
    whole, cut, again = [], [], []
    for case in CASES:
        zero, precision, kind = case
        common = {"zero": zero, "world": 2, "kind": kind, "precision": precision}
        name = case_name(case)
        whole.append(job(tiny_model, out / f"whole-{name}", **common))
        cut.append(
            job(
                tiny_model,
                out / f"cut-{name}",
                **common,
                checkpoints=str(out / "kept" / name),
                stop_after=STOPPED_AT,
            )
        )
        again.append(job(tiny_model, out / f"again-{name}", **common, checkpoints=str(out / "going" / name)))
    found = gang.launch([*whole, *cut], out / "first", 2)
    shutil.copytree(out / "kept", out / "going")
    return out, found | gang.launch(again, out / "second", 2)


def losses(found, name):
    return [row["loss"] for row in found[name]["log"]]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_resumed_at_the_same_world_size_is_bit_exact(world2, case):
    out, found = world2
    name = case_name(case)
    assert latest(out / "kept" / name).step == STOPPED_AT
    assert found[f"cut-{name}"]["log"] is None
    assert not (out / f"cut-{name}").exists()
    assert losses(found, f"again-{name}") == losses(found, f"whole-{name}")
    weights = [
        load_file(out / f"{what}-{name}" / "model" / "model.safetensors") for what in ("whole", "again")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_resumed_log_goes_on_with_the_next_pairs(world2):
    out, found = world2
    name = case_name(CASES[0])
    whole, again = found[f"whole-{name}"]["log"], found[f"again-{name}"]["log"]
    assert [row["indices"] for row in again] == [row["indices"] for row in whole]
    assert [row["lr"] for row in again] == [row["lr"] for row in whole]
    assert len({row["lr"] for row in whole}) == len(whole)
    cut = latest(out / "kept" / name).log
    assert len(cut) == STOPPED_AT
    assert again[:STOPPED_AT] == cut


@pytest.mark.parametrize(
    ("world_size", "stages"),
    [
        (1, (0, 2)),
        (4, (1, 3)),
        pytest.param(1, (1, 3), marks=pytest.mark.slow),
        pytest.param(4, (0, 2), marks=pytest.mark.slow),
    ],
)
def test_resumed_at_another_world_size_within_1e_5(world2, tiny_model, tmp_path, world_size, stages):
    out, found = world2
    cases = [case for case in CASES if case[1] == "fp32" and case[0] in stages]
    jobs = []
    for case in cases:
        zero, _, kind = case
        kept = tmp_path / "kept" / case_name(case)
        shutil.copytree(out / "kept" / case_name(case), kept)
        jobs.append(
            job(
                tiny_model,
                tmp_path / case_name(case),
                zero=zero,
                world=world_size,
                kind=kind,
                checkpoints=str(kept),
            )
        )
    resumed = gang.launch(jobs, tmp_path, world_size)
    for case in cases:
        name = case_name(case)
        assert losses(resumed, name) == pytest.approx(losses(found, f"whole-{name}"), abs=1e-5), name


def test_a_checkpoint_without_its_marker_does_not_count(world2, tmp_path):
    out, _ = world2
    kept = tmp_path / "kept"
    shutil.copytree(out / "kept" / case_name(CASES[0]), kept)
    (kept / "complete.json").unlink()
    assert latest(kept) is None


def test_only_the_last_checkpoint_is_kept(world2):
    out, _ = world2
    going = out / "going" / case_name(CASES[0])
    steps = EPOCHS * -(-PAIRS // EFFECTIVE_BATCH)
    assert latest(going).step == steps - steps % STOPPED_AT
    assert [folder.name for folder in going.iterdir() if folder.is_dir()] == [latest(going).tag]
    assert json.loads((going / "complete.json").read_text())["world_size"] == 2
