"""What `plan` makes of --axis, --zip and --trials, and which words it refuses."""

import json
from pathlib import Path

import pytest

from orchestrator.cli.main import Grid, main
from sweeps.full_grid import full_grid

CELL = ("--models", "llama-64", "--train-sets", "tiny_world", "--seeds", "0")
LLAMA, END = "llama-64 · ", " · tiny_world · s0"


@pytest.fixture
def ended(tmp_path, monkeypatch, capsys):
    """The exit code of `plan` in an empty folder, and what it said on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, cell: tuple[str, ...] = CELL) -> tuple[int, str, str]:
        arguments = ["plan", "--json", "--profile", "laptop", "--backend", "inline", *cell, *words]
        with pytest.raises(SystemExit) as exit_:
            main(Grid(build=full_grid), "full_grid.py", arguments=arguments)
        said = capsys.readouterr()
        return int(exit_.value.code or 0), said.out, " ".join(said.err.split())

    return run


@pytest.fixture
def planned(ended):
    """The names of the trials that are planned."""

    def run(*words: str, cell: tuple[str, ...] = CELL) -> list[str]:
        code, out, err = ended(*words, cell=cell)
        assert code == 0, err
        return [item["trial"] for item in json.loads(out)["trials"]]

    return run


def test_axes_are_multiplied_and_each_trial_has_those_that_it_reads(planned):
    assert planned("--axis", "lr=1e-6,1e-5", "beta=0.01,0.1") == [
        f"{LLAMA}{name}{END}"
        for name in (
            *("ex_rm lr=1e-06", "ex_rm lr=1e-05"),
            *("im_rm lr=1e-06 beta=0.01", "im_rm lr=1e-06 beta=0.1"),
            *("im_rm lr=1e-05 beta=0.01", "im_rm lr=1e-05 beta=0.1"),
        )
    ]


def test_the_plan_prices_every_value(ended):
    code, out, _ = ended("--axis", "epochs=1,1000", "--rewards", "ex_rm")
    cells = {cell["reward"]: cell["device_hours"] for cell in json.loads(out)["cells"]}
    assert code == 0
    assert 10 * cells["ex_rm_epochs=1"] < cells["ex_rm_epochs=1000"]


def test_an_axis_can_be_for_one_reward_type_or_model(planned):
    cell = ("--models", "llama-64", "big.v2=qwen2-64", *CELL[2:], "--rewards", "ex_rm", "im_rm")
    found = planned("--axis", "im_rm.lr=1e-5,1e-4", "big.v2.epochs=1,2", cell=cell)
    assert [name.split(" · ")[:2] for name in found] == [
        ["llama-64", "ex_rm"],
        ["llama-64", "im_rm lr=1e-05"],
        ["llama-64", "im_rm lr=0.0001"],
        *(["big.v2", f"ex_rm epochs={epochs}"] for epochs in (1, 2)),
        *(["big.v2", f"im_rm lr={lr} epochs={epochs}"] for lr in ("1e-05", "0.0001") for epochs in (1, 2)),
    ]


def test_values_are_zipped(planned):
    found = planned("--zip", "lr=1e-5,1e-4", "epochs=10,10", "--axis", "clip=none,1", "--rewards", "ex_rm")
    assert found == [
        f"{LLAMA}ex_rm clip={clip} lr={lr} epochs=10{END}"
        for clip in ("none", "1")
        for lr in ("1e-05", "0.0001")
    ]


CSV = "model, reward,train_set,seed,lr,lora_rank\nllama-64,ex_rm,tiny_world,0,1e-5,\nmine=qwen2-64,im_rm,tiny_world,3,,8\n"
YAML = """
- {model: llama-64, reward: ex_rm, train_set: tiny_world, seed: 0, lr: 1.0e-5}
- {model: mine=qwen2-64, reward: im_rm, train_set: tiny_world, seed: 3, lora-rank: 8}
"""


@pytest.mark.parametrize(("file", "text"), [("trials.csv", CSV), ("trials.yaml", YAML)])
def test_a_file_says_each_trial(planned, file, text):
    Path(file).write_text(text)
    named = ["llama-64 · ex_rm lr=1e-05 · tiny_world · s0", "mine · im_rm lora-rank=8 · tiny_world · s3"]
    assert planned("--trials", file, cell=()) == named
    # What a row leaves out is every one that is chosen; what is chosen, the rows choose from.
    Path("more.csv").write_text("seed,lr,epochs\n0,1e-5,1\n1,1e-4,2\n")
    more = planned("--trials", "more.csv", "--axis", "clip=1", cell=CELL[:4])
    assert more == [
        f"llama-64 · {reward} lr={lr} epochs={epochs} clip=1 · tiny_world · s{seed}"
        for seed, lr, epochs in ((0, "1e-05", 1), (1, "0.0001", 2))
        for reward in ("ex_rm", "im_rm")
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--axis lrr=1", "--axis lrr=1: no axis is called 'lrr'; did you mean lr"),
        ("--axis seed=0,1", "Models, rewards, sets and seeds have flags of their own"),
        ("--axis lr=1e-5,,1e-4", "--axis lr=1e-5,,1e-4: a value is missing"),
        ("--axis epochs=1.5", "'1.5' is no value of epochs; give a whole number"),
        ("--axis optimizer=adam", "give one of adamw, sgd, rmsprop"),
        ("--axis lr=1e-5 --lr 1e-4", "--lr 0.0001 and --axis lr=1e-5 both set lr"),
        ("--axis train-pairs=5 --max-train-pairs 5", "--max-train-pairs 5 and --axis train-pairs=5 both set"),
        ("--axis lr=1e-5 im_rm.lr=1e-4", "--axis lr=1e-5 and --axis im_rm.lr=1e-4 both set lr"),
        ("--zip lr=1e-5,1e-4 epochs=1,2 --axis lr=1e-3", "both set lr"),
        ("--axis im_mr.lr=1e-5", "no model and no reward type of this sweep is im_mr; did you mean im_rm"),
        ("--axis ex_rm.beta=0.1", "no trial with reward=ex_rm would use beta; it is an option of im_rm"),
        ("--axis beta=0.1 --rewards ex_rm", "no trial would use beta; it is an option of im_rm"),
        ("--lora-alpha 8", "--lora-alpha 8: no trial would use lora-alpha; give --lora-rank"),
        ("--zip lr=1e-5,1e-4 epochs=1", "as many values of each"),
        ("--zip lr=1e-5 lr=1e-4", "give each axis once"),
        ("--zip lr=1e-5 im_rm.beta=1", "all for one model or reward type, or for all"),
        ("--axis loss=hinge --lora-rank -1", "--lora-rank -1: at least 1; 0 means no adapter"),
        ("--only lrr=1", "the keys are model, reward, train, seed and every axis; did you mean lr"),
        ("--trials none.csv", "--trials none.csv: it cannot be read"),
        ("--seeds -1", "--seeds -1: a seed of -1: give a whole number from 0"),
        ("--axis train-pairs=5 draw-seed=-1", "draw-seed=-1: a seed of -1: give a whole number from 0"),
        (
            "--axis validation-share=0.5 validation-seed=-1",
            "validation-seed=-1: a seed of -1: give a whole number",
        ),
        (f"--axis train-pairs=5 draw-seed={2**63}", f"a seed of {2**63}: give a whole number"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(ended, words, said):
    code, _, error = ended(*words.split())
    assert (code, list(Path().iterdir())) == (2, [])
    assert said in error


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("rows.csv", "", "give one trial a row"),
        ("rows.csv", "model,lrr\nllama-64,1\n", "row 1: no axis is called 'lrr'; did you mean lr"),
        ("rows.csv", "model,lr\nllama-64\n", "or one without as many cells as the first line"),
        ("rows.csv", "model,lr\nllama-64,fast\n", "row 1: 'fast' is no value of lr; give a number"),
        ("rows.csv", "seed\nzero\n", "a seed of 'zero'; give a whole number"),
        ("rows.csv", "reward,beta\nex_rm,0.1\nim_rm,0.1\n", "no trial with reward=ex_rm would use beta"),
        ("rows.csv", "model\nqwen2-64\n", "--trials rows.csv: the sweep has no trial with model=qwen2-64"),
        ("rows.txt", "model\n", "give one trial a row, as .csv or a list in .yaml"),
        ("rows.yaml", "[1", "rows.yaml: it cannot be read"),
    ],
)
def test_a_row_that_cannot_be_is_refused(ended, file, text, said):
    Path(file).write_text(text)
    code, _, error = ended("--trials", file)
    assert code == 2
    assert said in error
