"""Examples: every pair in a file, in a page those that the types disagree on most, and what the store lacks."""

import pytest
from pyarrow import parquet

from orchestrator.cli.main import Grid, main
from orchestrator.report import page
from orchestrator.report.comparison import Analysis
from orchestrator.report.page import SHOWN, pair_rows, shown_examples, write_full_report
from orchestrator.report.results import sweep_results
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, write_declaration
from sweeps.full_grid import full_grid
from tests.orchestrator.simulated import ULTRAFEEDBACK, simulated_sweep
from trainers.data.records import Pair, user_prompt, write_pairs

PAIRS = 240


@pytest.fixture
def sweep(store: Store, monkeypatch: pytest.MonkeyPatch) -> Declaration:
    """Two types on one set of which the store has the texts, on another of which it has none."""
    monkeypatch.setattr(page, "every_figure", lambda *_: iter(()))
    declared = simulated_sweep(store, models=("llama-64",), seeds=(0, 1), sets=ULTRAFEEDBACK[:2], pairs=PAIRS)
    texts = [
        Pair(prompt=user_prompt(f"<b>question</b> {i}"), chosen=f"good {i}", rejected=f"bad {i} " * 900)
        for i in range(PAIRS)
    ]
    with store.write("dataset", "ultrafeedback") as attempt:
        write_pairs(texts, attempt.directory / "pairs.jsonl")
    write_declaration(declared, store)
    return declared


def test_the_file_holds_every_pair_with_what_each_type_makes_of_it(store: Store, sweep: Declaration):
    rows = parquet.read_table(write_full_report(sweep, store).folder / "pairs.parquet").to_pylist()
    assert len(rows) == 2 * PAIRS
    first, last = rows[3], rows[-1]
    assert (first["prompt"], first["chosen"]) == ("user: <b>question</b> 3", "good 3")
    assert (last["evaluation_set"], last["prompt"]) == ("ultrafeedback_paraphrase", None)
    trials = {item.record.seed: item for item in sweep_results(sweep, store) if item.record.reward == "im_rm"}
    ranked = [float(item.evaluations[0].scores.chosen[3] > 0) for item in trials.values()]
    assert first["im_rm_right"] == sum(ranked) / 2


def test_a_page_shows_at_most_two_hundred_from_both_ends_of_the_disagreement(
    store: Store, sweep: Declaration
):
    analysis = Analysis(sweep_results(sweep, store))
    rows = pair_rows(analysis, store)
    found = shown_examples(rows, analysis.rewards)
    assert len(found) == SHOWN == 200
    gaps = [row["ex_rm_right"] - row["im_rm_right"] for row in found]
    every = [row["ex_rm_right"] - row["im_rm_right"] for row in rows if row["prompt"] is not None]
    assert (gaps[0], gaps[-1]) == (max(every), min(every))
    assert gaps == sorted(gaps, reverse=True)
    text = (write_full_report(sweep, store).folder / "report.html").read_text()
    assert text.count("<article") == SHOWN
    assert max(map(len, text.split("<article")[1:-1])) < 3000
    assert "&lt;b&gt;question" in text
    assert "<b>question" not in text
    for choice in (
        "EX-RM right, IM-RM wrong",
        "IM-RM right, EX-RM wrong",
        "largest margins",
        "<option>ultrafeedback<",
    ):
        assert choice in text


def test_the_baseline_is_chosen_by_a_flag_and_kept(
    store: Store, sweep: Declaration, capsys: pytest.CaptureFixture[str]
):
    def report(*flags: str) -> tuple[int, str]:
        asked = ["report", "--storage", str(store.root), "--name", "demo", *flags]
        with pytest.raises(SystemExit) as ended:
            main(Grid(build=full_grid), "full_grid.py", arguments=asked)
        said = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((said.out + said.err).split())

    assert "EX-RM − IM-RM: trained on" in report()[1]
    assert "IM-RM − EX-RM: trained on" in report("--baseline", "im_rm")[1]
    # `run` and `sync` write the report without the flag.
    write_full_report(sweep, store, anew=True)
    assert "IM-RM − EX-RM: trained on" in report()[1]
    code, said = report("--baseline", "dpo")
    assert code == 2
    assert "--baseline dpo: the sweep has no such reward type; it has ex_rm, im_rm." in said
