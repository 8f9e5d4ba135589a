"""Tables for terminals of any width."""

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

UNBOUNDED = 10_000


def fitting(table: Table, console: Console) -> RenderableType:
    """The table, or where it would break words, its rows one below the other, each value after its column's name."""
    if console.measure(table, options=console.options.update(width=UNBOUNDED)).minimum <= console.width:
        return table
    first, *others = ([_plain(cell) for cell in column.cells] for column in table.columns)
    names = [_plain(column.header) for column in table.columns[1:]]
    parts: list[RenderableType] = [Text(_plain(table.title), style="italic")] if table.title else []
    for head, *values in zip(first, *others, strict=True):
        parts.append(Text(head))
        said = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value)
        parts.append(Padding(Text(said), (0, 0, 0, 2)))
    return Group(*parts)


def _plain(cell: object) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
