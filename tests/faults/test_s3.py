"""A sweep whose storage is a bucket: killed, resumed on another machine, damaged, and read by somebody else."""

import json
import os
import signal
import threading
from functools import partial

import pytest

from tests.faults.hooks import all_of
from tests.faults.lives import artifacts, forked, grid_life, lived, output


@pytest.fixture(scope="module")
def undisturbed(one, tmp_path_factory):
    """What the sweep comes to in a folder, undisturbed."""
    storage = tmp_path_factory.mktemp("undisturbed") / "store"
    lived(storage, one)
    return artifacts(storage)


class Machine:
    """Runs commands on the bucket with a cache of its own."""

    def __init__(self, bucket, folder):
        self.storage = folder / "life"
        folder.mkdir()
        self._uri = bucket.uri
        self._environment = {**bucket.environment, "RMSWEEP_CACHE": str(folder / "cache")}

    def before(self, *hooks):
        return partial(all_of, partial(enter, self._environment), *hooks)

    def runs(self, words, *hooks, exits=0):
        return lived(self.storage, (*words, "--storage", self._uri), self.before(*hooks), exits=exits)

    def dies(self, words, hook):
        life = grid_life(self.storage, (*words, "--storage", self._uri), self.before(hook))
        life.join(600)
        assert life.exitcode == -signal.SIGKILL, output(self.storage)


def enter(environment):
    os.environ.update(environment)


def killed_before_putting(name):
    """SIGKILL this process when it is about to put an object of a training's artifact, another of which is up."""
    from trainers.storage import ObjectPath

    put, another = ObjectPath.upload, threading.Event()

    def deadly(target, file):
        of_training = "/artifacts/weights/" in str(target)
        if target.name == name and of_training:
            # Objects are put side by side.
            assert another.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        put(target, file)
        if of_training:
            another.set()

    ObjectPath.upload = deadly


def committed(bucket):
    """`stage/key` → file → bytes of every artifact, read in this process, which has fetched nothing yet."""
    return artifacts(bucket.root)


def test_killed_in_an_upload_it_goes_on_elsewhere_and_ends_as_if_undisturbed(
    one, undisturbed, bucket, tmp_path
):
    first, second = Machine(bucket, tmp_path / "first"), Machine(bucket, tmp_path / "second")
    first.dies(one, partial(killed_before_putting, "model.safetensors"))
    # The training was done, and part of it is up: nobody takes that for an artifact.
    (attempt,) = (bucket.root / "artifacts").glob("weights/*/*/")
    assert attempt.is_dir()
    assert not [name for name in committed(bucket) if name.startswith(("train/", "weights/"))]
    kept = [path.name for path in (bucket.root / "checkpoints").glob("*/*.json")]
    assert sorted(name[:12] for name in kept) == ["step00000006", "step00000009"]
    # Another machine has nothing of the first one's but the bucket.
    said = second.runs(one)
    assert "resumed at step 9 of 12" in said
    assert committed(bucket) == undisturbed
    assert "nothing to run" in first.runs(one)
    left = [str(path).removeprefix(f"{bucket.root}/") for path in bucket.root.sizes()]
    assert not [name for name in left if name.startswith(("checkpoints/", "leases/"))]
    assert {"sweeps/full_grid/report/summary.md", "sweeps/full_grid/trials.parquet"} <= set(left)
    # An embedded database of runs keeps their files beside it, as there is no storage folder.
    assert list(tmp_path.glob("*/mlruns")) == []
    rows = said_by(second, ("status", "--json"))
    assert [row["state"] for row in rows] == ["complete"]


def said_by(machine, words):
    """What a command prints for machines."""
    said = machine.runs(words)
    return json.loads(said[said.index("[\n") :])


@pytest.mark.slow
def test_objects_that_are_damaged_are_computed_again(one, undisturbed, bucket, tmp_path):
    Machine(bucket, tmp_path / "first").runs(one)
    # Scores are looked at before anything runs; of what stages read, each command finds the first that is damaged.
    for damaged, name, holes in (
        ("evaluate", "scores.parquet", 0),
        ("prepare", "pairs.arrow", 3),
        ("weights", "config.json", 1),
    ):
        for file in list(bucket.root.sizes()):
            if file.name == name and f"/artifacts/{damaged}/" in str(file):
                harm(file)
        other = Machine(bucket, tmp_path / damaged)
        if damaged != "evaluate":
            # What needs what is damaged is missing, so that it is read.
            forget(bucket, "evaluate")
        if damaged == "prepare":
            forget(bucket, "train")
        said = [*(other.runs(one, exits=3) for _ in range(holes)), other.runs(one)]
        assert "what was written" in said[0]
        assert committed(bucket) == undisturbed


def harm(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def forget(bucket, stage):
    (bucket.root / "artifacts" / stage).remove_below()


def runs_on_ray(words, environment):
    enter(environment)
    from orchestrator.cli.main import Grid, main
    from sweeps.full_grid import full_grid
    from tests.faults.lives import ROOT

    main(Grid(build=full_grid), ROOT / "sweeps" / "full_grid.py", arguments=words)


@pytest.mark.slow
def test_on_ray_the_same(one, undisturbed, bucket, tmp_path):
    words = [*one, "--storage", bucket.uri]
    words[words.index("inline")] = "ray"
    environment = {**bucket.environment, "RMSWEEP_CACHE": str(tmp_path / "cache")}
    life = forked(tmp_path / "life", runs_on_ray, (words, environment))
    life.join(400)
    assert life.exitcode == 0, output(tmp_path / "life")
    assert committed(bucket) == undisturbed
    assert [str(path) for path in bucket.root.sizes() if "/scratch/" in str(path)] == []
