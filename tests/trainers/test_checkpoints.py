"""A training that was cut short goes on from its checkpoint: bit for bit where it was, within 1e-5 elsewhere."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import found_once
from tests.trainers import gang
from tests.trainers.gang import Job
from trainers.storage import digest_file
from trainers.train.checkpoints import Checkpoints, complete, latest

PAIRS, EFFECTIVE_BATCH, EPOCHS = 10, 4, 3
STOPPED_AT = 4
OPTIM = {"lr": 1e-3, "epochs": EPOCHS, "effective_batch": EFFECTIVE_BATCH, "schedule": "cosine"}


def job(model: Path, out: Path, *, zero: int, world: int, kind: str = "im_rm", **options) -> Job:
    return Job(
        name=out.name,
        model=str(model),
        out=str(out),
        reward={"kind": kind, "beta": 0.1 if kind == "im_rm" else None},
        placement={"zero_stage": zero, "world_size": world, "forward_tokens": 300},
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

    def find(out):
        whole, cut, again = [], [], []
        for case in CASES:
            zero, precision, kind = case
            common = {"zero": zero, "world": 2, "kind": kind, "precision": precision}
            name = case_name(case)
            kept, going = (str(out / place / name) for place in ("kept", "going"))
            whole.append(job(tiny_model, out / f"whole-{name}", **common))
            stopped = {**common, "checkpoints": kept, "stop_after": STOPPED_AT}
            cut.append(job(tiny_model, out / f"cut-{name}", **stopped))
            again.append(job(tiny_model, out / f"again-{name}", **common, checkpoints=going))
        found = gang.launch([*whole, *cut], out / "first", 2)
        shutil.copytree(out / "kept", out / "going")
        return found | gang.launch(again, out / "second", 2)

    return found_once(tmp_path_factory, "world2", find)


def losses(found, name):
    return [row["loss"] for row in found[name]["log"]]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_resumed_at_the_same_world_size_is_bit_exact(world2, case):
    out, found = world2
    name = case_name(case)
    assert latest(out / "kept" / name)[0].step == STOPPED_AT
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
    assert [(row["indices"], row["lr"]) for row in again] == [(row["indices"], row["lr"]) for row in whole]
    assert len({row["lr"] for row in whole}) == len(whole)
    cut, faults = latest(out / "kept" / name)
    total = EPOCHS * -(-PAIRS // EFFECTIVE_BATCH)
    assert (cut.step, cut.total, cut.world_size, faults) == (STOPPED_AT, total, 2, [])
    assert again[:STOPPED_AT] == cut.log
    assert cut.write_s > 0


@pytest.mark.parametrize(
    ("world_size", "stages"),
    [
        (1, (0, 2)),
        pytest.param(4, (1, 3), marks=pytest.mark.slow),
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
        (kept / "step00000001-dead").mkdir()
        common = {"zero": zero, "world": world_size, "kind": kind, "checkpoints": str(kept)}
        jobs.append(job(tiny_model, tmp_path / case_name(case), **common))
    resumed = gang.launch(jobs, tmp_path, world_size)
    assert list((tmp_path / "kept").glob("*/step00000001-dead")) == []
    for case in cases:
        name = case_name(case)
        assert losses(resumed, name) == pytest.approx(losses(found, f"whole-{name}"), abs=1e-5), name


def written(folder: Path, step: int) -> Path:
    """A checkpoint as `save` leaves it; its one file."""
    tag = f"step{step:08d}-{step:x}"
    file = folder / tag / "rank0.pt"
    file.parent.mkdir(parents=True)
    file.write_text("weights")
    counts = {"step": step, "total": 9, "world_size": 1, "zero_stage": 0, "write_s": 0.1}
    files = {file.name: digest_file(file)}
    complete(folder, {**counts, "tag": tag, "training": {}, "log": [], "files": files})
    return file


def test_the_two_newest_checkpoints_are_kept_and_half_written_ones_go(tmp_path):
    (tmp_path / "step00000003-dead").mkdir()
    files = [written(tmp_path, step) for step in (1, 2, 10)]
    assert [file.exists() for file in files] == [False, True, True]
    kept = ["step00000002-2", "step00000010-a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*kept, *(f"{tag}.json" for tag in kept)]
    )


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("of", ["the file", "the marker"])
@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink], ids=["cut", "bit", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, of):
    written(tmp_path, 1)
    file = written(tmp_path, 2)
    damage(file if of == "the file" else file.parent.with_suffix(".json"))
    found, faults = latest(tmp_path)
    assert found.step == 1
    # A marker that is gone is a checkpoint that never was.
    silent = of == "the marker" and damage is Path.unlink
    assert len(faults) == (0 if silent else 1)
    assert silent or "step00000002-2 is damaged" in faults[0]


def test_every_bit_of_a_marker_counts(tmp_path):
    marker = written(tmp_path, 1).parent.with_suffix(".json")
    sound = marker.read_bytes()
    for position in range(0, len(sound), 7):
        content = bytearray(sound)
        content[position] ^= 1
        marker.write_bytes(content)
        assert latest(tmp_path)[0] is None, position


def test_by_the_clock_a_checkpoint_waits_for_ten_times_what_writing_one_takes(tmp_path):
    by_clock = Checkpoints(folder=tmp_path)
    assert [by_clock.due(1, since_s, 1) for since_s in (599, 600)] == [False, True]
    assert [by_clock.due(1, since_s, 90) for since_s in (600, 899, 900)] == [False, False, True]
    # Whoever gives steps means them.
    assert Checkpoints(folder=tmp_path, every_steps=2).due(2, 0, 1000)


def test_a_marker_that_is_written_late_leaves_the_files_of_the_next_checkpoint(tmp_path):
    coming = tmp_path / "step00000003-3" / "rank0.pt"
    coming.parent.mkdir()
    coming.write_text("weights")
    written(tmp_path, 2)
    assert coming.exists()
    written(tmp_path, 4)
    assert not coming.exists()


def test_a_damaged_checkpoint_cannot_name_a_path_outside(tmp_path):
    marker = written(tmp_path / "inside", 1).parent.with_suffix(".json")
    marker.write_text(marker.read_text().replace('"tag": "step', '"tag": "../step'))
    assert latest(tmp_path / "inside")[0] is None
