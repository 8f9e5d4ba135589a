"""Ties are trained on where they are asked for, and never evaluated."""

import json

from orchestrator.spec import catalog
from sweeps.full_grid import full_grid
from tests.sweep_runs import SMALL, run_sweep
from trainers.data.worlds import tiny_pairs
from trainers.evaluate.scores import read_pair_scores
from trainers.pairs.tokens import TokenFile


def test_ties_of_a_set_that_is_evaluated_on_its_training_rows_are_not_scored(tiny_model, tmp_path):
    file, storage = tmp_path / "mine.jsonl", tmp_path / "store"
    rows = [
        {
            "prompt": pair.prompt[0].content,
            "response_1": pair.chosen,
            "response_2": pair.rejected,
            "preference_strength": -(number % 2),
        }
        for number, pair in enumerate(tiny_pairs("train")[:8])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--models", str(tiny_model), "--train-sets", f"mine={file}", "--eval-sets", f"seen={file}:train")
    more = ("--ties", "--rewards", "ex_rm", "--category", "mine/seen=training-pairs")
    assert run_sweep("ties", full_grid, catalog.PROFILES, storage, *words, *more, *SMALL) == 0
    (tokens,) = (storage / "artifacts" / "prepare").glob("*/*/pairs.arrow")
    assert [pair.tie for pair in TokenFile(tokens)].count(True) == 4
    (scores,) = (storage / "artifacts" / "evaluate").glob("*/*/scores.parquet")
    assert len(read_pair_scores(scores).index) == 4
