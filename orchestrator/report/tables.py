"""Tables of a report as CSV, parquet, markdown, HTML and in a terminal.

Also the names of reward types, means and trials in all tables, figures and sentences.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

from orchestrator.report.statistics import Estimate

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as TerminalTable

Value = Union[str, int, float, bool, Estimate, None]
NOTHING = "–"
MEAN = "mean"
# Titles of columns that differ from the column's name.
_TITLES = {
    "train_set": "trained on",
    "evaluation_set": "evaluated on",
    "abs_margin": "absolute margin",
    "accuracy_length_controlled": "length-controlled",
    "accuracy_leak_free": "leak-free",
}
# A page breaks texts that are longer.
_LINE = 24


def reward_title(reward: str) -> str:
    """Write `ex_rm` as EX-RM and `im_rm_no_reference` as IM-RM no reference; other names stay as they are."""
    found = re.match(r"[a-z]{2}_g?rm(?=_|$)", reward)
    return found[0].upper().replace("_", "-") + reward[found.end() :].replace("_", " ") if found else reward


def what_differs(names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Split each trial's name into the parts that differ between trials and the parts that all trials share.

    Names with different numbers of parts count as different as a whole.
    """
    parts = {key: name.split(" · ") for key, name in names.items()}
    if len(parts) < 2 or len(set(map(len, parts.values()))) > 1:
        return {key: (name, "") for key, name in names.items()}
    differs = [len(set(column)) > 1 for column in zip(*parts.values(), strict=True)]
    same = [not one for one in differs]
    return {
        key: (" · ".join(itertools.compress(part, differs)), " · ".join(itertools.compress(part, same)))
        for key, part in parts.items()
    }


def mean_label(models: Mapping[str, int]) -> str:
    """Label a mean over models: `mean of 3`, or the number of models of each reward type if these differ."""
    counts = set(models.values())
    if len(counts) == 1:
        return f"{MEAN} of {counts.pop()}"
    return f"{MEAN} of {', '.join(f'{count} {reward_title(kind)}' for kind, count in models.items())}"


def number_of(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else f'{noun}s'}"


def span(numbers: Sequence[int], noun: str) -> str:
    """Write `200 pairs`, or `60 to 200 pairs` if the numbers differ."""
    least, most = min(numbers), max(numbers)
    return number_of(most, noun) if least == most else f"{least} to {number_of(most, noun)}"


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def interval(value: Estimate) -> str:
    """Write a difference with its interval, for a sentence: `+0.225 [+0.130, +0.323]`."""
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of values by column name; missing values are shown as –. `note` explains how the rows were computed.

    `columns` are the names, separated by spaces; `titles` and `forms` give the title of a column and the format of its
    numbers if these are not the defaults. People read estimates without their `intervals` where these are off.
    """

    name: str
    title: str
    note: str = ""
    columns: str
    rows: Sequence[Mapping[str, Value]]
    titles: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    intervals: bool = True

    @property
    def names(self) -> list[str]:
        return self.columns.split()

    def title_of(self, name: str) -> str:
        return self.titles.get(name, _TITLES.get(name, reward_title(name).replace("_", " ")))

    def text(self, row: Mapping[str, Value], name: str, space: str = " ") -> str:
        """Write a value for people: an estimate has ± its standard deviation over seeds, and its interval.

        `space` stands between the parts of these two, so that they need not be broken there.
        """
        value, form = row.get(name), self.forms.get(name, ".3f")
        if value is None:
            return NOTHING
        if isinstance(value, Estimate):
            around = space or " "
            spread = "" if value.std is None else f"{around}±{around}{value.std:.3f}"
            interval = f" [{value.low:{form}},{space}{value.high:{form}}]" if self.intervals else ""
            return f"{value.value:{form}}{spread}{interval}"
        if isinstance(value, float):
            return f"{value:{form}}"
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    def texts(self, space: str = " ") -> list[tuple[str, ...]]:
        return [tuple(self.text(row, name, space) for name in self.names) for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """Return flat rows for programs: an estimate becomes name, name_std, name_low and name_high."""
        estimated = {
            name for name in self.names if any(isinstance(row.get(name), Estimate) for row in self.rows)
        }
        parts = {"": "value", "_std": "std", "_low": "low", "_high": "high"}
        records: list[dict[str, Any]] = []
        for row in self.rows:
            record: dict[str, Any] = {}
            for name in self.names:
                value = row.get(name)
                if name in estimated:
                    record |= {
                        f"{name}{end}": getattr(value, part) if isinstance(value, Estimate) else None
                        for end, part in parts.items()
                    }
                else:
                    record[name] = value
            records.append(record)
        return records

    @classmethod
    def of_json(cls, loaded: dict[str, Any]) -> "Table":
        rows = [
            {name: Estimate(**value) if isinstance(value, dict) else value for name, value in row.items()}
            for row in loaded["rows"]
        ]
        return cls(**{**loaded, "rows": rows})

    def frame(self) -> "pd.DataFrame":
        import pandas as pd

        return pd.DataFrame(self.records(), columns=None if self.rows else self.names, dtype=object)

    def csv(self) -> str:
        return str(self.frame().to_csv(index=False, lineterminator="\n"))

    def parquet(self) -> bytes:
        return bytes(self.frame().to_parquet(index=False))

    def markdown(self) -> str:
        """Write the rows as a markdown table, with | escaped."""
        lines = [tuple(map(self.title_of, self.names)), ("",) * len(self.names), *self.texts()]
        cells = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
        drawn = ["| " + " | ".join(line) + " |" for line in cells]
        drawn[1] = "|" + "---|" * len(self.names)
        return "\n".join(drawn)

    def terminal(self) -> "TerminalTable":
        """Return the rows for a terminal: the first two columns become headings above the rows that share them."""
        from rich.table import Table as TerminalTable

        shown, lines = TerminalTable(title=self.title, title_justify="left"), self.texts(space="")
        titles = [*map(self.title_of, self.names)]
        heads = [" " * depth + title for depth, title in enumerate(titles[:3])]
        # A heading is never broken, however narrow the terminal is.
        least = max((depth + len(text) for line in lines for depth, text in enumerate(line[:3])), default=0)
        shown.add_column("\n".join(heads), no_wrap=True, min_width=least, overflow="fold")
        for title in titles[3:]:
            shown.add_column(title, justify="right", overflow="fold")
        above: tuple[str, ...] = ("", "")
        for line in lines:
            if above != line[:2]:
                shown.add_section()
                if above[0] != line[0]:
                    shown.add_row(line[0])
                shown.add_row(f" {line[1]}")
            shown.add_row(f"  {line[2]}", *line[3:])
            above = line[:2]
        return shown

    def cells(self) -> Iterator[tuple[bool, list[tuple[str, str, str]]]]:
        """Yield for each row whether it is a mean over models, and the CSS class, sort key and text of its values."""
        classes = {name: self.css(name) for name in self.names}
        for row, line in zip(self.rows, self.texts(space="\u00a0"), strict=True):
            mean = any(isinstance(value, str) and value.startswith(f"{MEAN} of ") for value in row.values())
            cells = []
            for (name, css), text in zip(classes.items(), line, strict=True):
                value = row.get(name)
                plain = value.value if isinstance(value, Estimate) else value
                cells.append((css, "" if plain is None else str(plain), text))
            yield mean, cells

    def css(self, name: str) -> str:
        """Return the CSS class of a column: number, text (longer than a line), or none."""
        values = [value for row in self.rows if (value := row.get(name)) is not None]
        if values and not any(isinstance(value, str | bool) for value in values):
            return "number"
        return "text" if any(len(str(value)) > _LINE for value in values) else ""
