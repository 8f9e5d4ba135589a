"""sweeps/persona.py at its smallest: kept epochs are those of shorter trainings, and are evaluated as such."""

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.cli.options import Options
from orchestrator.cli.session import select
from orchestrator.store.artifacts import Store
from sweeps.persona import PROFILES, persona
from tests.sweep_runs import run_sweep, trial_rows

SETS = ("tiny_world", "tiny_world_paraphrase", "tiny_world_train", "tiny_world_paraphrase_train")


@pytest.fixture(scope="module")
def storage(tiny_model, tmp_path_factory):
    """Two epochs of both reward types, after which one epoch of them."""
    folder = tmp_path_factory.mktemp("persona") / "store"
    common = ("--models", str(tiny_model), "--lr", "1e-3", "--effective-batch", "8", "--seeds", "0")
    for name, epochs in (("persona", "2"), ("short", "1")):
        words = (*common, "--max-train-pairs", "16", "--epochs", epochs, "--name", name)
        # One run of tests/cli draws the curves of several epochs.
        assert run_sweep("persona", persona, PROFILES, folder, *words, draws=name == "persona") == 0
    return folder


def weights(storage, sweep, reward, folder):
    (key,) = {row["key"] for row in trial_rows(storage, sweep) if row["reward"] == reward}
    return load_file(Store(storage).read("weights", key) / folder / "model.safetensors")


def test_every_set_is_evaluated_after_every_epoch(storage):
    rows = trial_rows(storage, "persona")
    assert {(row["reward"], row["evaluation_set"], row["epoch"]) for row in rows} == {
        (reward, name, epoch) for reward in ("ex_rm", "im_rm") for name in SETS for epoch in (1, 2)
    }
    assert all(row["evaluated"] for row in rows)
    assert {row["n"] for row in rows if row["evaluation_set"] == "tiny_world"} == {40.0}


def test_a_suite_is_not_asked_for_its_training_prompts(tmp_path):
    (tmp_path / "suite.jsonl").touch()
    options = Options(suites=(f"m_rewardbench={tmp_path / 'suite.jsonl'}",))
    for trial in persona(select(options, PROFILES["laptop"], "demo")).trials:
        assert {item.name for item in trial.eval_sets} == {*SETS, "m_rewardbench"}


@pytest.mark.parametrize("reward", ["ex_rm", "im_rm"])
def test_what_is_kept_after_an_epoch_is_the_training_that_ends_there(storage, reward):
    kept = weights(storage, "persona", reward, "model-epoch-1")
    short = weights(storage, "short", reward, "model")
    last = weights(storage, "persona", reward, "model")
    assert kept.keys() == short.keys() == last.keys()
    assert all(torch.equal(kept[name], short[name]) for name in kept)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)


def test_scores_after_an_epoch_are_those_of_its_weights(storage):
    def losses(sweep, epoch):
        return {
            (row["reward"], row["evaluation_set"]): row["loss"]
            for row in trial_rows(storage, sweep)
            if row["epoch"] == epoch
        }

    assert losses("persona", 1) == losses("short", 1)
    assert losses("persona", 1) != losses("persona", 2)
