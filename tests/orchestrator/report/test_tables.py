"""One table and its five looks: an estimate in each, what a row lacks, and names that are not to be read as markup."""

import csv
import io

from pyarrow import parquet
from rich.console import Console

from orchestrator.report.statistics import Estimate
from orchestrator.report.studies import as_markdown
from orchestrator.report.tables import Table, what_differs

HALF = Estimate(value=0.5, low=0.25, high=0.75, std=0.125)
TABLE = Table(
    name="some",
    title="Some",
    note="A note",
    columns="train_set model ex_rm learned pairs p",
    rows=[
        {"train_set": "a|b", "model": "one", "ex_rm": HALF, "learned": True, "pairs": 7, "p": 0.04321},
        {"train_set": "a|b", "model": "mean of 2", "pairs": 8},
    ],
    titles={"p": "p (pairs)"},
    forms={"p": ".4f"},
)
FLAT = {"ex_rm": 0.5, "ex_rm_std": 0.125, "ex_rm_low": 0.25, "ex_rm_high": 0.75}


def test_programs_read_an_estimate_in_four_columns():
    first, second = parquet.read_table(io.BytesIO(TABLE.parquet())).to_pylist()
    assert first == {"train_set": "a|b", "model": "one", **FLAT, "learned": True, "pairs": 7, "p": 0.04321}
    assert second == {**dict.fromkeys(first), "train_set": "a|b", "model": "mean of 2", "pairs": 8}
    (line, _) = csv.DictReader(io.StringIO(TABLE.csv()))
    assert line == {name: str(value) for name, value in first.items()}
    empty = Table(name="none", title="", columns="a b", rows=[])
    assert (empty.csv(), parquet.read_table(io.BytesIO(empty.parquet())).column_names) == (
        "a,b\n",
        ["a", "b"],
    )


def test_people_read_an_interval_and_a_dash_for_what_is_not_there():
    lines = as_markdown("title", ["Said."], [TABLE]).splitlines()
    assert lines[:6] == ["# title", "", "Said.", "", "Some. A note", ""]
    assert lines[6:10] == [
        "| trained on | model | EX-RM | learned | pairs | p (pairs) |",
        "|---|---|---|---|---|---|",
        "| a\\|b | one | 0.500 ± 0.125 [0.250, 0.750] | yes | 7 | 0.0432 |",
        "| a\\|b | mean of 2 | – | – | 8 | – |",
    ]


def test_a_terminal_of_80_columns_says_once_what_repeats_and_no_intervals():
    value = Estimate(value=0.889, low=0.8, high=0.9, std=0.013)
    row = {"train_set": "ultrafeedback", "category": "token-level shift", "ex_rm": value, "im_rm": value}
    table = Table(
        name="",
        title="",
        columns="train_set category model ex_rm im_rm gap",
        rows=[{**row, "model": name, "gap": 0.233} for name in ("llama-3.2-1b", "other")],
        titles={"gap": "EX-RM − IM-RM"},
        forms={"gap": "+.3f"},
        intervals=False,
    )
    out = io.StringIO()
    Console(file=out, width=80).print(table.terminal())
    said = "0.889 ± 0.013"
    for text in ("token-level shift", "llama-3.2-1b", f"{said} │ {said}", "EX-RM − IM-RM", "+0.233"):
        assert text in out.getvalue()
    assert out.getvalue().count("ultrafeedback") == 1


def test_a_page_sorts_by_numbers_and_knows_means():
    (is_mean, first), (second_is_mean, second) = TABLE.cells()
    assert (is_mean, second_is_mean) == (False, True)
    assert [sort for _, sort, _ in first] == ["a|b", "one", "0.5", "True", "7", "0.04321"]
    assert second[2] == ("number", "", "–")
    assert [TABLE.css(name) for name in TABLE.names] == ["", "", "number", "", "number", "number"]


def test_a_name_is_parted_into_what_differs_and_what_is_the_same():
    names = {"a": "m · ex_rm · t · s0", "b": "m · im_rm · t · s1"}
    assert what_differs(names) == {"a": ("ex_rm · s0", "m · t"), "b": ("im_rm · s1", "m · t")}
    assert what_differs({"a": names["a"]}) == {"a": (names["a"], "")}
    assert what_differs({**names, "c": "other"})["b"] == (names["b"], "")
