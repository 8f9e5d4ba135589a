"""A disk that fills up, as a small tmpfs: a hole that names the path and the need, nothing half-written, and a way on."""

import json
import shutil
import subprocess
from functools import partial

import pytest

from orchestrator.store.artifacts import MANIFEST, Store
from orchestrator.store.records import read_state
from tests.conftest import missing
from tests.faults.hooks import all_of, impatient
from tests.faults.lives import artifacts, leftovers, lived

MOUNT_MB = 16
PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MOUNT_MB}m", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode
    except FileNotFoundError:
        done = 1
    if done != 0:
        missing("permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(filler, leave):
    """Take all room of the disk but `leave` bytes."""
    free = shutil.disk_usage(filler.parent).free
    with filler.open("ab") as stream:
        stream.write(b"\0" * max(0, free - leave))


def fills_before_saving(filler, leave):
    """Somebody else takes the room between the look at it and DeepSpeed's write."""
    import trainers.train.checkpoints

    def filled(folder, need):
        fill(filler, leave)

    trainers.train.checkpoints._require_room_together = filled


def weights_bytes(whole):
    return max(file.stat().st_size for file in (whole / "artifacts" / "weights").rglob("*.safetensors"))


def half_written(storage):
    """Attempts that no manifest names, and drafts of files; checkpoints are looked at elsewhere."""
    attempts = [
        folder
        for folder in (storage / "artifacts").glob("*/*/*")
        if folder.is_dir() and not Store(storage).complete(*folder.parent.parts[-2:])
    ]
    return [*attempts, *storage.rglob(".draft-*")]


def messages(storage):
    """trial key → what was noted of those that failed."""
    notes = read_state("full_grid", Store(storage)).trials
    return {key: note.message for key, note in notes.items() if note.state == "failed"}


def test_no_room_for_the_weights(disk, one, four, whole):
    storage, filler = disk / "store", disk / "filler"
    lived(storage, one)
    before = artifacts(storage)
    fill(filler, weights_bytes(whole) - 2 * PAGE)
    words = [word for word in four if word not in ("--checkpoint-steps", "3")]
    said = lived(storage, words, impatient, exits=3)
    holes = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert len(holes) == 3
    for line in holes:
        assert f"no room to write {storage}/artifacts/weights/" in line
        assert " MB are needed" in line
    assert all(message.startswith("no room to write") for message in messages(storage).values())
    (*_, row) = json.loads(lived(storage, ["status", "--json"], exits=3))
    assert (row["state"], row["retries"]) == ("failed", 1)
    assert half_written(storage) == []
    now = artifacts(storage)
    assert {name: now[name] for name in before} == before
    assert not any(name.startswith("train/") for name in now.keys() - before.keys())
    filler.unlink()
    lived(storage, words)
    assert artifacts(storage) == artifacts(whole)
    assert leftovers(storage) == []


def test_no_room_in_the_middle_of_a_checkpoint(disk, one, whole):
    storage, filler = disk / "store", disk / "filler"
    hook = partial(fills_before_saving, filler, 2 * weights_bytes(whole))
    said = lived(storage, one, partial(all_of, impatient, hook), exits=3)
    (line,) = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert f"no room to write {storage}/checkpoints/" in line
    assert " MB are needed" in line
    assert list((storage / "checkpoints").glob("*/*")) == []
    assert half_written(storage) == []
    filler.unlink()
    lived(storage, one)
    mine, wanted = artifacts(storage), artifacts(whole)
    assert mine == {name: wanted[name] for name in mine}
    assert leftovers(storage) == []


def no_room_for_pairs(filler):
    """The disk fills up right before the pairs are written."""
    import trainers.pairs.tokens

    write = trainers.pairs.tokens.write_tokens

    def filled(tokens, file):
        fill(filler, 0)
        return write(tokens, file)

    trainers.pairs.tokens.write_tokens = filled


def test_not_a_byte_of_room_from_the_preparation_on(disk, one, whole):
    storage, filler = disk / "store", disk / "filler"
    said = lived(storage, one, partial(all_of, impatient, partial(no_room_for_pairs, filler)), exits=3)
    # With no room for its note and its report either.
    (line,) = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert f"no room to write {storage}/artifacts/prepare/" in line
    # The first file of the report that is written.
    assert f"error: no room to write {storage}/sweeps/full_grid/report/summary.md: about" in said, said
    assert "missing: " in said
    assert half_written(storage) == []
    assert not list((storage / "artifacts").glob(f"prepare/*/{MANIFEST}"))
    assert json.loads(lived(storage, ["status", "--json"], exits=3))[0]["trained"] is False
    filler.unlink()
    lived(storage, one)
    mine, wanted = artifacts(storage), artifacts(whole)
    assert mine == {name: wanted[name] for name in mine}
    assert leftovers(storage) == []
