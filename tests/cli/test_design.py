"""`run --until` and `--budget` at their smallest: what is added, when it stops, and that a killed run decides the same again."""

import json
import re
import shutil
from pathlib import Path

import pytest

from orchestrator.cli.main import Grid, main
from orchestrator.spec.catalog import PROFILES
from orchestrator.store.artifacts import Store
from sweeps.full_grid import full_grid
from tests.sweep_runs import run_sweep, trial_rows

# Eight pairs are learnt by heart in so many epochs.
LEARNS = ("--max-train-pairs", "8", "--epochs", "12", "--lr", "1e-2", "--effective-batch", "8")


def small(model: Path, *more: str) -> tuple[str, ...]:
    sets = ("--train-sets", "tiny_world", "--eval-sets", "tiny_world", "tiny_requests")
    return ("--models", str(model), *sets, *LEARNS, *more)


def run(storage: Path, *words: str) -> int:
    return run_sweep("full_grid", full_grid, PROFILES, storage, *words)


def found(storage: Path) -> dict[str, tuple[str, int]]:
    rows = trial_rows(storage, "full_grid")
    return {row["key"]: (row["trial"], row["evaluated"]) for row in rows}


def test_a_sweep_grows_until_it_is_narrow_and_a_killed_one_decides_the_same_again(
    tiny_model, tmp_path, capsys
):
    words = small(tiny_model, "--max-eval-pairs", "10", "--seeds", "0", "--until", "0.8")
    assert run(tmp_path / "store", *words) == 0
    whole, said = found(tmp_path / "store"), capsys.readouterr().out
    assert "design: no interval over other trainings yet" in said
    assert re.search(r"design: reached: ± 0\.\d+ \(trained on tiny_world", said)
    names = {name for name, _ in whole.values()}
    assert {name[-2:] for name in names} > {"s0"}
    # As if killed while a seed that nobody declared was trained.
    store, lost = (
        Store(tmp_path / "store"),
        next(key for key, (name, _) in whole.items() if name.endswith("s1")),
    )
    for kind in ("train", "weights"):
        shutil.rmtree(store.root / "artifacts" / kind / lost)
    assert run(tmp_path / "store", *words) == 0
    assert found(tmp_path / "store") == whole
    # And with all of it done, nothing is run; --budget of what it cost adds nothing either.
    capsys.readouterr()
    assert run(tmp_path / "store", *words) == 0
    assert "trials are complete" in capsys.readouterr().out
    assert found(tmp_path / "store") == whole


def test_pairs_are_added_where_the_set_has_more_and_take_the_place_of_fewer(tiny_model, tmp_path):
    words = small(tiny_model, "--max-eval-pairs", "4", "--seeds", "0", "1", "--rewards", "ex_rm", "im_rm")
    assert run(tmp_path / "store", *words, "--budget", "1cpuh") in (0, 3)
    rows = trial_rows(tmp_path / "store", "full_grid")
    parameters = {json.loads(row["parameters"])["max_eval_pairs"] for row in rows}
    assert parameters == {40}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--until", "0"], "--until 0.0: give half the width"),
        (["--until", "nan"], "--until nan: give half the width"),
        (["--until", "0.1", "--budget", "1cpuh"], "give one of them"),
        (["--budget", "40"], "--budget 40: give an amount above 0 with its unit: 40gpuh"),
        (["--budget", "0cpuh"], "give an amount above 0"),
        (["--budget", "1gpuh"], "there is no GPU to run on; give CPU-hours: --budget 1cpuh"),
        (["--budget", "$200"], "nothing here has a price"),
        (["--budget", "1e3cpuh"], "give an amount above 0 with its unit"),
        (["--budget", "0.000001cpuh"], "no cell fits. The cheapest, llama-64 on tiny_world, takes about"),
        (["--until", "0.1", "--rewards", "ex_rm"], "no training set has two; name them: --rewards"),
        (["retry", "--until", "0.1"], "retry runs what has failed and adds nothing"),
        (["status", "--until", "0.1"], "leave out what it would ignore"),
        (["plan", "--cluster", "1x8xH100-80GB", "--budget", "1cpuh"], "give GPU-hours: --budget 1gpuh"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = [
        "--profile",
        "laptop",
        "--backend",
        "inline",
        "--models",
        "llama-64",
        "--train-sets",
        "tiny_world",
    ]
    if words[0] == "status":
        base = []
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), "full_grid.py", arguments=[*words, *base])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not [file for file in (tmp_path / "rmsweep-store").rglob("manifest.json") if "train" in file.parts]


def test_a_plan_says_what_the_design_detects_and_what_a_rule_would_add(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "plan",
        "--profile",
        "laptop",
        "--backend",
        "inline",
        "--train-sets",
        "tiny_world",
        "--until",
        "0.2",
    ]
    with pytest.raises(SystemExit):
        main(Grid(build=full_grid), "full_grid.py", arguments=words)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"domain shift: 6 models × 1 seed × 40 pairs detect a difference of 0\.\d\d with 80 % power \(± 0\.\d\d\), by priors",
        said,
    )
    assert "expected under the rule: reached: ±" in said
