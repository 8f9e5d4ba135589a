"""Out of memory, played and real: again with half the micro-batch and twice the accumulation, to the same losses."""

import json
from functools import partial

import pyarrow.parquet as parquet
import pytest

from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_state
from tests.faults.hooks import all_of, impatient
from tests.faults.lives import leftovers, lived


def four_pairs_a_forward():
    """Place as on a GPU; on CPUs a forward of a model from a folder has one pair."""
    import orchestrator.plan.placement

    split = orchestrator.plan.placement._split
    orchestrator.plan.placement._split = lambda batch, world, zero, wanted, device: split(
        batch, world, zero, 4, device
    )


def out_of_memory_above(micro_batch):
    """Training with a larger micro-batch finds no memory, in its second step."""
    import trainers.train.loop
    from trainers.errors import OutOfMemory

    step, done = trainers.train.loop.optimiser_step, []

    def limited(engine, inputs, *rest):
        done.append(1)
        if inputs.placement.micro_batch > micro_batch and len(done) % 2 == 0:
            raise OutOfMemory(f"a micro-batch of {inputs.placement.micro_batch} pairs does not fit")
        return step(engine, inputs, *rest)

    trainers.train.loop.optimiser_step = limited


def memory_limited_above(micro_batch):
    """Training with a larger micro-batch asks in each step for a gigabyte that the system's own limit does not leave it.

    What it leaves is enough for other threads: a library that is not Python's ends the process where it finds no memory.
    """
    import resource
    from pathlib import Path

    import torch

    import trainers.train.loop

    loop, step = trainers.train.loop._loop, trainers.train.loop.optimiser_step
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)

    def large(*arguments):
        torch.ones(2**28)
        return step(*arguments)

    def limited(begun, inputs, *rest):
        if inputs.placement.micro_batch <= micro_batch:
            return loop(begun, inputs, *rest)
        status = Path("/proc/self/status").read_text().splitlines()
        (kilobytes,) = [int(line.split()[1]) for line in status if line.startswith("VmData")]
        resource.setrlimit(resource.RLIMIT_DATA, (kilobytes * 1024 + 2**26, unlimited[1]))
        trainers.train.loop.optimiser_step = large
        try:
            return loop(begun, inputs, *rest)
        finally:
            trainers.train.loop.optimiser_step = step
            resource.setrlimit(resource.RLIMIT_DATA, unlimited)

    trainers.train.loop._loop = limited


def the_cell(storage):
    ((key, note),) = read_state("full_grid", Store(storage)).trials.items()
    return key, note


def losses(storage, key):
    return parquet.read_table(Store(storage).read("train", key) / "log.parquet")["loss"].to_pylist()


def placement(storage, key):
    placed = Store(storage).manifest("train", key)["info"]["placement"]
    return {name: placed[name] for name in ("micro_batch", "accumulation")}


@pytest.mark.parametrize(
    ("limit", "largest", "sizes"),
    [(out_of_memory_above, 1, [4, 2]), (memory_limited_above, 2, [4])],
    ids=["played", "real"],
)
def test_the_micro_batch_shrinks_until_it_fits(one, whole, tmp_path, limit, largest, sizes):
    storage = tmp_path / "store"
    said = lived(storage, one, partial(all_of, impatient, four_pairs_a_forward, partial(limit, largest)))
    key, note = the_cell(storage)
    assert placement(whole, key) == {"micro_batch": 1, "accumulation": 4}
    assert placement(storage, key) == {"micro_batch": largest, "accumulation": 4 // largest}
    for size in sizes:
        assert f"again with micro-batch {size // 2} × accumulation {8 // size}" in said
    assert losses(storage, key) == pytest.approx(losses(whole, key), abs=1e-5)
    assert [retry.partition(":")[0] for retry in note.retries] == ["OutOfMemory"] * len(sizes)
    assert all(
        f"a micro-batch of {size} pairs" in retry for size, retry in zip(sizes, note.retries, strict=True)
    )
    (row,) = json.loads(lived(storage, ["status", "--json"]))
    assert (row["state"], row["retries"]) == ("complete", len(sizes))
    assert leftovers(storage) == []


def test_what_never_fits_fails_and_says_so(one, tmp_path):
    storage = tmp_path / "store"
    said = lived(
        storage,
        one,
        partial(all_of, impatient, four_pairs_a_forward, partial(out_of_memory_above, 0)),
        exits=3,
    )
    assert "again with micro-batch 1 × accumulation 4, activations recomputed" in said
    assert "missing: " in said
    assert "a micro-batch of 1 pairs does not fit" in said
    (row,) = json.loads(lived(storage, ["status", "--json"], exits=3))
    assert (row["state"], row["retries"]) == ("failed", 3)
