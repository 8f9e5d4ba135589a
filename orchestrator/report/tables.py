"""A table of a report, held once and written as CSV, parquet, markdown and HTML cells."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

from orchestrator.report.statistics import Estimate

Value = Union[str, int, float, bool, Estimate, None]
NOTHING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """`name` is for machines, `title` for people; `form` is the format of its numbers."""

    name: str
    title: str
    form: str = ".3f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of values under columns; `note` says how they came about."""

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]


def text(value: Value, column: Column) -> str:
    """A value as people read it: an estimate with its interval, and ± its standard deviation over seeds."""
    if value is None:
        return NOTHING
    if isinstance(value, Estimate):
        spread = "" if value.std is None else f" ± {value.std:.3f}"
        form = column.form
        return f"{value.value:{form}}{spread} [{value.low:{form}}, {value.high:{form}}]"
    if isinstance(value, float):
        return f"{value:{column.form}}"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def sort_key(value: Value) -> str:
    """What a column is sorted by in a page: a plain number, or the text."""
    if isinstance(value, Estimate):
        return repr(value.value)
    return "" if value is None else str(value)


def records(table: Table) -> list[dict[str, Any]]:
    """One flat dictionary per row: an estimate becomes name, name_std, name_low and name_high."""
    estimates = {
        column.name
        for number, column in enumerate(table.columns)
        if any(isinstance(row[number], Estimate) for row in table.rows)
    }
    return [
        {
            name: flat
            for column, value in zip(table.columns, row, strict=True)
            for name, flat in _flat(column.name, value, column.name in estimates)
        }
        for row in table.rows
    ]


def _flat(name: str, value: Value, is_estimate: bool) -> list[tuple[str, Any]]:
    if not is_estimate:
        return [(name, value)]
    found = value if isinstance(value, Estimate) else None
    return [
        (name, found and found.value),
        (f"{name}_std", found and found.std),
        (f"{name}_low", found and found.low),
        (f"{name}_high", found and found.high),
    ]


def csv_text(table: Table) -> str:
    """For a spreadsheet."""
    out = io.StringIO()
    rows = records(table)
    names = list(rows[0]) if rows else [column.name for column in table.columns]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet_bytes(table: Table) -> bytes:
    """For pandas and the like."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    rows = records(table)
    if rows:
        parquet.write_table(pa.Table.from_pylist(rows), sink)
    else:
        parquet.write_table(pa.table({column.name: [] for column in table.columns}), sink)
    return sink.getvalue()


def markdown(table: Table) -> str:
    """For a document."""
    lines = [[column.title for column in table.columns]]
    lines += [
        [text(value, column) for value, column in zip(row, table.columns, strict=True)] for row in table.rows
    ]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([drawn[0], "|" + "---|" * len(table.columns), *drawn[1:]])


def columns(*described: Sequence[str]) -> tuple[Column, ...]:
    """Columns of (name, title) or (name, title, format)."""
    return tuple(
        Column(name=item[0], title=item[1], form=item[2] if len(item) > 2 else ".3f") for item in described
    )
