"""The report's files: one self-contained page that leads with its conclusions, figures, tables, and a comparison."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import Table, parquet
from rich.console import Console

from orchestrator.cli.main import Grid, main
from orchestrator.cli.terminal import late_bar
from orchestrator.report import figures, house_style, two_sweeps
from orchestrator.report import page as full_report
from orchestrator.report.comparison import Analysis
from orchestrator.report.page import PAPER_LINK, said_conclusions, write_full_report
from orchestrator.report.results import sweep_results
from orchestrator.report.two_sweeps import other_sweep, write_comparison
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, write_declaration
from sweeps.full_grid import full_grid
from tests.orchestrator.simulated import REVERSED, ULTRAFEEDBACK, simulated_sweep
from tests.orchestrator.sweep_samples import commit_train
from trainers.data.records import Pair, user_prompt, write_pairs
from trainers.errors import SpecError

FIGURES = {
    "accuracy_by_category",
    "accuracy_by_model",
    "accuracy_by_set",
    "differences",
    "margins",
    "reliability",
    "training_curves",
    "win_rates",
}
FEW = (ULTRAFEEDBACK[0], ULTRAFEEDBACK[4])
SMALL = {"models": ("llama-64",), "seeds": (0, 1), "sets": FEW, "pairs": 30}
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Store, Declaration, Path]:
    """A complete sweep with its report."""
    store = Store(tmp_path_factory.mktemp("whole") / "store")
    declared = simulated_sweep(store, seeds=(0, 1), pairs=60)
    write_declaration(declared, store)
    return store, declared, write_full_report(declared, store).folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take most of a report's time."""
    for module in (full_report, two_sweeps):
        monkeypatch.setattr(module, "every_figure", lambda *_: iter(()))


@pytest.fixture
def page(whole) -> str:
    return (whole[2] / "report.html").read_text()


def test_every_figure_is_there_twice_and_shows_something(whole):
    folder = whole[2] / "figures"
    assert {file.name for file in folder.iterdir()} == {
        f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")
    }
    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as image:
            colours = {colour for _, colour in image.convert("RGB").reduce(4).getcolors(1 << 20)}
        assert len(colours) > 50, name
        assert (folder / f"{name}.svg").read_text().count("<path") > 20, name


def test_types_stay_apart_in_grey():
    from matplotlib.colors import to_rgb

    kinds = ("ex_rm", "im_rm")
    looks = [house_style.look(kind, kinds) for kind in kinds]
    grey = [np.dot(to_rgb(look.colour), (0.299, 0.587, 0.114)) for look in looks]
    assert abs(grey[0] - grey[1]) > 0.2
    named = ("ex_rm", "ex_rm_mean", "im_rm", "im_rm_no_reference", "ex_grm")
    all_looks = [house_style.look(kind, named) for kind in named]
    for part in ("colour", "marker", "hatch"):
        assert len({getattr(look, part) for look in all_looks}) == len(named)


def test_the_same_numbers_give_the_same_bytes(whole):
    store, declared, folder = whole
    analysis = Analysis(sweep_results(declared, store))
    for name, draw in (
        ("accuracy_by_category", lambda: figures.accuracy_bars(analysis, analysis.categories())),
        ("reliability", lambda: figures.reliability(analysis)),
    ):
        again = house_style.rendered(name, "", "", draw)
        assert again.png == (folder / "figures" / f"{name}.png").read_bytes()
        assert again.svg == (folder / "figures" / f"{name}.svg").read_bytes()


def test_every_table_is_there_as_csv_and_parquet_with_the_same_rows(whole):
    folder = whole[2] / "tables"
    names = {file.stem for file in folder.glob("*.parquet")}
    assert names >= {"differences", "win_rates", "accuracy_by_category", "sets", "calibration", "holes"}
    for name in names:
        table: Table = parquet.read_table(folder / f"{name}.parquet")
        rows = list(csv.DictReader(io.StringIO((folder / f"{name}.csv").read_text())))
        assert len(rows) == table.num_rows
        assert not rows or list(rows[0]) == table.column_names
    with (folder / "differences.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["accuracy_low"]) < float(first["accuracy"]) < float(first["accuracy_high"])


def test_the_page_asks_nothing_of_any_network(page: str):
    outside = re.findall(r"""(?:src|href|action|poster)\s*=\s*["']?\s*((?:https?:)?//[^"'\s>]+)""", page)
    assert set(outside) <= {PAPER_LINK}
    assert not re.findall(r"@import|url\(\s*[\"']?http|<link|<script\s+src|<iframe|fetch\(|XMLHttp", page)
    assert "default-src 'none'" in page
    assert len(page.encode()) < 5 * MEGABYTE


def test_the_page_leads_with_three_sentences_then_figures_then_tables_and_how_it_was_made(whole, page: str):
    said = said_conclusions(whole[2])
    assert len(said) == 3
    assert said[0].startswith("In accuracy")
    places = [page.index(mark) for mark in ('aria-label="Conclusion"', "<img", "<table", 'id="holes"')]
    assert places == sorted(places)
    shown = page.replace("&#39;", "'")
    made = ("python sweeps/full_grid.py report --name demo", "torch", "host (train)", "artifacts/train/demo-")
    assert all(text in shown for text in (*said, *made, "effective batch", "[S]"))
    assert page.count("data:image/svg+xml;base64,") == len(FIGURES)
    assert "There are no texts to show" in page
    assert page.count('<table class="sortable">') >= 9
    summary = (whole[2] / "summary.md").read_text()
    assert summary.index(said[0]) < summary.index("| trained on |")
    assert "Differences, paired by model, seed and pair" in summary


@pytest.mark.usefixtures("undrawn")
def test_a_price_gives_the_cost_and_is_kept(store: Store):
    declared = simulated_sweep(store, **SMALL)
    assert "cost, $" not in (write_full_report(declared, store).folder / "report.html").read_text()
    write_full_report(declared, store, price=3600.0)
    folder = write_full_report(declared, store, anew=True).folder
    train, evaluate = parquet.read_table(folder / "tables" / "time.parquet").to_pylist()
    assert (train["device"], evaluate["device"]) == ("GPU", "GPU")
    assert train["device_hours"] == pytest.approx(8 * train["hours"])
    assert evaluate["device_hours"] == pytest.approx(evaluate["hours"])
    assert train["cost"] == pytest.approx(3600 * train["device_hours"])
    assert "At $ 3600 per GPU-hour" in (folder / "report.html").read_text()


def test_a_report_of_the_same_results_is_not_written_again(whole):
    store, declared, folder = whole
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    write_full_report(declared, store)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_written_again_when_the_rows_that_it_reads_come_back(store: Store):
    declared = simulated_sweep(store, **SMALL)
    pairs = write_full_report(declared, store).folder / "pairs.parquet"
    digest = declared.trials[0].evaluations[0].dataset_digest
    stale = pairs.parent / "tables" / "by_lr.csv"
    stale.touch()
    assert set(parquet.read_table(pairs)["prompt"].to_pylist()) == {None}
    with store.write("dataset", digest) as attempt:
        write_pairs(
            [Pair(prompt=user_prompt(f"why {n}"), chosen="a", rejected="b") for n in range(30)],
            attempt.directory / "pairs.jsonl",
        )
    write_full_report(declared, store)
    assert not stale.exists()
    assert "user: why 0" in parquet.read_table(pairs)["prompt"].to_pylist()


@pytest.mark.usefixtures("undrawn")
def test_an_incomplete_sweep_says_so_and_is_written_again_once_there_is_more(store: Store):
    declared = simulated_sweep(store, missing=1, **SMALL)
    folder = write_full_report(declared, store).folder
    page = (folder / "report.html").read_text()
    assert "Incomplete: 1 of 4 trials are missing" in page
    assert f'<td data-sort="{declared.trials[-1].name}"' in page.split('id="holes"')[1]
    assert json.loads((folder / "report.json").read_text())["complete"] == 3
    with (folder / "tables" / "accuracy_by_category.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["im_rm_std"] == ""
    assert first["ex_rm_std"] != ""
    commit_train(store, declared.trials[-1].key)
    write_full_report(declared, store)
    assert '<td data-sort="ultrafeedback, rewardbench_math"' in (folder / "report.html").read_text()


def test_a_sweep_of_which_nothing_is_there_has_a_page(store: Store):
    declared = simulated_sweep(store, **{**SMALL, "models": ("<script>alert(1)</script>",)}, missing=4)
    folder = write_full_report(declared, store).folder
    page = (folder / "report.html").read_text()
    assert "Nothing can be concluded yet" in page
    assert "There is nothing to draw yet" in page
    assert not list((folder / "figures").glob("*"))
    assert page.rpartition("<h2")[2].startswith(' id="prefer">When to prefer')
    ending = (folder / "summary.md").read_text().rpartition("\n\n")[2]
    assert ending.startswith("When to prefer which. Nothing can be advised: ")
    # Names are text.
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_letters_that_the_font_lacks_stop_no_report():
    def draw():
        figure, (axis,) = house_style.panels(1, 1, 3, 3)
        axis.set_title("偏好1")
        return figure

    assert house_style.rendered("name", "", "", draw) is not None


@pytest.mark.usefixtures("undrawn")
def test_two_sweeps_stand_side_by_side(store: Store):
    ours = simulated_sweep(store, **SMALL)
    theirs = simulated_sweep(store, name="turned", strengths=REVERSED, missing=1, **SMALL)
    write_declaration(theirs, store)
    found = write_comparison(ours, store, *other_sweep("turned", store))
    assert found.file == store.sweep_dir("demo") / "report" / "compare-turned" / "compare.html"
    assert "Incomplete: 1 of 8 trials are missing" in found.file.read_text()
    assert (
        "trained on ultrafeedback as EX-RM, demo is ahead of turned in-distribution (+"
        in found.conclusions[0]
    )
    rows = {(row["train_set"], row["category"]): row for row in found.table.rows}
    row = rows["ultrafeedback as EX-RM", "in-distribution"]
    assert row["demo_minus_turned"].value == pytest.approx(row["demo"].value - row["turned"].value)
    assert row["demo_minus_turned"].low > 0
    assert row["demo"].value == pytest.approx(
        np.mean(
            [
                item.evaluations[0].metrics["accuracy"]
                for item in sweep_results(ours, store)
                if item.record.reward == "ex_rm"
            ]
        )
    )
    assert rows["ultrafeedback as IM-RM", "in-distribution"]["remarks"].startswith("turned: 1 missing")
    assert (found.file.parent / "tables" / "differences.csv").is_file()


@pytest.mark.usefixtures("undrawn")
def test_other_scores_under_the_same_keys_have_an_interval_of_their_own(store: Store, tmp_path: Path):
    """As of a sweep that was run again elsewhere on hardware that rounds differently."""
    ours, elsewhere = simulated_sweep(store, **SMALL), Store(tmp_path / "elsewhere")
    theirs = simulated_sweep(elsewhere, strengths=REVERSED, **SMALL)
    write_declaration(theirs, elsewhere)
    found = write_comparison(ours, store, *other_sweep(str(elsewhere.sweep_dir("demo")), store))
    alone = Analysis(sweep_results(theirs, elsewhere))
    for scope in alone.categories():
        there = alone.mean(scope, "ex_rm", "accuracy", ["llama-64"]).estimate
        (row,) = [
            row
            for row in found.table.rows
            if (row["train_set"], row["category"]) == ("ultrafeedback as EX-RM", scope.category)
        ]
        assert row["demo@elsewhere"] == there
        assert row["demo_minus_demo@elsewhere"].p > 0


def test_a_sweep_that_nobody_knows_is_refused(store: Store):
    write_declaration(simulated_sweep(store, missing=4, **SMALL), store)
    with pytest.raises(SpecError, match=r"--compare dmo: .*did you mean demo"):
        other_sweep("dmo", store)


@pytest.mark.usefixtures("undrawn")
def test_the_command_prints_what_is_concluded(store: Store, capsys: pytest.CaptureFixture[str]):
    for name in ("demo", "other"):
        write_declaration(
            simulated_sweep(store, name=name, missing=0 if name == "demo" else 4, **SMALL), store
        )
    flags = ["--storage", str(store.root), "--name", "demo", "--compare", "other"]
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), "full_grid.py", arguments=["report", *flags])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for text in (
        "accuracy by category",
        "In accuracy (95 % intervals",
        "demo and other share no model and seed that learned in both",
    ):
        assert text in said
    assert "report.html" in said
    assert "compare-other/compare.html" in said
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), "full_grid.py", arguments=["report", *flags, "--by", "lr"])
    assert ended.value.code == 2
    assert "--by lr: the sweep does not vary it; it varies no axis." in capsys.readouterr().err


def test_a_bar_comes_late_and_only_on_a_terminal():
    for after_s, terminal in ((0.0, False), (60.0, True)):
        out = io.StringIO()
        with late_bar(Console(file=out, force_terminal=terminal), "bootstrap", after_s) as step:
            step(1, 2)
        assert out.getvalue() == ""
