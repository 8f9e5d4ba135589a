"""The flags that say which data set is meant, shared by the commands of `python -m trainers.data`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from trainers.command import dataset_spec
from trainers.data.named import named_set
from trainers.errors import DataError, SpecError
from trainers.specs import FETCHED, PERSONA, DatasetSpec


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the rows of one's own sets are read."""

    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MEANING=COLUMN")] = ()
    """Which column is which: prompt=question chosen=best rejected=worst."""
    group_by: str | None = None
    """With --test-share, rows with one value in this column stay together (default: rows with one prompt)."""
    test_share: float = 0.0
    """Share of the groups that makes the test split of a set that has none."""
    split_seed: int = 0
    """Of that division."""


@dataclass(frozen=True, kw_only=True)
class Reading(Rows):
    """How a set's rows are read."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="PATH")] = None
    """A copy of what a named set is made of: the hub's own files, or the folder of rewritten responses."""
    skip_bad_rows: bool = False
    """Leave out, count and list the rows that cannot be read."""


def chosen_spec(data: str, reading: Reading) -> DatasetSpec:
    """The set that a word and the flags mean. Raises SpecError, DataError."""
    spec = dataset_spec(data)
    if reading.from_ is not None:
        spec = _from(spec, reading.from_.expanduser())
    given = {**row_fields(reading), "skip_bad_rows": reading.skip_bad_rows}
    if (spec.selection or spec.source.startswith(PERSONA)) and any(given.values()):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name, value in given.items() if value)
        raise SpecError(
            f"{flags}: the rows of {spec.name} are the paper's; give its files as a PATH to change that."
        )
    return dataclasses.replace(spec, **given)


def row_fields(rows: Rows) -> dict[str, Any]:
    """The flags as fields of a DatasetSpec. Raises SpecError."""
    return {
        "columns": tuple(_column(text) for text in rows.columns),
        "group_by": rows.group_by,
        "test_share": rows.test_share,
        "split_seed": rows.split_seed,
    }


def _column(text: str) -> tuple[str, str]:
    meaning, sign, column = text.partition("=")
    if not (sign and meaning and column):
        raise SpecError(f"--columns {text}: write MEANING=COLUMN, for example prompt=question.")
    return meaning, column


def _from(spec: DatasetSpec, path: Path) -> DatasetSpec:
    if named_set(spec.name) != spec or not (spec.selection or spec.source.startswith((FETCHED, PERSONA))):
        raise SpecError(f"--from {path}: {spec.name} is not made of other files; give the path itself.")
    if not path.exists():
        raise DataError(f"--from {path}: there is no such file or folder.")
    kind = PERSONA if spec.source.startswith(PERSONA) else ""
    return dataclasses.replace(spec, source=f"{kind}{path}")
