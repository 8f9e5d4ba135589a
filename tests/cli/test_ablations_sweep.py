"""sweeps/ablations.py at its smallest: each ablation trains what it says and nothing else."""

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.cli import session
from orchestrator.cli.options import Options
from orchestrator.store.artifacts import Store
from sweeps.ablations import FROZEN_LR_TINY, PROFILES, ablations
from tests.conftest import save_tiny_llama
from tests.sweep_runs import SMALL, run_sweep, trial_rows
from trainers.models.loading import HEAD_STD
from trainers.models.tiny import build_tokenizer

FROZEN = {"ex_rm_freeze=backbone", "im_rm_freeze=backbone", "im_rm_freeze=unembedding"}
ALL = {"ex_rm", "im_rm", "ex_rm_mean", "im_rm_no_reference", "ex_grm", *FROZEN}


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
    words = (
        "--models",
        str(model),
        *SMALL,
        "--lr",
        "1e-3",
        "--only",
        "reward=*grm",
        "reward=?x_rm",
        "reward=im_rm",
    )
    assert run_sweep("ablations", ablations, PROFILES, folder, *words) == 0
    return folder


def test_what_only_this_sweep_asks_is_trained_and_evaluated(storage):
    rows = trial_rows(storage, "ablations")
    assert {row["reward"] for row in rows if row["evaluated"]} == {*FROZEN, "ex_rm", "im_rm", "ex_grm"}


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


@pytest.mark.parametrize(
    ("profile", "only", "names"),
    [
        # Built-in models do not have EX-GRM's words.
        ("laptop", (), ALL - {"ex_grm"}),
        ("paper", (), ALL),
        ("paper", ("freeze=backbone",), {"ex_rm_freeze=backbone", "im_rm_freeze=backbone"}),
    ],
)
def test_a_lone_output_layer_gets_a_rate_that_can_move_it_far_from_where_it_starts(profile, only, names):
    made = ablations(session.select(Options(only=only), PROFILES[profile], "demo")).trials
    assert {trial.reward_name for trial in made} == names
    pairs = {"laptop": 80, "paper": 2000}[profile]
    far = {
        trial.reward_name
        for trial in made
        if trial.optim.lr * trial.optim.epochs * (pairs // trial.optim.effective_batch) > 10 * HEAD_STD
    }
    assert far >= {"ex_rm_freeze=backbone", "im_rm_freeze=backbone"}


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({"axis": ("lr=1e-5,1e-4",)}, {1e-5, 1e-4}),
        ({"lr": 1e-4}, {1e-4}),
        ({"axis": ("ex_rm.lr=1e-4",)}, {1e-4, FROZEN_LR_TINY}),
    ],
)
def test_rates_that_are_asked_for_are_those_of_the_frozen_variants_too(given, rates):
    options = Options(**given, only=("freeze=backbone",))
    made = ablations(session.select(options, PROFILES["laptop"], "demo")).trials
    assert {trial.optim.lr for trial in made} == rates
