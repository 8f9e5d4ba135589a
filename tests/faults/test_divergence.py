"""A model whose weights hold a NaN beside a sound one: it fails for good, says where, and costs nobody else anything."""

import json
import re
import shlex
import shutil
import signal
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from orchestrator.store.artifacts import Store
from tests.faults.hooks import at_step, signalled, trace, traced
from tests.faults.lives import artifacts, leftovers, lived


@pytest.fixture(scope="module")
def broken_model(tiny_model, tmp_path_factory):
    """The tiny model with one weight that is no number."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("broken") / "broken")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def command(grid, tiny_model, broken_model):
    models = ("--models", f"good={tiny_model}", f"bad={broken_model}")
    return (*grid, *models, "--rewards", "ex_rm", "--seeds", "0", "1")


@pytest.fixture(scope="module")
def ended(command, tmp_path_factory):
    """The storage after the first command, and what that said."""
    storage = tmp_path_factory.mktemp("diverged") / "store"
    return storage, lived(storage, command, exits=3)


def statuses(storage):
    return {row["trial"]: row for row in json.loads(lived(storage, ["status", "--json"], exits=3))}


def trained(log):
    return [name for name in traced(log) if name.startswith("train/")]


def keys(storage, model):
    trials = json.loads((storage / "sweeps" / "full_grid" / "sweep.json").read_text())["trials"]
    return [f"train/{trial['key']}" for trial in trials if trial["model"] == model]


def test_it_fails_without_a_retry_and_names_the_step(ended, whole):
    storage, said = ended
    rows = statuses(storage)
    bad = {name: row for name, row in rows.items() if name.startswith("bad")}
    assert len(bad) == 2
    assert [(row["state"], row["retries"]) for row in bad.values()] == [("failed", 0)] * 2
    assert [row["state"] for name, row in rows.items() if name not in bad] == ["complete"] * 2
    for name in bad:
        (line,) = [line for line in said.splitlines() if line.startswith(f"failed: {name}: ")]
        assert re.search(
            r"not finite at optimiser step 1 \(learning rate 0\.001, pairs \[\d+(, \d+){3}\]\)", line
        )
    mine, wanted = artifacts(storage), artifacts(whole)
    for key in keys(storage, "good"):
        assert mine[key] == wanted[key]
        # Its card names the model, which is called by another name here.
        weights = key.replace("train/", "weights/")
        assert mine[weights] == {**wanted[weights], "model/README.md": mine[weights]["model/README.md"]}
    assert not any(key in mine for key in keys(storage, "bad"))
    assert leftovers(storage) == []


def test_run_leaves_it_and_says_so(ended, command, tmp_path):
    storage, _ = ended
    said = lived(storage, command, partial(trace, tmp_path / "trace"), exits=3)
    assert "2 trials failed for good before and are left out" in said
    assert traced(tmp_path / "trace") == []
    assert {row["state"] for row in statuses(storage).values()} == {"complete", "failed"}


def test_the_printed_retry_runs_it_again_and_nothing_else(ended, tmp_path):
    storage, said = ended
    declared = (storage / "sweeps" / "full_grid" / "sweep.json").read_bytes()
    (line,) = [line for line in said.splitlines() if line.startswith("to run the failed trials again: ")]
    words = shlex.split(line.partition(": ")[2])[2:]
    assert words[0] == "retry"
    again = lived(storage, words, partial(trace, tmp_path / "trace"), exits=3)
    assert again.startswith("running again: bad")
    assert trained(tmp_path / "trace") == keys(storage, "bad")
    assert (storage / "sweeps" / "full_grid" / "sweep.json").read_bytes() == declared


def test_a_retry_that_is_killed_can_be_asked_for_again(ended, command, tmp_path):
    storage, _ = ended
    hook = partial(at_step, 1, partial(signalled, signal.SIGKILL))
    lived(storage, ["retry", *command], hook, exits=-signal.SIGKILL)
    assert {row["cause"] == "" for name, row in statuses(storage).items() if name.startswith("bad")} == {
        False
    }
    assert "2 trials failed for good before and are left out" in lived(storage, command, exits=3)
    again = lived(storage, ["retry", *command], partial(trace, tmp_path / "trace"), exits=3)
    assert again.startswith("running again: bad")
    assert trained(tmp_path / "trace") == keys(storage, "bad")


def test_retry_narrowed_to_what_is_complete_finds_nothing(ended, command, tmp_path):
    storage, _ = ended
    declared = (storage / "sweeps" / "full_grid" / "sweep.json").read_bytes()
    hook = partial(trace, tmp_path / "trace")
    said = lived(storage, ["retry", *command, "--only", "model=good*"], hook, exits=3)
    assert "no trial of these has failed" in said
    assert traced(tmp_path / "trace") == []
    assert (storage / "sweeps" / "full_grid" / "sweep.json").read_bytes() == declared
    assert Store(storage).complete(*keys(storage, "good")[0].split("/"))
