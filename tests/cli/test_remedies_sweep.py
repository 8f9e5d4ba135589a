"""sweeps/remedies.py at its smallest: every remedy is trained and evaluated, a mean with its larger β."""

from orchestrator.cli.options import Options
from orchestrator.cli.session import select
from orchestrator.store.artifacts import Store
from sweeps.remedies import CONSISTENCY, PROFILES, REWARDS, TINY_LENGTH, USUAL_LENGTH, remedies
from tests.conftest import save_tiny_llama
from tests.sweep_runs import SMALL, run_sweep, trial_rows
from trainers.models.tiny import build_tokenizer


def test_every_remedy_is_trained_and_evaluated(tmp_path):
    save_tiny_llama(tmp_path / "tiny", build_tokenizer(), seed=0, tied=True)
    words = ("--models", str(tmp_path / "tiny"), *SMALL, "--beta", "0.01")
    assert run_sweep("remedies", remedies, PROFILES, tmp_path / "store", *words) == 0
    rows = trial_rows(tmp_path / "store", "remedies")
    consistent = {f"{kind}_consistency={value:g}" for kind, value in CONSISTENCY.items()}
    assert {row["reward"] for row in rows if row["evaluated"]} == {*REWARDS, *consistent}
    (key,) = {row["key"] for row in rows if row["reward"] == "im_rm_length_normalised"}
    card = (Store(tmp_path / "store").read("weights", key) / "model" / "README.md").read_text()
    assert USUAL_LENGTH > TINY_LENGTH
    assert f"β is {0.01 * USUAL_LENGTH}." in card


def test_each_beta_of_an_axis_is_a_means_larger_one_and_in_its_name():
    words = Options(seeds=(0,), axis=("beta=0.01,0.1",))
    made = remedies(select(words, PROFILES["laptop"], "betas")).trials
    found = {
        trial.reward_name: round(trial.reward.beta, 9) for trial in made if "normalised" in trial.reward_name
    }
    assert found == {
        f"im_rm_length_normalised_beta={beta:g}": round(beta, 9)
        for beta in (0.01 * TINY_LENGTH, 0.1 * TINY_LENGTH)
    }
    assert {trial.reward.beta for trial in made if trial.reward.kind == "im_rm"} == {0.01, 0.1}
