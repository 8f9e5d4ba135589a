"""The sweep's answer: model × reward type × category, mean ± std over seeds, and EX−IM; read from scores.parquet.

A trial whose training accuracy is at chance is printed as not learned and enters no mean.
"""

import csv
import io
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet
from rich.table import Table

from orchestrator.report.audit_page import audit_section, audit_sweep
from orchestrator.report.common_pairs import left_out_lines, on_common_pairs
from orchestrator.report.epochs import epoch_lines, epoch_rows
from orchestrator.report.results import TrialResult, sweep_results, trial_rows
from orchestrator.report.tables import Table as StatisticsTable
from orchestrator.report.tables import markdown
from orchestrator.spec.trials import CATEGORIES, Category
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration
from trainers.data.audit import Audit
from trainers.disk import replace, replace_bytes

NOT_LEARNED = "not learned"
MEAN = "mean"
# The reward types that always have a column, and whose difference is shown.
COMPARED = ("ex_rm", "im_rm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Accuracy of one model, reward type, training set and category: one value per trained seed.

    `seeds` are those that learned, in their values' order; `missing` counts the trials that are not there.
    """

    learned: tuple[float, ...] = ()
    not_learned: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    missing: int = 0

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
            text = f"{statistics.fmean(self.not_learned):.3f} {NOT_LEARNED}"
            return f"{text}, {self.missing} missing" if self.missing else text
        text = f"{self.mean:.3f}" if self.std is None else f"{self.mean:.3f} ± {self.std:.3f}"
        text += f", {len(self.not_learned)} {NOT_LEARNED}" if self.not_learned else ""
        return f"{text}, {self.missing} missing" if self.missing else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: a cell for each reward type.

    `paired` are the means of EX-RM and IM-RM over what both have: over `paired_over` seeds, or in a line that is a mean
    over models. There `models` counts those of each type's mean, and `model` says how many they are.
    """

    train_set: str
    category: Category
    model: str
    cells: dict[str, Cell]
    paired: tuple[float, float] | None
    paired_over: int
    models: dict[str, int]

    @property
    def difference(self) -> float | None:
        """EX−IM over what both have; None where that is nothing."""
        return None if self.paired is None else self.paired[0] - self.paired[1]

    def texts(self) -> tuple[str, ...]:
        """The line as printed; the difference says over how many it is where a mean is over more."""
        difference = "–" if self.difference is None else f"{self.difference:+.3f}"
        counts = self.models or {kind: len(cell.learned) for kind, cell in self.cells.items()}
        if self.paired and any(counts.get(kind) != self.paired_over for kind in COMPARED):
            unit = "model" if self.models else "seed"
            difference += f" over {self.paired_over} {unit}{'s' if self.paired_over > 1 else ''}"
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
    asked = [
        item
        for item in results
        if (item.record.train_set, item.record.model) == (train_set, model)
        and any(wanted.category == category for wanted in item.record.evaluations)
    ]

    def cell(reward: str) -> Cell:
        trials = [item for item in asked if item.record.reward == reward]
        found = [
            (item, accuracy)
            for item in trials
            if (accuracy := item.category_accuracy().get(category)) is not None
        ]
        return Cell(
            learned=tuple(accuracy for item, accuracy in found if item.learned),
            not_learned=tuple(accuracy for item, accuracy in found if not item.learned),
            seeds=tuple(item.record.seed for item, _ in found if item.learned),
            missing=len(trials) - len(found),
        )

    others = sorted({result.record.reward for result in results} - set(COMPARED))
    cells = {kind: cell(kind) for kind in (*COMPARED, *others)}
    if not any(cell.learned or cell.not_learned for cell in cells.values()):
        return None
    by_seed = [dict(zip(cells[kind].seeds, cells[kind].learned, strict=True)) for kind in COMPARED]
    both = [seed for seed in by_seed[0] if seed in by_seed[1]]
    return Row(
        train_set=train_set,
        category=category,
        model=model,
        cells=cells,
        paired=_pair_means([(by_seed[0][seed], by_seed[1][seed]) for seed in both]),
        paired_over=len(both),
        models={},
    )


def _pair_means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if not pairs:
        return None
    explicit, implicit = zip(*pairs, strict=True)
    return statistics.fmean(explicit), statistics.fmean(implicit)


def _mean(rows: Sequence[Row]) -> Row | None:
    """Over the models that have every reward type that they were asked for; one that no model has is not waited for."""
    known = {kind for row in rows for kind, cell in row.cells.items() if cell.learned}
    whole = [row for row in rows if _has(row, known)]
    means = {
        kind: [mean for row in whole if (mean := row.cells[kind].mean) is not None] for kind in rows[0].cells
    }
    models = {kind: len(found) for kind, found in means.items() if found}
    if not models:
        return None
    paired = [row.paired for row in rows if row.paired is not None]
    return Row(
        train_set=rows[0].train_set,
        category=rows[0].category,
        model=mean_label(models),
        cells={
            kind: Cell(learned=(statistics.fmean(found),) if found else ()) for kind, found in means.items()
        },
        paired=_pair_means(paired),
        paired_over=len(paired),
        models=models,
    )


def _has(row: Row, kinds: Iterable[str]) -> bool:
    cells = [row.cells[kind] for kind in kinds]
    return all(cell.learned or not (cell.not_learned or cell.missing) for cell in cells)


def mean_label(models: Mapping[str, int]) -> str:
    """`mean of 3`, or how many models each reward type's mean is over where they differ."""
    counts = set(models.values())
    if len(counts) == 1:
        return f"{MEAN} of {counts.pop()}"
    return f"{MEAN} of {', '.join(f'{count} {reward_title(kind)}' for kind, count in models.items())}"


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
    columns = [
        f"{kind}_{what}" for kind in kinds for what in ("mean", "std", "seeds", "not_learned", "missing")
    ]
    end = ("ex_minus_im", "ex_minus_im_seeds", "ex_minus_im_models")
    writer.writerow(["train_set", "category", "model", *columns, *end])
    for row in rows:
        cells = [
            value
            for cell in row.cells.values()
            # A mean over models has no seeds of its own.
            for value in (cell.mean, cell.std, *([""] * 3 if row.models else _counts(cell)))
        ]
        over = ("", row.paired_over) if row.models else (row.paired_over, "")
        writer.writerow([row.train_set, row.category, row.model, *cells, row.difference, *over])
    return out.getvalue()


def json_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For a program: every seed's value, and the difference."""
    return [{**asdict(row), "difference": row.difference} for row in rows]


def _counts(cell: Cell) -> tuple[int, int, int]:
    return len(cell.learned), len(cell.not_learned), cell.missing


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
    compared = on_common_pairs(results)
    rows = table_rows(compared)
    folder = store.local_sweep_dir(declaration.sweep) / "report"
    said = _summary(declaration, results, compared, rows, conclusions, tables)
    replace(folder / "summary.md", said + audit_section(audit, compared, folder) + ending)
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
    compared: Sequence[TrialResult],
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
        "mean ± standard deviation over seeds; EX−IM is over the seeds and models that have both.",
        "",
        markdown_table(rows),
    ]
    if left_out := left_out_lines(results):
        lines += ["", *(f"- {line}" for line in left_out)]
    for table in tables:
        lines += ["", f"{table.title}. {table.note}", "", markdown(table)]
    lines += epoch_lines(epoch_rows(compared))
    unlearned = [result.record.name for result in results if result.trained and not result.learned]
    if unlearned:
        lines += ["", "Not learned (training accuracy at chance; in no mean):", ""]
        lines += [f"- {name}" for name in unlearned]
    holes = [result.record.name for result in results if not result.complete]
    if holes:
        lines += ["", "Missing:", "", *(f"- {name}" for name in holes)]
    return "\n".join(lines) + "\n"
