"""A search for a learning rate on a real Ray: Tune's ASHA ends a training, which commits; nothing is done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.test_full_grid import manifests, said

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent.parent
# Whoever comes first, of these rates the lowest is behind at the first rung, and the second is the best.
LR, RATES = "5e-5", {5e-5, 2.5e-4, 1e-3, 1e-5}
WORDS = ("--profile", "laptop", "--rewards", "ex_rm", "--lr", LR, "--epochs", "4", "--effective-batch", "8")
WORDS += ("--max-train-pairs", "32", "--max-eval-pairs", "6")


def sweep(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "sweeps" / "learning_rates.py"), *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RMSWEEP_"))}
    return subprocess.run(
        [*command, "--storage", str(storage)],
        cwd=storage,
        env=kept,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def test_tune_ends_a_training_that_commits_and_the_best_rate_is_trained(tiny_model, tmp_path):
    words = ("--models", str(tiny_model), *WORDS)
    done = sweep(tmp_path, "run", *words)
    assert done.returncode == 0, said(done)
    assert "search_lr_1e-05 · tiny_world · s0: ended by ASHA after epoch 1 of 4" in said(done)

    trained = manifests(tmp_path, "train")
    infos = [manifest["info"] for manifest in trained.values()]
    # The fixed rate, four that are searched, and the best.
    assert len({info["tune_trial_id"] for info in infos}) == len(infos) == 6
    assert {info["backend"] for info in infos} == {"ray"}
    (folder,) = (tmp_path / "artifacts" / "analyse").glob("*/*/results.json")
    results = json.loads(folder.read_text())
    trials = {trial["lr"]: trial for trial in results["trials"]}
    assert trials.keys() == RATES
    assert trials[1e-5]["state"] == "stopped"
    assert len(trials[1e-5]["validation_accuracy"]) == 1
    assert trials[2.5e-4]["state"] == trials[1e-3]["state"] == "complete"
    states = sorted(info["state"] for info in infos if "state" in info)
    assert states == sorted(trial["state"] for trial in trials.values())
    assert results["best_lr"] == 2.5e-4
    assert {row["lr"] for row in results["accuracy"]} == {5e-5, 2.5e-4}

    again = sweep(tmp_path, "run", *words)
    assert again.returncode == 0, said(again)
    assert "all 6 trials are complete" in said(again)
    assert manifests(tmp_path, "train") == trained
    assert "nothing to remove" in said(sweep(tmp_path, "gc"))
