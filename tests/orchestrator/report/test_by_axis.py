"""What the values of an axis come to, and which is best on held-out pairs; and the numbers of suites beside them."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.cli.main import Grid, main
from orchestrator.report.by_axis import axes_of, axis_tables, draw_axis
from orchestrator.report.comparison import Analysis
from orchestrator.report.house_style import look, rendered
from orchestrator.report.results import sweep_results
from orchestrator.report.summary import suites
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, write_declaration
from sweeps.full_grid import full_grid
from tests.orchestrator.simulated import simulated_sweep
from trainers.errors import SpecError

KINDS = ("ex_rm", "im_rm_epochs=2_lr=1e-05", "im_rm_epochs=2_lr=0.0001", "im_rm_epochs=2_lr=2e-06")
SETS = (("ultrafeedback", "in-distribution"), ("suite", "domain shift"))


@pytest.fixture
def declared(store: Store) -> Declaration:
    """A type that reads no learning rate, and one at three, of which the second is the best and the last is missing."""
    strengths = {
        (kind, category): strength
        for kind, strength in zip(KINDS, (0.0, 0.5, 1.5, 1.0), strict=True)
        for _, category in SETS
    }
    found = simulated_sweep(
        store,
        models=("llama-64",),
        rewards=KINDS,
        seeds=(0,),
        sets=SETS,
        pairs=60,
        strengths=strengths,
        missing=1,
    )
    trials = [
        replace(trial, axes={"epochs": 2, "lr": float(rate)} if rate else {})
        for trial in found.trials
        for rate in (trial.reward.partition("lr=")[2],)
    ]
    return replace(found, trials=tuple(trials))


def test_an_axis_has_a_row_for_each_value_and_the_best_by_held_out_pairs(store: Store, declared: Declaration):
    assert axes_of(declared.trials) == {"lr": ["2e-06", "1e-05", "0.0001"]}
    results = sweep_results(declared, store)
    (table,) = axis_tables(Analysis(results))
    rows = [row for row in table.rows if row["category"] == "domain shift"]
    # What does not read the axis stands at every value, and what is missing has no number.
    assert [(row["reward"], row["lr"], "accuracy" in row) for row in rows] == [
        ("EX-RM", "2e-06", True),
        ("EX-RM", "1e-05", True),
        ("EX-RM", "0.0001", True),
        ("IM-RM epochs=2", "2e-06", False),
        ("IM-RM epochs=2", "1e-05", True),
        ("IM-RM epochs=2", "0.0001", True),
    ]
    whole = Analysis(results)
    (scope,) = [item for item in whole.categories() if item.category == "domain shift"]
    assert (
        rows[4]["accuracy"] == whole.mean(scope, "im_rm_epochs=2_lr=1e-05", "accuracy", ["llama-64"]).estimate
    )
    assert rows[4]["difference"].value == pytest.approx(rows[1]["accuracy"].value - rows[4]["accuracy"].value)
    assert "difference" not in rows[1] or rows[1]["difference"] is None
    assert "held_out" not in table.names
    held_out = dict(zip(KINDS, (None, 0.5, 0.75, 0.7), strict=True))
    results = [replace(item, validation_accuracy=held_out[item.record.reward]) for item in results]
    (table,) = axis_tables(Analysis(results))
    best = "Best by held-out pairs, trained on ultrafeedback: IM-RM epochs=2 at lr 0.0001 (0.750; mean over 1 training)."
    assert best in table.note
    diverged = [
        replace(item, validation_accuracy=item.validation_accuracy if item.evaluations else None)
        for item in results
    ]
    (table,) = axis_tables(Analysis(diverged))
    assert best.replace("training).", "training; not complete at 2e-06).") in table.note
    assert [row.get("held_out") for row in table.rows][3:6] == [None, 0.5, 0.75]
    assert rendered("by_lr", "", "", lambda: draw_axis(table)) is not None
    words = replace(table, rows=[{**row, "lr": "cosine"} for row in table.rows])
    assert draw_axis(words) is None


def test_the_report_holds_axes_and_suites(store: Store, declared: Declaration, capsys):
    for trial in declared.trials[:3]:
        suite = {"score": 0.25, "section/chat": 0.5, "subset/a": 0.1, "items": 15.0, "left_out": 2.0}
        written = store.manifest("evaluate", trial.evaluations[1].key)
        assert written is not None
        file = store.read_file("evaluate", trial.evaluations[1].key, "scores.parquet")
        scores = parquet.read_table(file)
        scores = scores.append_column("number", pa.array(np.arange(60) // 4))
        with store.write("evaluate", f"{trial.key}-scored") as attempt:
            noted = scores.replace_schema_metadata({"suite": json.dumps(suite)})
            parquet.write_table(noted, attempt.directory / "scores.parquet")
    trials = tuple(
        replace(
            trial,
            evaluations=(trial.evaluations[0], replace(trial.evaluations[1], key=f"{trial.key}-scored")),
        )
        for trial in declared.trials
    )
    declared = replace(declared, trials=trials)
    analysis = Analysis(sweep_results(declared, store))
    table = suites(analysis)
    assert [(row["number"], row["model"]) for row in table.rows] == [
        (number, "llama-64") for number in ("score", "section/chat")
    ]
    (scope,) = [item for item in analysis.single_sets() if item.dataset == "suite"]
    with pytest.raises(SpecError, match="suite/score has no interval"):
        _ = analysis.difference(scope, "suite/score").estimate
    assert table.rows[0]["im_rm_epochs=2_lr=1e-05"] == 0.25
    assert table.rows[0]["prompts"] == "15"
    write_declaration(declared, store)
    flags = ["--storage", str(store.root), "--name", "demo", "--by", "lr"]
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), "full_grid.py", arguments=["report", *flags])
    assert ended.value.code == 3
    said = capsys.readouterr().out
    assert "Accuracy by lr" in said
    assert "EX-RM − it" in said
    folder = store.sweep_dir("demo") / "report"
    assert (folder / "figures" / "by_lr.svg").is_file()
    summary = (folder / "summary.md").read_text()
    for text in ("IM-RM epochs=2 lr=1e-05", "Suites by their own numbers", "Accuracy by lr"):
        assert text in summary
    sets = parquet.read_table(folder / "tables" / "differences.parquet").to_pylist()
    assert {row["over"] for row in sets if row["category"] == "domain shift"} == {
        "60 pairs of 15 prompts of one training of this model"
    }


def test_more_types_than_colours_stay_apart():
    kinds = [str(number) for number in range(36)]
    assert len({look(kind, kinds) for kind in kinds}) == 36
