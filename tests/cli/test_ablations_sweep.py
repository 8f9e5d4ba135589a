"""sweeps/ablations.py at its smallest: each ablation trains what it says and nothing else."""

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.cli import session
from orchestrator.cli.options import Options
from orchestrator.store.artifacts import Store
from sweeps.ablations import PROFILES, ablations
from tests.conftest import save_tiny_llama
from tests.sweep_runs import run_sweep, trial_rows
from trainers.models.loading import HEAD_STD
from trainers.models.tiny import build_tokenizer

ALL = {
    *("ex_rm", "im_rm", "ex_rm_mean", "im_rm_no_reference", "ex_grm"),
    *("ex_rm_freeze=backbone", "im_rm_freeze=backbone", "im_rm_freeze=unembedding"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny llama that has words for Yes and No, its two matrices apart."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["Yes", "No"])
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_llama(folder, tokenizer, seed=0, tied=False)
    return folder


@pytest.fixture(scope="module")
def storage(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations") / "store"
    small = ("--epochs", "1", "--max-train-pairs", "8", "--max-eval-pairs", "8", "--lr", "1e-3")
    assert (
        run_sweep("ablations", ablations, PROFILES, folder, "--models", str(model), *small, "--seeds", "0")
        == 0
    )
    return folder


def test_every_ablation_is_trained_and_evaluated(storage):
    rows = trial_rows(storage, "ablations")
    assert {row["reward"] for row in rows if row["evaluated"]} == ALL
    assert len(rows) == 2 * len(ALL)


@pytest.mark.parametrize(
    ("reward", "moved"),
    [
        ("ex_rm_freeze=backbone", {"score.weight"}),
        ("im_rm_freeze=backbone", {"lm_head.weight"}),
        ("im_rm_freeze=unembedding", {"model.norm.weight", "model.embed_tokens.weight"}),
    ],
)
def test_only_what_is_not_frozen_moves(storage, model, reward, moved):
    (key,) = {row["key"] for row in trial_rows(storage, "ablations") if row["reward"] == reward}
    trained = load_file(Store(storage).read("weights", key) / "model" / "model.safetensors")
    base = load_file(model / "model.safetensors")
    different = {
        name for name, weight in trained.items() if name not in base or not torch.equal(weight, base[name])
    }
    if reward.endswith("=backbone"):
        assert different == moved
    else:
        assert moved < different
        assert "lm_head.weight" not in different


def test_a_lone_output_layer_gets_a_rate_that_can_move_it_far_from_where_it_starts():
    for profile, pairs in ((PROFILES["laptop"], 80), (PROFILES["paper"], 2000)):
        made = ablations(session.select(Options(only=("freeze=backbone",)), profile, "demo")).trials
        assert {trial.reward_name for trial in made} == {"ex_rm_freeze=backbone", "im_rm_freeze=backbone"}
        for trial in made:
            steps = trial.optim.epochs * -(-pairs // trial.optim.effective_batch)
            assert trial.optim.lr * steps > 10 * HEAD_STD


def test_rates_of_an_axis_are_those_of_the_frozen_variants_too():
    options = Options(axis=("lr=1e-5,1e-4",), only=("freeze=backbone",))
    made = ablations(session.select(options, PROFILES["laptop"], "demo")).trials
    assert {trial.optim.lr for trial in made} == {1e-5, 1e-4}


def test_built_in_models_are_not_asked_in_words_that_they_do_not_have():
    made = {
        trial.reward_name for trial in ablations(session.select(Options(), PROFILES["laptop"], "demo")).trials
    }
    assert made == ALL - {"ex_grm"}
