"""--suites of a sweep: a suite beside the profile's sets, its numbers in the results and in MLflow."""

import json

import pytest
from mlflow import MlflowClient
from pyarrow import parquet

from orchestrator.spec import catalog
from sweeps.full_grid import full_grid
from tests.sweep_runs import run_sweep, trial_rows
from trainers.evaluate.scores import read_pair_scores

WORDS = (
    *("--train-sets", "tiny_world", "--eval-sets", "tiny_world", "--max-train-pairs", "4"),
    *("--max-eval-pairs", "4", "--rewards", "ex_rm", "--seeds", "1", "--epochs", "1"),
)


@pytest.fixture(scope="module")
def swept(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    rows = [
        {
            "id": f"{domain}/{n}",
            "prompt": f"i often share bread {place}",
            "domain": domain,
            "chosen": ["honestly yes", "frankly yes", "honestly sure"],
            "rejected": ["apparently no", "supposedly no", "apparently never"],
        }
        for domain in ("chat", "code", "math", "safety-refuse")
        for n, place in enumerate(("at home", "at work"))
    ]
    copy = folder / "train.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS, "--models", f"tiny={tiny_model}"]
    storage = folder / "store"
    for suites in ([], ["--suites", f"rm_bench={copy}", "--extend"]):
        assert run_sweep("grid", full_grid, catalog.PROFILES, storage, *words, *suites) == 0
    return storage, copy, words


def test_a_suite_is_evaluated_whole_nothing_is_trained_again_and_mlflow_has_its_numbers(swept):
    storage, _, _ = swept
    rows = {row["evaluation_set"]: row for row in trial_rows(storage, "grid")}
    assert rows["tiny_world"]["n"] == 4
    assert rows["rm_bench"]["n"] == 8 * 3
    assert rows["rm_bench"]["category"] == "domain shift"
    assert rows["tiny_world"]["suite/score"] is None
    assert len(list((storage / "artifacts" / "train").glob("*/manifest.json"))) == 1

    (folder,) = [
        file.parent / noted["attempt"]
        for file in (storage / "artifacts" / "evaluate").glob("*/manifest.json")
        if (noted := json.loads(file.read_text()))["info"]["dataset"] == "rm_bench"
    ]
    table = parquet.read_table(folder / "scores.parquet")
    assert table["item"].to_pylist()[:3] == ["chat/0"] * 3
    assert table["rejected"].to_pylist()[:3] == [0, 1, 2]
    assert len({*table["chosen_reward"].to_pylist()}) > 2
    suite = read_pair_scores(folder / "scores.parquet").suite
    parts = [suite[f"suite/style/{style}"] for style in ("easy", "normal", "hard")]
    assert suite["suite/score"] == rows["rm_bench"]["suite/score"] == pytest.approx(sum(parts) / 3)
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("rmsweep").experiment_id])
    (metrics,) = [run.data.metrics for run in runs if "eval/rm_bench/suite/score" in run.data.metrics]
    assert {"eval/rm_bench/suite/style/hard", "eval/rm_bench/suite/subset/safety"} <= metrics.keys()
    assert len(metrics) < 60


def test_a_suite_that_is_none_or_has_no_copy_is_named_before_anything_starts(swept, capsys):
    storage, copy, words = swept
    assert run_sweep("none", full_grid, catalog.PROFILES, storage, *words, "--suites", "rm_bensh") == 2
    assert "--suites rm_bensh is no suite; did you mean rm_bench" in capsys.readouterr().err
    assert (
        run_sweep("none", full_grid, catalog.PROFILES, storage, *words, "--suites", f"judgebench={copy}") == 2
    )
    assert "row 0: no column 'response_A', which JudgeBench has" in capsys.readouterr().err
