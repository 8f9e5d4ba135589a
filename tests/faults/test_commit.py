"""Killed at every point of a commit and of a checkpoint's write: readers find nothing or all, and the next one writes."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from orchestrator.artifacts import Store
from tests.faults.lives import forked
from trainers.checkpoints import Checkpoints, latest, save

KEY = "0" * 32
CONTENT = {"model/weights.bin": b"w" * 5000, "log.parquet": b"l" * 300}


def dies_at(number):
    """Make this process kill itself right before (odd numbers) or right after (even ones) a call that matters."""
    import orchestrator.artifacts
    import trainers.checkpoints

    calls = []

    def deadly(function):
        def calling(*arguments, **named):
            calls.append(1)
            mine = len(calls)
            if 2 * mine - 1 == number:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **named)
            finally:
                if 2 * mine == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        return calling

    for owner, name in (
        *((os, name) for name in ("link", "fsync", "replace", "rename", "unlink", "mkdir")),
        (Path, "open"),
        (shutil, "rmtree"),
        (torch, "save"),
        (orchestrator.artifacts, "digest_file"),
        (trainers.checkpoints, "digest_file"),
    ):
        setattr(owner, name, deadly(getattr(owner, name)))


def write_artifact(root, dies):
    """One writer: removes what others left, as who holds the claim, and writes."""
    if dies:
        dies_at(dies)
    write(Store(root))


def write(store):
    store.remove_leftovers("train", KEY)
    with store.write("train", KEY) as attempt:
        for name, content in CONTENT.items():
            file = attempt.directory / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)


def deaths(start):
    """Yield the exit code of a process that dies at its first point, its second, …; the last one lives."""
    for number in range(1, 400):
        process = start(number)
        process.join(60)
        yield process.exitcode
        if process.exitcode == 0:
            return
    raise AssertionError("it never survived")


def whole(root):
    folder = Store(root).read("train", KEY)
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return found == CONTENT


@pytest.mark.parametrize("over", ["nothing", "a damaged one", "an evicted one"])
def test_killed_while_an_artifact_is_committed(tmp_path, over):
    seen = {"nothing": 0, "whole": 0}
    roots = []

    def start(number):
        root = tmp_path / f"store{number}"
        roots.append(root)
        if over != "nothing":
            prepare(Store(root), over)
        return forked(root, write_artifact, (root, number))

    for code in deaths(start):
        assert code in (0, -signal.SIGKILL), code
        root = roots[-1]
        store = Store(root)
        committed = store.complete("train", KEY) and store.evicted("train", KEY) is None
        seen["whole" if committed else "nothing"] += 1
        assert not committed or whole(root)
        if committed:
            store.remove_leftovers("train", KEY)
        else:
            write(store)
        assert whole(root)
        folder = root / "artifacts" / "train" / KEY
        # A note on an evicted attempt that is superseded says nothing any more.
        left = [path.name for path in folder.iterdir() if path.name != "evicted.json"]
        assert sorted(left) == sorted(["manifest.json", Store(root).read("train", KEY).name]), len(roots)
    assert seen["nothing"] > 5
    assert seen["whole"] > 1


def prepare(store, over):
    """An artifact that the writer replaces: with a damaged manifest, or with evicted weights."""
    write(store)
    manifest = store.root / "artifacts" / "train" / KEY / "manifest.json"
    if over == "a damaged one":
        manifest.write_bytes(manifest.read_bytes()[:100])
        return
    attempt = store.manifest("train", KEY)["attempt"]
    name = "model/weights.bin"
    (manifest.parent / attempt / name).unlink()
    record = {"attempt": attempt, "files": [name], "bytes": 5000, "train_seconds": 1.0}
    (manifest.parent / "evicted.json").write_text(json.dumps(record))


class Engine:
    """What `save` asks of DeepSpeed's engine, for one process."""

    module = torch.nn.Linear(4, 4)

    def save_checkpoint(self, folder, tag, **_):
        target = Path(folder) / tag
        target.mkdir(parents=True)
        torch.save(self.module.state_dict(), target / "rank0.pt")

    def zero_optimization_stage(self):
        return 0


def write_checkpoint(folder, step, dies=0):
    """Save a checkpoint as a world of one."""
    from trainers.engine import process_group

    with process_group():
        if dies:
            dies_at(dies)
        log = [{"step": number + 1} for number in range(step)]
        save(Engine(), Checkpoints(folder=folder), log, total=9, training={})


def test_killed_while_a_checkpoint_is_written(tmp_path):
    before = tmp_path / "before"
    for step in (1, 2, 3):
        process = forked(before, write_checkpoint, (before, step))
        process.join(60)
        assert process.exitcode == 0
    folders, seen = [], []

    def start(number):
        folder = shutil.copytree(before, tmp_path / f"checkpoints{number}")
        folders.append(folder)
        return forked(folder, write_checkpoint, (folder, 4, number))

    for code in deaths(start):
        assert code in (0, -signal.SIGKILL), code
        found, faults = latest(folders[-1])
        assert faults == []
        assert found.step in (3, 4)
        assert len(found.log) == found.step
        seen.append(found.step)
    assert set(seen) == {3, 4}
    # One of each death goes on to the next checkpoint, and leaves the two newest alone.
    for folder in (folders[2], folders[seen.index(4) - 1], folders[seen.index(4)]):
        process = forked(folder, write_checkpoint, (folder, 5))
        process.join(60)
        assert process.exitcode == 0
        assert latest(folder)[0].step == 5
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 4, left
