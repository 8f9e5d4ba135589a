"""Out of memory, played and real: again with half the tokens in a forward, to the same losses."""

import json
import re
from functools import partial

import pyarrow.parquet as parquet
import pytest

from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_state
from tests.faults.hooks import all_of, impatient
from tests.faults.lives import leftovers, lived

# Tokens of the longest pair that the usual limits let through, and of a forward on a CPU.
LONGEST = 1024 + 2 * 1024


def out_of_memory_above(tokens):
    """Training with more tokens a forward finds no memory, in its second step, and does not say what would halve them."""
    import trainers.train.loop
    from trainers.errors import OutOfMemory

    step, done = trainers.train.loop.optimiser_step, []

    def limited(engine, inputs, *rest):
        done.append(1)
        if inputs.placement.forward_tokens > tokens and len(done) % 2 == 0:
            raise OutOfMemory(f"a forward of {inputs.placement.forward_tokens} tokens does not fit")
        return step(engine, inputs, *rest)

    trainers.train.loop.optimiser_step = limited


def memory_limited_above(tokens):
    """Training with more tokens a forward asks in each step for a gigabyte that the system's own limit does not leave it.

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
        if inputs.placement.forward_tokens <= tokens:
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


def forward_tokens(storage, key):
    return Store(storage).manifest("train", key)["info"]["placement"]["forward_tokens"]


def test_a_forward_shrinks_until_it_fits(one, whole, tmp_path):
    storage = tmp_path / "store"
    said = lived(storage, one, partial(all_of, impatient, partial(out_of_memory_above, 800)))
    key, note = the_cell(storage)
    assert (forward_tokens(whole, key), forward_tokens(storage, key)) == (LONGEST, LONGEST // 4)
    for size in (LONGEST, LONGEST // 2):
        assert f"again with {size // 2} tokens a forward" in said
    assert losses(storage, key) == pytest.approx(losses(whole, key), abs=1e-5)
    assert [retry.partition(":")[0] for retry in note.retries] == ["OutOfMemory"] * 2
    (row,) = json.loads(lived(storage, ["status", "--json"]))
    assert (row["state"], row["retries"]) == ("complete", 2)
    assert leftovers(storage) == []


def test_where_memory_really_runs_out_the_heaviest_forward_of_the_training_is_halved(one, whole, tmp_path):
    storage = tmp_path / "store"
    said = lived(storage, one, partial(all_of, impatient, partial(memory_limited_above, LONGEST - 1)))
    key, note = the_cell(storage)
    (retry,) = note.retries
    heaviest, longest = map(int, re.findall(r"up to (\d+) tokens \(the longest pair has (\d+)\)", retry)[0])
    # Of four pairs, far below the budget.
    assert longest < heaviest <= 4 * longest < LONGEST
    assert forward_tokens(storage, key) == max(longest, heaviest // 2)
    assert f"again with {forward_tokens(storage, key)} tokens a forward" in said
    assert losses(storage, key) == pytest.approx(losses(whole, key), abs=1e-5)


def test_what_never_fits_fails_and_says_so(one, tmp_path):
    storage = tmp_path / "store"
    said = lived(storage, one, partial(all_of, impatient, partial(out_of_memory_above, 0)), exits=3)
    assert f"again with {LONGEST // 8} tokens a forward, activations recomputed" in said
    assert "missing: " in said
    assert f"a forward of {LONGEST // 8} tokens does not fit" in said
    (row,) = json.loads(lived(storage, ["status", "--json"], exits=3))
    assert (row["state"], row["retries"]) == ("failed", 4)
