"""sweeps/learning_rates.py at its smallest: held-out pairs are scored in the loop, and what is stopped is no hole."""

import json
import shutil

import pytest
import torch

from orchestrator.analyse_stage import FollowUp
from orchestrator.artifacts import Store
from orchestrator.declaration import read_declaration
from orchestrator.housekeeping import garbage, kept_sweeps
from orchestrator.searches import goes_on
from sweeps import learning_rates
from sweeps.full_grid import full_grid
from tests.sweep_runs import artifacts, run_sweep, trial_rows
from trainers.errors import DataError, Diverged
from trainers.pairs import TokenPair, held_out
from trainers.rewards import RewardSpec
from trainers.specs import UNTRUSTED, ValidationSpec
from trainers.token_files import read_tokens

EPOCHS, RUNGS = 4, (1, 2)
FOLLOW_UP = FollowUp(
    declare=learning_rates.declare, compute=learning_rates.compute, further=learning_rates.further
)
SPEC = ValidationSpec(share=0.25, seed=3)


def pairs(count):
    return [TokenPair(index=row, prompt=[1], chosen=[2], rejected=[3]) for row in range(count)]


def test_validation_pairs_are_taken_from_the_training_pairs():
    trained, validated = held_out(pairs(40), SPEC)
    assert (len(trained), len(validated)) == (30, 10)
    assert sorted(pair.index for pair in (*trained, *validated)) == list(range(40))
    assert held_out(pairs(40), None) == (pairs(40), [])
    with pytest.raises(DataError, match="one side empty"):
        held_out(pairs(1), SPEC)


@pytest.mark.parametrize(
    ("others", "accuracy", "expected"),
    [
        ([], 0.1, True),
        ([0.5], 0.5, True),
        ([0.5], 0.4, False),
        ([0.5, 0.9], 0.6, False),
        ([0.5, 0.9, 0.2], 0.6, True),
    ],
)
def test_who_is_among_the_best_half_goes_on(others, accuracy, expected):
    assert goes_on(others, accuracy, 2) is expected


def run(folder, tiny_model, *more):
    words = ("--models", str(tiny_model), "--lr", "5e-5", "--epochs", str(EPOCHS), "--rewards", "ex_rm")
    words += ("--max-train-pairs", "32", "--effective-batch", "8", "--max-eval-pairs", "6")
    build, profiles = full_grid, learning_rates.PROFILES
    return run_sweep("learning_rates", build, profiles, folder, *words, *more, follow_up=FOLLOW_UP)


@pytest.fixture(scope="module")
def storage(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning-rates") / "store"
    assert run(folder, tiny_model) == 0
    return folder


def searched(storage):
    """(manifest of each training of the search) by learning rate's place in the search."""
    found = [
        json.loads(file.read_text()) for file in (storage / "artifacts" / "train").glob("*/manifest.json")
    ]
    return [item for item in found if "validation_accuracy" in item["info"]]


def test_a_training_ends_where_the_rule_says_so_and_is_committed_as_stopped(storage):
    ((_, folder),) = artifacts(storage).items()
    trials = json.loads((folder / "results.json").read_text())["trials"]
    came: list[list[float]] = []
    for trial in trials:
        accuracies = trial["validation_accuracy"]
        for rung in [rung for rung in RUNGS if rung <= len(accuracies)]:
            others = [other[rung - 1] for other in came if len(other) >= rung]
            stays = goes_on(others, accuracies[rung - 1], 2)
            assert stays is (len(accuracies) > rung), (trial, others)
        assert trial["state"] == ("complete" if len(accuracies) == EPOCHS else "stopped")
        came.append(accuracies)
    states = sorted(item["info"]["state"] for item in searched(storage))
    assert states == sorted(trial["state"] for trial in trials)
    assert "stopped" in states
    assert {item["info"]["pairs"] for item in searched(storage)} == {24}


def test_the_accuracy_is_that_of_the_weights_on_the_held_out_pairs(storage):
    from trainers.evaluate import score_pairs
    from trainers.metrics import accuracy
    from trainers.models import load_model
    from trainers.scoring import RewardModule
    from trainers.templates import load_tokenizer

    item = next(item for item in searched(storage) if item["info"]["state"] == "stopped")
    store = Store(storage)
    tokens = read_tokens(store.read("prepare", item["inputs"]["data"]) / "pairs.arrow")
    _, validated = held_out(tokens, ValidationSpec())
    folder = str(store.read("train", item["key"]) / "model")
    model = load_model(
        folder, tokenizer=load_tokenizer(folder), output="head", precision="fp32", trust=UNTRUSTED
    )
    with torch.inference_mode():
        reward = RewardModule(model, RewardSpec(kind="ex_rm"))
        chosen, rejected = score_pairs(reward, validated, reference=None, report=lambda row: None)
    assert accuracy(chosen, rejected) == item["info"]["validation_accuracy"][-1]


def test_fixed_and_best_are_reported_side_by_side(storage):
    ((_, folder),) = artifacts(storage).items()
    results = json.loads((folder / "results.json").read_text())
    fixed = {row["evaluation_set"]: row for row in results["accuracy"] if row["rate"] == "fixed"}
    best = {row["evaluation_set"]: row for row in results["accuracy"] if row["rate"] == "best"}
    assert fixed.keys() == best.keys() == {"tiny_world", "tiny_world_paraphrase"}
    for row in trial_rows(storage, "learning_rates"):
        assert fixed[row["evaluation_set"]]["accuracy"] == row["accuracy"]
    assert {row["lr"] for row in best.values()} == {results["best_lr"]}


def test_all_that_a_search_trains_is_declared_and_kept(storage):
    store = Store(storage)
    declared = read_declaration("learning_rates", store)
    made = {f"{stage}/{key}" for stage in ("train", "evaluate", "analyse") for key in keys(storage, stage)}
    assert len([item for item in made if item.startswith("train/")]) == 6
    assert made <= set(declared.artifacts)
    # The report's trials are those of the fixed rate.
    assert len(declared.trials) == 1
    assert garbage(store, kept_sweeps(store)) == []


def test_status_lists_what_a_search_trains_and_weights_of_the_search_go(
    storage, tiny_model, tmp_path, capsys
):
    folder = tmp_path / "store"
    shutil.copytree(storage, folder)
    capsys.readouterr()
    assert run(folder, tiny_model, "status", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum("_search_lr_" in row["trial"] for row in rows) == 4
    assert sum("_best_lr_" in row["trial"] for row in rows) == 1
    assert {row["state"] for row in rows} == {"complete"}
    assert run(folder, tiny_model, "--keep-weights", "best") == 0
    gone = {file.parent.name for file in folder.glob("artifacts/train/*/evicted.json")}
    assert gone == {item["key"] for item in searched(folder)}
    capsys.readouterr()
    assert run(folder, tiny_model) == 0
    assert "nothing to run" in capsys.readouterr().out
    assert run(folder, tiny_model, "--seeds", "0", "1") == 0
    (analysis,) = {file.parent.name for file in folder.glob("artifacts/analyse/*/manifest.json")} - {
        file.parent.name for file in storage.glob("artifacts/analyse/*/manifest.json")
    }
    results = json.loads(next(folder.glob(f"artifacts/analyse/{analysis}/*/results.json")).read_text())
    assert {row["seeds"] for row in results["accuracy"]} == {2}


def keys(storage, stage):
    return [file.parent.name for file in (storage / "artifacts" / stage).glob("*/manifest.json")]


def test_a_rate_that_diverges_is_an_outcome_and_one_that_fails_a_hole(
    tiny_model, tmp_path, monkeypatch, capsys
):
    from trainers import train as training

    folder, train, tried = tmp_path / "store", training.train, []

    def spoilt(inputs, **rest):
        tried.append(inputs.optim.lr)
        if inputs.validation and inputs.optim.lr == 2.5e-4:
            raise Diverged("not finite")
        if inputs.validation and inputs.optim.lr == 1e-3:
            raise RuntimeError("lost")
        return train(inputs, **rest)

    monkeypatch.setattr(training, "train", spoilt)
    assert run(folder, tiny_model) == 3
    said = capsys.readouterr().out
    assert "· ex_rm_search_lr_0.001 · tiny_world · s0: it failed, as said above" in said
    assert said.count("missing:") == 1
    assert artifacts(folder) == {}

    monkeypatch.setattr(training, "train", train)
    assert run(folder, tiny_model) == 0
    assert tried == [5e-5, 5e-5, 2.5e-4, 1e-3, 1e-5]
    ((_, found),) = artifacts(folder).items()
    trials = json.loads((found / "results.json").read_text())["trials"]
    assert [trial["state"] for trial in trials][1:3] == ["diverged", "complete"]


def test_what_was_stopped_is_not_trained_again(storage, tiny_model, capsys):
    before = {item["key"]: item["attempt"] for item in searched(storage)}
    shutil.rmtree(storage / "artifacts" / "analyse")
    capsys.readouterr()
    assert run(storage, tiny_model) == 0
    assert "trials are complete" in capsys.readouterr().out
    assert {item["key"]: item["attempt"] for item in searched(storage)} == before
    assert len(artifacts(storage)) == 1
