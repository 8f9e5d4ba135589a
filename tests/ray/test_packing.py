"""Twelve trials through Tune, the gate and the placement on 2 × 4 logical GPUs; the trainings only sleep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_state

ROOT = Path(__file__).resolve().parent.parent.parent
TRIALS = 12


@pytest.mark.ray
@pytest.mark.slow
def test_twelve_trials_are_packed_on_two_nodes_of_four_gpus(tmp_path):
    words = ("--trials", str(TRIALS), "--nodes", "2", "--gpus", "4", "--lower-bound-s", "5")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.makespan", *words, "--storage", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(tmp_path / "store")
    notes = read_state("makespan", store).trials
    assert [(note.state, note.retries) for note in notes.values()] == [("complete", [])] * TRIALS
    infos = [
        json.loads(file.read_text())["info"]
        for file in (store.root / "artifacts" / "train").glob("*/manifest.json")
    ]
    assert sorted(info["world_size"] for info in infos) == [1] * 4 + [2] * 4 + [4] * 4
    # A gang of four has a node to itself; both nodes are used.
    assert len({info["node"] for info in infos}) == 2
    assert len(list((store.root / "artifacts" / "evaluate").glob("*/manifest.json"))) == 2 * TRIALS
