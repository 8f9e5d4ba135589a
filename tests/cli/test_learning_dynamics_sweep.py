"""sweeps/learning_dynamics.py at its smallest, on untrained weights: the formulas hold for a real model's own steps."""

import json
from types import SimpleNamespace

import pytest
from pyarrow import parquet

from orchestrator.cli.analyses import analyses_of_untrained
from sweeps import learning_dynamics
from tests.sweep_runs import artifacts, run_analysis

SMALL = ("--max-train-pairs", "2", "--max-eval-pairs", "4")


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory):
    """Step size → folder of the analysis."""
    storage = tmp_path_factory.mktemp("dynamics") / "store"
    steps = {}
    for step_size in ("2e-3", "1e-3"):
        asked = learning_dynamics.Parameters(step_size=float(step_size), beta=0.5)
        found = analyses_of_untrained("learning_dynamics", 1, learning_dynamics.compute, asked)
        before = artifacts(storage)
        module = SimpleNamespace(__name__="learning_dynamics", EXPERIMENT=found)
        assert run_analysis(module, storage, "--models", str(tiny_model), *SMALL) == 0
        ((_, steps[step_size]),) = artifacts(storage).items() - before.items()
    return steps


def test_the_change_of_an_ex_rm_is_exact_and_the_parts_of_an_im_rms_add_up_to_it(found):
    rows = parquet.read_table(found["1e-3"] / "changes.parquet").to_pylist()
    assert len(rows) == 2 * 2 * 2 * 4
    assert {row["set"] for row in rows} == {"tiny_world", "tiny_world_paraphrase"}
    for row in rows:
        if row["reward"] == "ex_rm":
            assert row["measured"] == pytest.approx(row["predicted"], rel=1e-9, abs=1e-13)
            assert row["token_matches"] is None
        else:
            assert row["token_matches"] + row["other_tokens"] == pytest.approx(row["predicted"])
            assert row["measured_all_weights"] != row["measured"]
    assert any(abs(row["predicted"]) > 1e-8 for row in rows if row["reward"] == "ex_rm")
    assert "| im_rm | tiny_world_paraphrase |" in (found["1e-3"] / "summary.md").read_text()
    assert (found["1e-3"] / "figures" / "learning_dynamics.svg").stat().st_size > 1000


def test_half_the_step_is_half_the_error_of_an_im_rm(found):
    def errors(step_size):
        results = json.loads((found[step_size] / "results.json").read_text())
        return [results["im_rm"][name]["relative_error"] for name in results["im_rm"]]

    for large, small in zip(errors("2e-3"), errors("1e-3"), strict=True):
        assert large < 0.1
        assert large / small == pytest.approx(2, rel=0.05)


def test_a_set_cannot_be_called_as_the_training_pairs_are(tmp_path):
    assert run_analysis(learning_dynamics, tmp_path / "store", "--eval-sets", "seen=tiny_world") == 2
