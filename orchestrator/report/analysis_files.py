"""The files of an analysis: results.json, its rows as parquet, summary.md with tables, figures."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from orchestrator.report.house_style import rendered
from orchestrator.report.tables import Table
from orchestrator.store.artifacts import Attempt

if TYPE_CHECKING:
    pass

Rows = Sequence[Mapping[str, Any]]


def write_analysis(
    attempt: Attempt,
    title: str,
    paragraphs: Sequence[str],
    tables: Sequence[Table] = (),
    *,
    results: Mapping[str, Any],
    rows: Mapping[str, Rows] | None = None,
    figures: Mapping[str, Callable[[], Any]] | None = None,
) -> None:
    """Write the findings of an analysis into its folder, and `results` into its manifest as well.

    `results` may hold dataclasses, such as estimates. `rows` and `figures` are by file name; a figure's function returns None if
    there is nothing to draw.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, default=asdict)
    (attempt.directory / "results.json").write_text(text)
    attempt.info.update(results=json.loads(text))
    for name, found in (rows or {}).items():
        (attempt.directory / f"{name}.parquet").write_bytes(as_parquet(found))
    write_summary(attempt.directory, title, paragraphs, tables)
    for name, draw in (figures or {}).items():
        if drawn := rendered(name, name, "", draw):
            (attempt.directory / "figures").mkdir(exist_ok=True)
            (attempt.directory / "figures" / f"{name}.png").write_bytes(drawn.png)
            (attempt.directory / "figures" / f"{name}.svg").write_bytes(drawn.svg)


def as_parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return bytes(sink.getvalue().to_pybytes())


def as_markdown(
    title: str, paragraphs: Iterable[str], tables: Sequence[Table], ending: Iterable[str] = ()
) -> str:
    shown = (text for table in tables for text in (f"{table.title}. {table.note}", table.markdown()))
    return "\n\n".join([f"# {title}", *paragraphs, *shown, *ending]) + "\n"


def write_summary(folder: Path, title: str, paragraphs: Iterable[str], tables: Sequence[Table] = ()) -> None:
    """Write summary.md of an analysis, paragraphs and then tables, and each table as parquet."""
    for table in tables:
        (folder / f"{table.name}.parquet").write_bytes(table.parquet())
    (folder / "summary.md").write_text(as_markdown(title, paragraphs, tables))
