"""Answers of a policy on a real Ray: one task draws them, the trials that score them wait for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps import best_of_n
from tests.sweep_runs import run_analysis

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = (
    *("--samples", "4", "--max-new-tokens", "3", "--seeds", "0", "--lr", "1e-3", "--epochs", "20"),
    *("--train-sets", "tiny_world", "--eval-sets", "tiny_world", "--max-train-pairs", "16"),
)


def test_answers_are_drawn_once_on_ray_and_are_those_of_the_process_itself(tiny_model, tmp_path):
    drawn = {}
    words = [*WORDS, "--models", f"small={tiny_model}", "--profile", "laptop", "--backend"]
    command = [sys.executable, str(ROOT / "sweeps" / "best_of_n.py"), *words, "ray", "--storage", "ray"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Over-optimisation, small trained on tiny_world" in done.stdout
    assert run_analysis(best_of_n, tmp_path / "inline", *words, "inline", draws=False) == 0
    for backend in ("ray", "inline"):
        storage = tmp_path / backend
        (file,) = (storage / "artifacts" / "sample").glob("*/manifest.json")
        (answers,) = file.parent.glob("*/answers.jsonl")
        drawn[backend] = file.parent.name, answers.read_bytes()
        trials = json.loads((storage / "sweeps" / "best_of_n" / "sweep.json").read_text())["trials"]
        assert all((storage / "artifacts" / "evaluate" / item["answers"][0]).is_dir() for item in trials)
    assert drawn["ray"] == drawn["inline"]
