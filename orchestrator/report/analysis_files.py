"""The files of an analysis: results.json, its rows as parquet, summary.md with tables, figures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from orchestrator.report.house_style import write_figure
from orchestrator.report.tables import Table, write_summary
from orchestrator.store.artifacts import Attempt

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
    """Write what an analysis has found into its folder, and `results` into its manifest as well.

    `results` may hold dataclasses, such as estimates. `rows` and `figures` are by the name of their file; a figure is what its
    function draws, None where there is nothing to draw.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, default=asdict)
    (attempt.directory / "results.json").write_text(text)
    attempt.info.update(results=json.loads(text))
    for name, found in (rows or {}).items():
        parquet.write_table(pa.Table.from_pylist(list(found)), attempt.directory / f"{name}.parquet")
    write_summary(attempt.directory, title, paragraphs, tables)
    for name, draw in (figures or {}).items():
        write_figure(attempt.directory, name, draw)
