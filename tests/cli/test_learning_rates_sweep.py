"""sweeps/learning_rates.py at its smallest: a grid of rates, of which held-out pairs choose the best."""

import json
import shutil

import pytest
import torch

from orchestrator.cli.options import Options
from orchestrator.cli.session import select
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import garbage, kept_artifacts
from orchestrator.store.records import read_declaration
from sweeps import learning_rates
from tests.sweep_runs import artifacts, run_sweep, trial_rows
from trainers.errors import DataError, Diverged
from trainers.pairs.tokens import TokenPair, held_out, read_tokens
from trainers.rewards import RewardSpec
from trainers.specs import UNTRUSTED, ValidationSpec

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
    return run_sweep(
        "learning_rates", build, profiles, folder, *words, *more, follow_up=learning_rates.declare
    )


@pytest.fixture(scope="module")
def storage(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning-rates") / "store"
    assert run(folder, tiny_model) == 0
    return folder


def results(storage):
    ((_, folder),) = artifacts(storage).items()
    return json.loads((folder / "results.json").read_text())


def trainings(storage):
    """Manifests of the trainings, by learning rate."""
    store = Store(storage)
    trials = read_declaration("learning_rates", store).trials
    return {trial.parameters["lr"]: store.manifest("train", trial.key) for trial in trials}


def test_the_best_rate_is_the_lowest_of_those_with_the_best_validation_accuracy(storage):
    found = {lr: item["info"]["validation_accuracy"][-1] for lr, item in trainings(storage).items()}
    told = results(storage)
    assert sorted(found) == pytest.approx(RATES)
    assert {row["lr"]: row["validation_accuracy"] for row in told["rates"]} == found
    assert told["best_lr"] == min(lr for lr in found if found[lr] == max(found.values()))
    assert {item["info"]["pairs"] for item in trainings(storage).values()} == {24}


def test_the_accuracy_is_that_of_the_weights_on_the_held_out_pairs(storage):
    from trainers.evaluate.metrics import accuracy
    from trainers.evaluate.scoring import score_pairs
    from trainers.models.loading import load_model
    from trainers.models.reward_parts import RewardModule
    from trainers.pairs.templates import load_tokenizer

    item = trainings(storage)[max(RATES)]
    store = Store(storage)
    tokens = read_tokens(store.read("prepare", item["inputs"]["data"]) / "pairs.arrow")
    _, validated = held_out(tokens, ValidationSpec())
    folder = str(store.read("weights", item["key"]) / "model")
    model = load_model(
        folder, tokenizer=load_tokenizer(folder), output="head", precision="fp32", trust=UNTRUSTED
    )
    with torch.inference_mode():
        reward = RewardModule(model, RewardSpec(kind="ex_rm"))
        chosen, rejected = score_pairs(reward, validated, reference=None, report=lambda row: None)
    assert accuracy(chosen, rejected) == item["info"]["validation_accuracy"][-1]


def test_the_report_has_a_row_for_each_rate_and_evaluation_set(storage):
    found = {(row["reward"], row["evaluation_set"]) for row in trial_rows(storage, "learning_rates")}
    rewards, sets = [f"ex_rm_lr={lr:g}" for lr in RATES], ["tiny_world", "tiny_world_paraphrase"]
    assert found == {(reward, name) for reward in rewards for name in sets}


def test_nothing_of_it_is_garbage_and_nothing_is_trained_twice(storage, tiny_model, capsys):
    store = Store(storage)
    assert garbage(store, kept_artifacts(store)) == []
    before = {lr: item["attempt"] for lr, item in trainings(storage).items()}
    shutil.rmtree(storage / "artifacts" / "analyse")
    capsys.readouterr()
    assert run(storage, tiny_model) == 0
    assert "trials are complete" in capsys.readouterr().out
    assert {lr: item["attempt"] for lr, item in trainings(storage).items()} == before
    assert len(artifacts(storage)) == 1


def test_a_rate_that_diverges_is_a_hole_that_the_comparison_goes_on_without(
    tiny_model, tmp_path, monkeypatch, capsys
):
    from trainers.train import loop as training

    folder, train = tmp_path / "store", training.train

    def spoilt(inputs, **rest):
        if inputs.optim.lr == 2.5e-4:
            raise Diverged("not finite")
        if inputs.optim.lr == 1e-3:
            raise RuntimeError("lost")
        return train(inputs, **rest)

    monkeypatch.setattr(training, "train", spoilt)
    assert run(folder, tiny_model) == 3
    assert "ex_rm lr=0.001 · tiny_world · s0: it failed, see above" in capsys.readouterr().out
    # What may yet be trained is waited for.
    assert artifacts(folder) == {}
    monkeypatch.setattr(training, "train", train)
    assert run(folder, tiny_model) == 3
    said = capsys.readouterr().out
    assert "| 0.00025 | diverged |" in said
    told = results(folder)
    assert [row["validation_accuracy"] is None for row in told["rates"]] == [False, False, True, False]
    assert told["best_lr"] != 2.5e-4
    # Trained after all, it is compared as well.
    assert run(folder, tiny_model, "retry") == 0
    assert "diverged" not in capsys.readouterr().out
    assert all(row["validation_accuracy"] is not None for row in results(folder)["rates"])


def test_rates_of_one_reward_type_leave_the_multiples_to_the_other():
    words = Options(seeds=(0,), axis=("ex_rm.lr=1e-4,1e-3",))
    made = learning_rates.learning_rates(select(words, learning_rates.PROFILES["laptop"], "rates")).trials
    rates = {name: sorted(t.optim.lr for t in made if t.reward.name == name) for name in ("ex_rm", "im_rm")}
    assert rates == {"ex_rm": [1e-4, 1e-3], "im_rm": RATES}


def test_without_held_out_pairs_nothing_could_choose(tiny_model, tmp_path, capsys):
    assert run(tmp_path / "store", tiny_model, "--validation-share", "0") == 2
    assert "held-out pairs choose the best rate" in capsys.readouterr().err
