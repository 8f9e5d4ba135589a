"""Killed at every point of a commit and of a checkpoint's write: readers find nothing or all, and the next one writes."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from orchestrator.store.artifacts import Store
from tests.faults.lives import forked, output
from trainers.train.checkpoints import Checkpoints, Later, latest, save

KEY = "0" * 32
CONTENT = {"model/weights.safetensors": b"w" * 5000, "log.parquet": b"l" * 300}


def dies_at(number):
    """Make this process kill itself right before (odd numbers) or right after (even ones) a call that matters."""
    import orchestrator.store.artifacts
    import trainers.train.checkpoints

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
        (orchestrator.store.artifacts, "digest_file"),
        (trainers.train.checkpoints, "digest_file"),
    ):
        setattr(owner, name, deadly(getattr(owner, name)))


def write_artifact(root):
    """One writer: removes what others left, as who holds the lease, and writes."""
    write(Store(root))


def write(store):
    store.remove_leftovers("train", KEY)
    with store.write("train", KEY) as attempt:
        for name, content in CONTENT.items():
            file = attempt.directory / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)


def die_everywhere(folder, write):
    """Fork writers on copies of <folder>/before, 1, 2, …: each dies at the point of its number, and the last one lives."""
    for number in range(1, 400):
        target = folder / str(number)
        if (folder / "before").is_dir():
            shutil.copytree(folder / "before", target)
        pid = os.fork()
        if pid == 0:
            try:
                dies_at(number)
                write(target)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with (folder / "codes.txt").open("a") as stream:
            stream.write(f"{code}\n")
        if code != -signal.SIGKILL:
            return


def deaths(folder, write):
    """What the writers left, in the order in which they died; the last one lived."""
    process = forked(folder / "said", die_everywhere, (folder, write))
    process.join(600)
    codes = [int(code) for code in (folder / "codes.txt").read_text().split()]
    assert codes[-1] == 0, (codes, output(folder / "said"))
    return [folder / str(number) for number in range(1, len(codes) + 1)]


def whole(root):
    folder = Store(root).read("train", KEY)
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return found == CONTENT


@pytest.mark.parametrize("over", ["nothing", "a damaged one"])
def test_killed_while_an_artifact_is_committed(tmp_path, over):
    if over != "nothing":
        before = Store(tmp_path / "before")
        write(before)
        manifest = before.root / "artifacts" / "train" / KEY / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:100])
    seen = {"nothing": 0, "whole": 0}
    for root in deaths(tmp_path, write_artifact):
        store = Store(root)
        committed = store.complete("train", KEY)
        seen["whole" if committed else "nothing"] += 1
        assert not committed or whole(root)
        if committed:
            store.remove_leftovers("train", KEY)
        else:
            write(store)
        assert whole(root)
        folder = root / "artifacts" / "train" / KEY
        left = [path.name for path in folder.iterdir()]
        assert sorted(left) == sorted(["manifest.json", Store(root).read("train", KEY).name]), root
    assert seen["nothing"] > 5
    assert seen["whole"] > 1


class Engine:
    """What `save` asks of DeepSpeed's engine, for one process."""

    module = torch.nn.ModuleDict({"model": torch.nn.Linear(4, 4)})

    def save_checkpoint(self, folder, tag, **_):
        target = Path(folder) / tag
        target.mkdir(parents=True)
        torch.save(self.module.state_dict(), target / "rank0.pt")

    def zero_optimization_stage(self):
        return 0


def write_checkpoint(folder, step=4):
    """Save a checkpoint as a world of one."""
    from trainers.train.engine import process_group

    with process_group():
        log = [{"step": number + 1} for number in range(step)]
        save(Engine(), Checkpoints(folder=folder), log, total=9, training={}, later=Later())


def checkpoint_written(folder, step):
    process = forked(folder, write_checkpoint, (folder, step))
    process.join(300)
    assert process.exitcode == 0, output(folder)


def test_killed_while_a_checkpoint_is_written(tmp_path):
    for step in (1, 2, 3):
        checkpoint_written(tmp_path / "before", step)
    seen = {3: [], 4: []}
    for folder in deaths(tmp_path, write_checkpoint):
        found, faults = latest(folder)
        assert faults == []
        assert len(found.log) == found.step
        seen[found.step].append(folder)
    assert min(map(len, seen.values())) > 3, seen
    # Whatever was left, the next checkpoint goes beside the newest whole one, and the rest is cleared away.
    for folder in (*seen[3][2::4], seen[3][-1], seen[4][0]):
        checkpoint_written(folder, 5)
        assert latest(folder)[0].step == 5
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 4, left
