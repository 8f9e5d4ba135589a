"""Names of sets, models and sweeps: letters of every script stay, and no two things come to one name without a word."""

import json

import pytest

from tests.cli.test_bad_input import GOOD, data, grid, refused
from tests.faults.lives import lived
from trainers.errors import SpecError
from trainers.specs import clean_name

__all__ = ["data", "grid"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("偏好1", "偏好1"),
        ("हिन्दी", "हिन्दी"),
        ("Gro\N{COMBINING DIAERESIS}ße", "Größe"),
        ("a b/c:d", "a_b_c_d"),
        ("x-1.5", "x-1.5"),
        *((text, None) for text in ("…", "🙂", "\N{COMBINING DIAERESIS}", "偏" * 67, "x" * 101)),
    ],
)
def test_letters_and_digits_stay_and_what_has_none_or_is_too_long_for_a_file_is_refused(text, name):
    if name:
        assert clean_name(text) == name
    else:
        with pytest.raises(SpecError):
            clean_name(text)


def test_a_given_name_that_cannot_stay_as_it_is_is_refused(grid, tmp_path):
    for name in ("a b", "a_b_"):
        refused(grid("--profile", "laptop", "--name", name), f"--name {name!r}", "give a_b.")
    refused(grid("--profile", "laptop", "--name", ".."), "--name '..': a name needs a letter or digit.")
    assert list(tmp_path.iterdir()) == []


def test_two_of_one_name_are_named_with_their_sources(grid, data, tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a_b").mkdir()
    for folder in ("a b", "a_b"):
        data(f"{folder}/train.jsonl", GOOD)
        data(f"{folder}/test.jsonl", {**GOOD, "prompt": folder})
    flags = ("--profile", "laptop", "--models", "llama-64")
    refused(grid(*flags, "--eval-sets", "a b", "a_b"), "a_b (a b), a_b (a_b); tell them apart with NAME=PATH")
    refused(grid(*flags, "--train-sets", "a b", "a_b"), "on a b and as", "on a_b; tell equal names apart")


def test_a_sweep_of_sets_with_unicode_names_is_told_apart_and_shown(tiny_model, tmp_path):
    from mlflow import MlflowClient

    rows = [{"prompt": f"{n}?", "chosen": "Yes, very much.", "rejected": "No, never."} for n in range(8)]
    for name in ("偏好1", "奖励1", "हिन्दी"):
        for split in ("train", "test"):
            said = [{**row, "prompt": f"{name} {split} {row['prompt']}"} for row in rows]
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, said)))
    sets = [str(tmp_path / name) for name in ("偏好1", "奖励1", "हिन्दी")]
    flags = ["--backend", "inline", "--profile", "laptop", "--models", str(tiny_model), "--epochs", "1"]
    flags += ["--train-sets", sets[0], "--eval-sets", *sets, "--rewards", "ex_rm", "--name", "实验"]
    storage = tmp_path / "store"
    assert "MLflow view is incomplete" not in lived(storage, ["run", *flags])
    page = (storage / "sweeps" / "实验" / "report" / "report.html").read_text()
    assert "偏好1" in page
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    (run,) = client.search_runs(["1"], "tags.`rmsweep.sweep` = '实验' and tags.`rmsweep.role` = 'trial'")
    assert {"eval/偏好1/accuracy", "eval/奖励1/accuracy"} <= run.data.metrics.keys()
    assert sum(name.startswith("eval/ह") for name in run.data.metrics) == sum(
        name.startswith("eval/偏") for name in run.data.metrics
    )
