"""Words of a command line → models, data sets, rewards, categories; bad words are refused with a hint."""

import dataclasses
from pathlib import Path

import pytest

from orchestrator.cli import main, session
from orchestrator.cli.options import Options
from orchestrator.plan.hardware import Node
from orchestrator.spec import catalog, selection
from orchestrator.spec.selection import (
    parse_categories,
    parse_dataset,
    parse_model,
    parse_only,
    parse_rewards,
)
from sweeps.full_grid import full_grid
from trainers.errors import SpecError
from trainers.specs import DatasetSpec, DrawSpec, ModelSpec


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative words mean nothing on disk unless a test makes them."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("llama-3.2-1b", catalog.MODELS["llama-3.2-1b"]),
        ("mine=llama-64", dataclasses.replace(catalog.MODELS["llama-64"], name="mine")),
        ("Acme/Big-Model.v2", ModelSpec(name="big-model.v2", source="Acme/Big-Model.v2")),
        ("my model", ModelSpec(name="my_model", source="my model")),
        ("a b%c", ModelSpec(name="a_b_c", source="a b%c")),
        # A folder keeps the dots of its name, a file loses its ending.
        ("model-1.5", ModelSpec(name="model-1.5", source="model-1.5")),
        ("./model-1.5.gguf", ModelSpec(name="model-1.5", source="model-1.5.gguf")),
        ("mine=./my model", ModelSpec(name="mine", source="my model")),
        # A path that holds an equals sign is a path.
        ("lr=1e-4", ModelSpec(name="lr_1e-4", source="lr=1e-4")),
    ],
)
def test_a_word_is_a_model_of_the_catalog_the_hub_or_the_disk(text: str, expected: ModelSpec):
    for folder in ("my model", "a b%c", "model-1.5", "lr=1e-4"):
        Path(folder).mkdir()
    Path("model-1.5.gguf").touch()
    assert parse_model(text) == expected


def test_a_mistyped_word_is_refused_with_the_nearest_name():
    for text in ("lama-64", "mine=lama-64", "llama64"):
        with pytest.raises(SpecError, match=r"did you mean .*llama-64"):
            parse_model(text)
    with pytest.raises(SpecError, match=r"^--eval-sets tinyworld.* did you mean .*tiny_world"):
        parse_dataset("tinyworld", "--eval-sets")
    with pytest.raises(SpecError, match=r"did you mean .*im_rm"):
        parse_rewards(["ex_rm", "imrm"])


@pytest.mark.parametrize(
    "text", ["./nowhere", "/no/where", "~/nowhere-at-all", "a/b/c", "mine=./nowhere", "x y", "=x", ""]
)
def test_what_is_nowhere_is_refused_and_named(text: str):
    said = "no such file or folder" if text else "an empty word"
    for parse in (parse_model, lambda word: parse_dataset(word, "--train-sets")):
        with pytest.raises(SpecError, match=said) as raised:
            parse(text)
        assert text.removeprefix("mine=") in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny_world_paraphrase", catalog.dataset("tiny_world_paraphrase")),
        ("mine=tiny_world", dataclasses.replace(catalog.dataset("tiny_world"), name="mine")),
        ("Acme/Prefs", DatasetSpec(name="prefs", source="Acme/Prefs")),
        ("./My Set", DatasetSpec(name="my_set", source="My Set")),
        ("Rows.v1.jsonl", DatasetSpec(name="rows.v1", source="Rows.v1.jsonl")),
        ("Mine.v2.jsonl.gz", DatasetSpec(name="mine.v2", source="Mine.v2.jsonl.gz")),
        ("mine=My Set", DatasetSpec(name="mine", source="My Set")),
        # A catalog name in front of a path keeps what the set rewrites, and its draw; the folder's own name does not.
        (
            "ultrafeedback_french=My Set",
            DatasetSpec(name="ultrafeedback_french", source="My Set", rewriting_of="ultrafeedback"),
        ),
        (
            "rewardmath=./rewardmath",
            DatasetSpec(
                name="rewardmath", source="rewardmath", train_draw=catalog.dataset("rewardmath").train_draw
            ),
        ),
        ("./rewardmath", DatasetSpec(name="rewardmath", source="rewardmath")),
    ],
)
def test_a_word_is_a_data_set_of_the_catalog_the_hub_or_the_disk(text: str, expected: DatasetSpec):
    for folder in ("My Set", "rewardmath"):
        Path(folder).mkdir()
    for file in ("Rows.v1.jsonl", "Mine.v2.jsonl.gz"):
        Path(file).touch()
    assert parse_dataset(text, "--train-sets") == expected


def test_a_mixture_names_sets_with_shares(tmp_path: Path):
    (tmp_path / "c++.jsonl").touch()
    parts = ((catalog.dataset("tiny_world"), 0.7), (parse_dataset("Acme/Prefs:sft", "--train-sets"), 0.3))
    mixture = parse_dataset("tiny_world:0.7+Acme/Prefs:sft:.3", "--train-sets")
    assert (mixture.name, mixture.mixture) == ("tiny_world_70_prefs_30", parts)
    assert parse_dataset("mix=tiny_world:0.7+Acme/Prefs:sft:0.3", "--train-sets").name == "mix"
    assert not parse_dataset("c++.jsonl", "--train-sets").mixture
    # An analysis has one training set.
    assert parse_dataset("Acme/Prefs:sft", "--train-set").train_split == "sft"
    assert len(parse_dataset("tiny_world:0.7+Acme/Prefs:.3", "--train-set").mixture) == 2
    for text, flag, said in (
        ("tiny_world:0.7+tiny_world:0.3", "--train-sets", "a mixture names each set once"),
        ("tiny_world:0.7+hamiltonian:0.4", "--train-sets", "these sum to 1.1"),
        ("tiny_world:1+hamiltonian:0", "--train-sets", "above 0"),
        ("tiny_world:0.7+hamiltonian", "--train-sets", "a mixture names each set once"),
        ("tiny_wold:0.7+hamiltonian:0.3", "--train-sets", "did you mean tiny_world"),
        ("tiny_world:0.7+hamiltonian:0.3", "--eval-sets", "only sets that are trained on"),
    ):
        with pytest.raises(SpecError, match=said):
            parse_dataset(text, flag)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_beta_that_cannot_be_is_refused(beta: float):
    with pytest.raises(SpecError, match="beta"):
        full_grid(session.select(Options(beta=beta), catalog.LAPTOP, "demo"))


def test_a_category_is_taken_with_spaces_or_hyphens_and_else_refused():
    for value in ("token-level-shift", "token-level shift"):
        assert parse_categories([f"a/b={value}"], ["a"], ["b"]) == (("a", "b", "token-level shift"),)
    for texts in (["a/b"], ["a=domain-shift"], ["a/b=shift"], [""], ["a/b=domain-shift"] * 2):
        with pytest.raises(SpecError, match=r"TRAIN/EVAL=VALUE.*token-level-shift"):
            parse_categories(texts, ["a"], ["b"])
    with pytest.raises(SpecError, match="is tiny_wrld; did you mean tiny_world"):
        parse_categories(["tiny_wrld/b=domain-shift"], ["tiny_world"], ["b"])


def test_only_takes_keys_and_globs():
    given = ["model=llama*", "seed=0", "train=a=b"]
    assert parse_only(given) == (("model", "llama*"), ("seed", "0"), ("train", "a=b"))
    for text in ("model", "model=", ""):
        with pytest.raises(SpecError, match="KEY=GLOB"):
            parse_only([text])


def test_a_seed_twice_is_refused():
    with pytest.raises(SpecError, match="--seeds 0 1 0"):
        selection.unique("--seeds", [0, 1, 0])


def test_flags_override_the_profile():
    options = Options(models=("qwen2-64",), seeds=(3,), max_train_pairs=5, lr=0.5, rewards=("ex_rm",))
    chosen = session.select(options, catalog.LAPTOP, "demo")
    assert [model.name for model in chosen.models] == ["qwen2-64"]
    assert chosen.seeds == (3,)
    assert {(trial.optim.lr, trial.train_draw.max_pairs) for trial in chosen.trials()} == {(0.5, 5)}
    assert chosen.train_sets == catalog.LAPTOP.train_sets
    assert [reward.kind for reward in chosen.rewards] == ["ex_rm"]


def test_the_paper_trains_on_2000_pairs_of_ultrafeedback_and_its_own_1000_of_rewardmath():
    trials = full_grid(session.select(main.Options(), catalog.PAPER, "demo")).trials
    draws = {trial.train_set.name: trial.train_draw for trial in trials}
    assert draws == {
        "ultrafeedback": DrawSpec(max_pairs=2000),
        "rewardmath": DrawSpec(max_pairs=1000, seed=517, permutation="torch"),
    }
    # Reference §1: optimiser steps, a short last batch counted.
    steps = {
        trial.train_set.name: trial.optim.epochs
        * -(-trial.train_draw.max_pairs // trial.optim.effective_batch)
        for trial in trials
    }
    assert steps == {"ultrafeedback": 315, "rewardmath": 160}


def test_another_number_of_pairs_is_drawn_from_every_set_in_the_usual_way():
    chosen = session.select(main.Options(max_train_pairs=8), catalog.PAPER, "demo")
    assert {trial.train_draw for trial in full_grid(chosen).trials} == {DrawSpec(max_pairs=8)}
    # Trained on and evaluated, it is one set.
    assert {spec.name: spec for spec in chosen.train_sets}["rewardmath"] in chosen.eval_sets


def test_token_limits_are_those_of_every_draw_a_named_sets_own_too():
    limits = {"max_prompt_tokens": 2048, "max_response_tokens": 512}
    for trial in full_grid(session.select(Options(**limits), catalog.PAPER, "demo")).trials:
        for draw in (trial.train_draw, trial.eval_draw):
            assert (draw.max_prompt_tokens, draw.max_response_tokens) == (2048, 512)
    rewardmath = full_grid(session.select(Options(max_response_tokens=512), catalog.PAPER, "demo")).trials
    assert {trial.train_draw for trial in rewardmath if trial.train_set.name == "rewardmath"} == {
        DrawSpec(max_pairs=1000, seed=517, permutation="torch", max_response_tokens=512)
    }


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize(
    "flag", ["max_train_pairs", "max_eval_pairs", "max_prompt_tokens", "max_response_tokens", "max_trials"]
)
def test_a_number_below_one_is_refused_and_not_taken_for_the_profiles(flag: str, count: int):
    with pytest.raises(SpecError, match=flag.replace("_", "-")):
        session.select(Options(**{flag: count}), catalog.PAPER, "demo")


def test_auto_is_paper_where_the_gpus_hold_it_and_laptop_elsewhere_and_says_so():
    gpus = [Node(id="g", cpus=16, gpus=8, gpu_gb=80.0)]
    for capacity, expected in ((gpus, catalog.PAPER), ([Node(id="a", cpus=2)], catalog.LAPTOP)):
        profile, why = session.profile_for(Options(), capacity)
        assert profile is expected
        assert profile.name in why
    assert session.profile_for(Options(profile="paper"), []) == (catalog.PAPER, "")
