"""SIGINT and SIGTERM: a checkpoint where it stopped, exit 130, and the same command goes on from there."""

import json
import signal
import sys
import time
from functools import partial

import pytest
from safetensors.torch import load_file

from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_state
from tests.faults.conftest import STEPS
from tests.faults.hooks import at_step, before_each, signalled
from tests.faults.lives import artifacts, forked, leftovers, lived, output
from trainers.train import loop
from trainers.train.checkpoints import Checkpoints, Later, latest

STOPPED = "interrupted; the same command goes on where this one stopped"


def only_cell(storage):
    """The one trial's key and its note."""
    ((key, note),) = read_state("full_grid", Store(storage)).trials.items()
    return key, note


def checkpointed(storage):
    """The step of the newest checkpoint of the one trial."""
    found, faults = latest(storage / "checkpoints" / only_cell(storage)[0])
    assert faults == []
    return found.step


def cell(storage, whole):
    """What the cell came to, and what it should have."""
    mine, wanted = artifacts(storage), artifacts(whole)
    return mine, {name: wanted[name] for name in mine}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_stops_with_a_checkpoint_and_goes_on_from_it(one, whole, tmp_path, number):
    storage = tmp_path / "store"
    said = lived(storage, one, partial(at_step, 4, partial(signalled, number)), exits=130)
    assert STOPPED in said
    assert checkpointed(storage) == 5
    assert only_cell(storage)[1].state == "stopped"
    assert [name for name in leftovers(storage) if not name.startswith("checkpoints/")] == []
    (row,) = json.loads(lived(storage, ["status", "--json"], exits=3))
    assert (row["state"], row["trained"], row["evaluations"]) == ("missing", False, "0/2")
    assert f"resumed at step 5 of {STEPS}" in lived(storage, one)
    mine, wanted = cell(storage, whole)
    assert mine == wanted
    assert leftovers(storage) == []


def test_without_grace_the_last_checkpoint_stays_the_last(one, whole, tmp_path):
    storage = tmp_path / "store"
    hook = partial(at_step, 5, partial(signalled, signal.SIGTERM, wait_s=600))
    began = time.monotonic()
    lived(storage, [*one, "--grace-s", "0"], hook, exits=130)
    assert time.monotonic() - began < 200
    assert checkpointed(storage) == 3
    assert "resumed at step 3" in lived(storage, one)
    mine, wanted = cell(storage, whole)
    assert mine == wanted


@pytest.mark.parametrize(
    ("left_s", "write_s", "wishes"),
    [
        (None, 0.0, [0.0, 0.0]),
        (30.0, 5.0, [1.0, 1.0]),
        (4.0, 5.0, [0.0, 1.0]),
        # Nothing was written yet, so that nobody knows how long it takes.
        (30.0, 0.0, [1.0, 1.0]),
        (0.0, 0.0, [0.0, 1.0]),
    ],
)
def test_a_last_checkpoint_is_written_where_it_fits_the_grace(monkeypatch, tmp_path, left_s, write_s, wishes):
    monkeypatch.setattr(loop.dist, "get_rank", lambda: 0)
    kept = Checkpoints(folder=tmp_path, every_steps=3)
    with Later() as later:
        keeping = loop.Keeping(
            checkpoints=kept, identity={}, stop=lambda: left_s, end_epoch=lambda epoch: None, later=later
        )
        assert loop._wishes(keeping, 4, 1.0, write_s) == wishes


def test_a_second_signal_ends_at_once(one, tmp_path):
    storage = tmp_path / "store"
    hook = partial(at_step, 5, partial(signalled, signal.SIGINT, again_after_s=0.5, wait_s=600))
    began = time.monotonic()
    lived(storage, [*one, "--grace-s", "500"], hook, exits=130)
    assert time.monotonic() - began < 200
    assert checkpointed(storage) == 3


@pytest.mark.parametrize(
    ("module", "name", "left"),
    [("trainers.pairs.tokens", "iter_tokens", 0), ("trainers.evaluate.scoring", "score_pairs", 1)],
    ids=["preparation", "evaluation"],
)
def test_what_has_no_checkpoint_ends_at_once(one, whole, tmp_path, module, name, left):
    storage = tmp_path / "store"
    began = time.monotonic()
    hook = partial(before_each, module, name, partial(signalled, signal.SIGTERM, wait_s=600))
    assert STOPPED in lived(storage, [*one, "--grace-s", "500"], hook, exits=130)
    assert time.monotonic() - began < 200
    assert leftovers(storage) == []
    assert len(list((storage / "artifacts").glob("train/*/manifest.json"))) == left
    lived(storage, one)
    mine, wanted = cell(storage, whole)
    assert mine == wanted


def train_command(words, before=None):
    """`python -m trainers.train`, in a process that has paid for the imports."""
    import runpy

    if before is not None:
        before()
    sys.modules.pop("trainers.train.__main__", None)
    sys.argv = ["trainers.train", *words]
    runpy.run_module("trainers.train", run_name="__main__", alter_sys=True)


def test_trainers_train_stops_and_goes_on(tiny_model, tmp_path):
    words = ["--model", str(tiny_model), "--reward", "ex_rm", "--data", "tiny_world", "--max-pairs", "16"]
    words += ["--effective-batch", "4", "--epochs", "2", "--lr", "1e-3"]
    hook = partial(at_step, 2, partial(signalled, signal.SIGTERM))
    codes = []
    for out, before in (("whole", None), ("cut", hook), ("cut", None)):
        process = forked(tmp_path / out, train_command, ([*words, "--out", str(tmp_path / out)], before))
        process.join(600)
        codes.append(process.exitcode)
    said = output(tmp_path / "cut")
    assert codes == [0, 130, 0], said
    assert "interrupted: stopped on request after step 3 of 8. The same command goes on." in said
    assert "resumed at step 3 of 8" in said
    assert not (tmp_path / "cut" / "checkpoints").exists()
    weights = [load_file(tmp_path / out / "model" / "model.safetensors") for out in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
