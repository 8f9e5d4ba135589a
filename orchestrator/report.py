"""The sweep's answer: model × reward type × category, mean ± std over seeds, and EX−IM; read from scores.parquet.

A trial whose training accuracy is at chance is printed as not learned and enters no mean.
"""

import csv
import io
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyarrow import parquet
from rich.table import Table

from orchestrator.artifacts import Store
from orchestrator.audit_page import audit_section, audit_sweep
from orchestrator.declaration import Declaration
from orchestrator.epochs import epoch_lines, epoch_rows
from orchestrator.results import TrialResult, sweep_results, trial_rows
from orchestrator.spec import CATEGORIES, Category
from orchestrator.tables import Table as StatisticsTable
from orchestrator.tables import markdown
from trainers.data.audit import Audit
from trainers.disk import replace, replace_bytes

NOT_LEARNED = "not learned"
MEAN = "mean"
# The reward types that always have a column, and whose difference is shown.
COMPARED = ("ex_rm", "im_rm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Accuracy of one model, reward type, training set and category: one value per trained seed."""

    learned: tuple[float, ...]
    not_learned: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Mean over learned seeds; None where no seed learned."""
        return statistics.fmean(self.learned) if self.learned else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over learned seeds; None below two."""
        return statistics.stdev(self.learned) if len(self.learned) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            if not self.not_learned:
                return "–"
            return f"{statistics.fmean(self.not_learned):.3f} {NOT_LEARNED}"
        text = f"{self.mean:.3f}" if self.std is None else f"{self.mean:.3f} ± {self.std:.3f}"
        return f"{text}, {len(self.not_learned)} {NOT_LEARNED}" if self.not_learned else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: a cell for each reward type. `model` is MEAN for the mean over models that all learned."""

    train_set: str
    category: Category
    model: str
    cells: dict[str, Cell]

    @property
    def complete(self) -> bool:
        """Whether every reward type that was tried learned."""
        tried = [cell for cell in self.cells.values() if cell.learned or cell.not_learned]
        return all(cell.mean is not None for cell in tried)

    @property
    def difference(self) -> float | None:
        """EX−IM of the means; None where one is missing."""
        ex_rm, im_rm = (cell.mean if (cell := self.cells.get(kind)) else None for kind in COMPARED)
        return None if ex_rm is None or im_rm is None else ex_rm - im_rm

    def texts(self) -> tuple[str, ...]:
        """The line as printed."""
        difference = "–" if self.difference is None else f"{self.difference:+.3f}"
        return (self.train_set, self.category, self.model, *map(str, self.cells.values()), difference)


def header(rows: Sequence[Row]) -> tuple[str, ...]:
    """Column names: `ex_rm` is printed as EX-RM, `im_rm_no_reference` as IM-RM no reference."""
    kinds = list(rows[0].cells) if rows else list(COMPARED)
    return ("trained on", "category", "model", *map(reward_title, kinds), "EX−IM")


def reward_title(reward: str) -> str:
    """`ex_rm` as the field writes it: EX-RM."""
    for kind in ("ex_grm", "ex_rm", "im_rm"):
        if reward.startswith(kind):
            return kind.upper().replace("_", "-") + reward.removeprefix(kind).replace("_", " ")
    return reward


def table_rows(results: Sequence[TrialResult]) -> list[Row]:
    """Every (training set, category, model) with at least one score, each category closed by its mean."""
    rows: list[Row] = []
    for train_set in _unique(result.record.train_set for result in results):
        for category in CATEGORIES:
            found = [
                row
                for model in _unique(result.record.model for result in results)
                if (row := _row(results, train_set, category, model)) is not None
            ]
            rows += found
            if len(found) > 1 and (mean := _mean(found)) is not None:
                rows.append(mean)
    return rows


def _row(results: Sequence[TrialResult], train_set: str, category: Category, model: str) -> Row | None:
    here = [item for item in results if (item.record.train_set, item.record.model) == (train_set, model)]
    scored = [
        (item, accuracy) for item in here if (accuracy := item.category_accuracy().get(category)) is not None
    ]

    def cell(reward: str) -> Cell:
        trials = [(item.learned, accuracy) for item, accuracy in scored if item.record.reward == reward]
        return Cell(
            learned=tuple(accuracy for learned, accuracy in trials if learned),
            not_learned=tuple(accuracy for learned, accuracy in trials if not learned),
        )

    others = sorted({result.record.reward for result in results} - set(COMPARED))
    cells = {kind: cell(kind) for kind in (*COMPARED, *others)}
    row = Row(train_set=train_set, category=category, model=model, cells=cells)
    return row if any(cell.learned or cell.not_learned for cell in row.cells.values()) else None


def _mean(rows: Sequence[Row]) -> Row | None:
    whole = [row for row in rows if row.complete]
    if not whole:
        return None

    def over_models(cells: Iterable[Cell]) -> Cell:
        return Cell(learned=(statistics.fmean(cell.mean or 0.0 for cell in cells),), not_learned=())

    return Row(
        train_set=rows[0].train_set,
        category=rows[0].category,
        model=f"{MEAN} of {len(whole)}",
        cells={kind: over_models(row.cells[kind] for row in whole) for kind in rows[0].cells},
    )


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def terminal_table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    table = Table(title="accuracy by category", title_justify="left")
    for number, name in enumerate(header(rows)):
        table.add_column(name, justify="left" if number < 3 else "right", overflow="fold")
    above: Row | None = None
    for row, below in itertools.zip_longest(rows, rows[1:]):
        train_set, category, *rest = row.texts()
        if above is not None and above.train_set == row.train_set:
            category = "" if above.category == row.category else category
            train_set = ""
        ends = below is None or (below.train_set, below.category) != (row.train_set, row.category)
        table.add_row(train_set, category, *rest, end_section=ends)
        above = row
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """For a document."""
    names = header(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(row.texts()) + " |" for row in rows]
    return "\n".join(lines)


def csv_table(rows: Sequence[Row]) -> str:
    """For a spreadsheet: numbers apart, not-learned seeds counted."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kinds = list(rows[0].cells) if rows else list(COMPARED)
    columns = [f"{kind}_{what}" for kind in kinds for what in ("mean", "std", "seeds", "not_learned")]
    writer.writerow(["train_set", "category", "model", *columns, "ex_minus_im"])
    for row in rows:
        cells = [
            value
            for cell in row.cells.values()
            for value in (cell.mean, cell.std, len(cell.learned), len(cell.not_learned))
        ]
        writer.writerow([row.train_set, row.category, row.model, *cells, row.difference])
    return out.getvalue()


class Written(NamedTuple):
    """A report's folder, and what it was written from."""

    folder: Path
    rows: list[Row]
    results: Sequence[TrialResult]


def write_report(
    declaration: Declaration,
    store: Store,
    results: Sequence[TrialResult] | None = None,
    audit: Audit | None = None,
    *,
    conclusions: Sequence[str] = (),
    tables: Sequence[StatisticsTable] = (),
    ending: str = "",
) -> Written:
    """Write summary.md, tables/accuracy.csv and trials.parquet; `results` and `audit` where they are there already.

    The summary begins with `conclusions`, holds `tables` below that of accuracies, and ends with `ending`.
    """
    results = sweep_results(declaration, store) if results is None else results
    audit = audit_sweep(declaration, store) if audit is None else audit
    rows = table_rows(results)
    folder = store.local_sweep_dir(declaration.sweep) / "report"
    said = _summary(declaration, results, rows, conclusions, tables)
    replace(folder / "summary.md", said + audit_section(audit, results, folder) + ending)
    replace(folder / "tables" / "accuracy.csv", csv_table(rows))
    trials = store.local_sweep_dir(declaration.sweep) / "trials.parquet"
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(trial_rows(results)), sink)
    # Two drivers that end at once both write it.
    replace_bytes(trials, sink.getvalue().to_pybytes())
    for written in (folder, trials):
        store.share(written)
    return Written(folder=folder, rows=rows, results=results)


def _summary(
    declaration: Declaration,
    results: Sequence[TrialResult],
    rows: Sequence[Row],
    conclusions: Sequence[str],
    tables: Sequence[StatisticsTable],
) -> str:
    """What is concluded, accuracy by category, more tables, and what is missing."""
    complete = sum(result.complete for result in results)
    lines = [
        f"# {declaration.sweep}",
        "",
        *(line for sentence in conclusions for line in (sentence, "")),
        f"{complete} of {len(results)} trials complete. Accuracy by category: mean over a category's sets, then",
        "mean ± standard deviation over seeds; EX−IM is the difference of the means.",
        "",
        markdown_table(rows),
    ]
    for table in tables:
        lines += ["", f"{table.title}. {table.note}", "", markdown(table)]
    lines += epoch_lines(epoch_rows(results))
    unlearned = [result.record.name for result in results if result.trained and not result.learned]
    if unlearned:
        lines += ["", "Not learned (training accuracy at chance; in no mean):", ""]
        lines += [f"- {name}" for name in unlearned]
    holes = [result.record.name for result in results if not result.complete]
    if holes:
        lines += ["", "Missing:", "", *(f"- {name}" for name in holes)]
    return "\n".join(lines) + "\n"
