"""The files of an analysis: results.json, its rows as parquet, summary.md with tables, figures."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from orchestrator.report.house_style import panels, points, rendered
from orchestrator.report.tables import Table
from orchestrator.store.artifacts import Attempt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def draw_lines(
    rows: Rows, panel: Sequence[str], at: str, value: str, *, columns: int, width: float, height: float
) -> "tuple[Figure, dict[tuple[str, ...], Axes]]":
    """Draw a panel for each value of the columns `panel`, in it a line of estimates for each reward type.

    Returns the figure, which has no legend yet, and the axes by the value of their panel.
    """

    def place(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in panel)

    places = list(dict.fromkeys(map(place, rows)))
    kinds = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = panels(-(-len(places) // columns), columns, width, height)
    found = dict(zip(places, axes, strict=False))
    for axis in axes[len(places) :]:
        axis.set_visible(False)
    for here, axis in found.items():
        for kind in kinds:
            line = [row for row in rows if (place(row), row["reward"]) == (here, kind)]
            points(axis, [row[at] for row in line], [row[value] for row in line], kind, kinds)
        axis.set_title(" · ".join(here[-2:]))
        axis.set_ylim(-0.05, 1.05)
    axes[0].set_ylabel("accuracy")
    return figure, found
