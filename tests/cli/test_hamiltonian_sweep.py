"""sweeps/hamiltonian.py at its smallest: what the trained model writes is judged, once for each trained IM-RM."""

import json

import pytest
from pyarrow import parquet

from sweeps import hamiltonian
from sweeps.full_grid import full_grid
from tests.sweep_runs import artifacts, run_sweep
from trainers.theory.answers import shares

SMALL = ("--max-train-pairs", "16", "--max-eval-pairs", "4", "--epochs", "1", "--effective-batch", "8")
SETS = ("--train-sets", "hamiltonian", "--eval-sets", "hamiltonian")


def run(storage, tiny_model, *words):
    common = ("--models", str(tiny_model), *SETS, *SMALL, *words)
    build, profiles = full_grid, hamiltonian.PROFILES
    return run_sweep("hamiltonian", build, profiles, storage, *common, follow_up=hamiltonian.declare)


@pytest.fixture(scope="module")
def storage(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hamiltonian") / "store"
    assert run(folder, tiny_model) == 0
    return folder


def test_each_im_rm_is_asked_once_and_its_answers_are_kept(storage):
    ((key, folder),) = artifacts(storage).items()
    rows = parquet.read_table(folder / "answers.parquet").to_pylist()
    assert {(row["prompt"], row["sample"]) for row in rows} == {
        (prompt, sample) for prompt in range(4) for sample in range(-1, hamiltonian.Parameters().samples)
    }
    results = json.loads((folder / "results.json").read_text())
    first = [row for row in rows if row["sample"] == 0]
    assert results["sampled"] == sum(row["correct"] for row in first) / 4
    declared = json.loads((storage / "sweeps" / "hamiltonian" / "sweep.json").read_text())
    assert f"analyse/{key}" in declared["artifacts"]
    (summary,) = (storage / "sweeps" / "hamiltonian" / "report" / "analyses").glob("*/summary.md")
    assert "best of 8" in summary.read_text()


def test_a_new_seed_asks_only_the_new_model(storage, tiny_model):
    before = artifacts(storage)
    assert run(storage, tiny_model, "--seeds", "0", "1", "--only", "reward=im_rm", "--name", "more") == 0
    assert len(artifacts(storage)) == 2
    # A folder is named after its attempt.
    assert before.items() <= artifacts(storage).items()


@pytest.mark.slow
def test_an_adapters_im_rm_writes_on_its_base_model(tiny_model, tmp_path):
    words = ("--only", "reward=im_rm", "--lora-rank", "2")
    written = []
    for rate in ("0.1", "1e-9"):
        storage = tmp_path / rate
        assert run(storage, tiny_model, *words, "--lr", rate) == 0
        ((_, folder),) = artifacts(storage).items()
        written.append(parquet.read_table(folder / "answers.parquet").column("answer").to_pylist())
    assert written[0] != written[1]


def test_shares_tell_the_best_rewarded_from_any():
    def row(sample, correct, reward):
        return {"prompt": 0, "sample": sample, "correct": correct, "reward": reward}

    rows = [row(-1, True, 9.0), row(0, False, 0.5), row(1, True, 0.1), row(2, False, 0.2)]
    assert shares(rows) == {"sampled": 0.0, "greedy": 1.0, "best_of_k": 0.0, "any_of_k": 1.0}
    rows[2]["reward"] = 0.6
    assert shares(rows)["best_of_k"] == 1.0
