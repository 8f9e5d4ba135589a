"""A page of a report: one self-contained HTML file, and its tables and figures as files beside it."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.report import tables
from orchestrator.report.house_style import Drawn
from orchestrator.report.statistics import Estimate
from orchestrator.report.summary import MEAN
from orchestrator.report.tables import Table, Value
from trainers.disk import replace_bytes

PAPER_LINK = "https://arxiv.org/abs/2507.07981"
# Longer texts are broken into lines in the page's tables.
_LONG = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Something to copy, and what it is."""

    label: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What stands below the tables of statistics."""

    title: str
    anchor: str
    text: str = ""
    lines: tuple[Line, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Conclusions first; `warning` says what the page lacks, `command` makes it again."""

    title: str
    lead: str
    conclusions: tuple[str, ...]
    warning: str
    command: str
    figures: tuple[Drawn, ...]
    tables: tuple[Table, ...]
    sections: tuple[Section, ...] = ()


def write_page(folder: Path, page: Page, html: str) -> None:
    """Write the page as `html`, its tables and its figures into `folder`; figures and tables of before go."""
    everything = (*page.tables, *(table for section in page.sections for table in section.tables))
    files: dict[Path, str | bytes] = {folder / html: rendered(page)}
    for table in everything:
        files[folder / "tables" / f"{table.name}.csv"] = tables.csv_text(table)
        files[folder / "tables" / f"{table.name}.parquet"] = tables.parquet_bytes(table)
    for figure in page.figures:
        files[folder / "figures" / f"{figure.name}.png"] = figure.png
        files[folder / "figures" / f"{figure.name}.svg"] = figure.svg
    for file, content in files.items():
        replace_bytes(file, content.encode() if isinstance(content, str) else content)
    for file in (folder / "figures").glob("*.*"):
        if file not in files:
            file.unlink()


def rendered(page: Page) -> str:
    """The page's HTML."""
    return str(_template().render(page=page, paper=PAPER_LINK))


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
    )
    helpers: dict[str, Callable[..., Any]] = {
        "encoded": lambda svg: base64.b64encode(svg).decode(),
        "text": tables.text,
        "sort_key": tables.sort_key,
        "is_mean": _is_mean,
        "kind": _kind,
        "head": _head,
    }
    environment.globals.update(helpers)
    return environment.get_template("report.html.jinja")


def _is_mean(row: Sequence[Value]) -> bool:
    return any(isinstance(value, str) and value.startswith(f"{MEAN} of ") for value in row)


def _kind(value: Value) -> Any:
    """The cell's class, as an attribute."""
    from markupsafe import Markup

    if isinstance(value, str):
        return Markup(' class="wide"') if len(value) > _LONG else ""
    is_number = isinstance(value, int | float | Estimate) and not isinstance(value, bool)
    return Markup(' class="number"') if is_number or value is None else ""


def _head(table: Table, number: int) -> Any:
    """A column's class: that of its first value."""
    found = (row[number] for row in table.rows if row[number] is not None)
    value = next(found, "")
    return "" if isinstance(value, str) else _kind(value)
