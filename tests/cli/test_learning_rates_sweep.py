"""sweeps/learning_rates.py at its smallest: a grid of rates, of which held-out pairs choose the best."""

import pytest
import torch

from orchestrator.cli.options import Options
from orchestrator.cli.session import select
from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_declaration
from sweeps import learning_rates
from tests.sweep_runs import run_sweep, trial_rows
from tests.trainers.trainings import load
from trainers.errors import DataError
from trainers.evaluate.metrics import accuracy
from trainers.evaluate.scoring import score_pairs
from trainers.models.reward_parts import RewardModule
from trainers.pairs.tokens import TokenFile, TokenPair, held_out
from trainers.rewards import RewardSpec
from trainers.specs import ValidationSpec

EPOCHS = 2
RATES = [1e-5, 5e-5, 2.5e-4, 1e-3]


def pairs(count):
    return [TokenPair(index=row, prompt=[1], chosen=[2], rejected=[3]) for row in range(count)]


def test_validation_pairs_are_taken_from_the_training_pairs():
    spec = ValidationSpec(share=0.25, seed=3)
    trained, validated = held_out(pairs(40), spec)
    assert (len(trained), len(validated)) == (30, 10)
    assert sorted(pair.index for pair in (*trained, *validated)) == list(range(40))
    assert held_out(pairs(40), None) == (pairs(40), [])
    with pytest.raises(DataError, match="one side empty"):
        held_out(pairs(1), spec)


def run(folder, tiny_model, *more):
    words = ("--models", str(tiny_model), "--lr", "5e-5", "--epochs", str(EPOCHS), "--rewards", "ex_rm")
    words += ("--max-train-pairs", "32", "--effective-batch", "8", "--max-eval-pairs", "6")
    build, profiles = learning_rates.learning_rates, learning_rates.PROFILES
    return run_sweep("learning_rates", build, profiles, folder, *words, *more)


@pytest.fixture(scope="module")
def storage(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning-rates") / "store"
    assert run(folder, tiny_model) == 0
    return folder


def trainings(storage):
    """Manifests of the trainings, by learning rate."""
    store = Store(storage)
    trials = read_declaration("learning_rates", store).trials
    return {trial.parameters["lr"]: store.manifest("train", trial.key) for trial in trials}


def test_the_report_says_which_rate_is_the_best_on_held_out_pairs(storage):
    found = {lr: item["info"]["validation_accuracy"][-1] for lr, item in trainings(storage).items()}
    assert sorted(found) == pytest.approx(RATES)
    assert {item["info"]["pairs"] for item in trainings(storage).values()} == {24}
    best = " or ".join(f"{lr:g}" for lr in sorted(found) if found[lr] == max(found.values()))
    said = (storage / "sweeps" / "learning_rates" / "report" / "report.html").read_text()
    assert f"Best by held-out pairs, trained on tiny_world: EX-RM at lr {best} (" in said


def test_the_accuracy_is_that_of_the_weights_on_the_held_out_pairs(storage):
    item = trainings(storage)[max(RATES)]
    store = Store(storage)
    tokens = TokenFile(store.read("prepare", item["inputs"]["data"]) / "pairs.arrow")
    _, validated = held_out(tokens, ValidationSpec())
    model = load(store.read("weights", item["key"]) / "model", "head")
    with torch.inference_mode():
        reward = RewardModule(model, RewardSpec(kind="ex_rm"))
        chosen, rejected = score_pairs(reward, validated, reference=None, report=lambda row: None)
    assert accuracy(chosen, rejected) == item["info"]["validation_accuracy"][-1]


def test_the_report_has_a_row_for_each_rate_and_evaluation_set(storage):
    found = {(row["reward"], row["evaluation_set"]) for row in trial_rows(storage, "learning_rates")}
    rewards, sets = [f"ex_rm_lr={lr:g}" for lr in RATES], ["tiny_world", "tiny_world_paraphrase"]
    assert found == {(reward, name) for reward in rewards for name in sets}


def test_rates_of_one_reward_type_leave_the_multiples_to_the_other():
    words = Options(seeds=(0,), axis=("ex_rm.lr=1e-4,1e-3",))
    made = learning_rates.learning_rates(select(words, learning_rates.PROFILES["laptop"], "rates")).trials
    rates = {name: sorted(t.optim.lr for t in made if t.reward.name == name) for name in ("ex_rm", "im_rm")}
    assert rates == {"ex_rm": [1e-4, 1e-3], "im_rm": RATES}


def test_without_held_out_pairs_nothing_could_choose(tiny_model, tmp_path, capsys):
    assert run(tmp_path / "store", tiny_model, "--validation-share", "0") == 2
    assert "held-out pairs choose the best rate" in capsys.readouterr().err
