"""Files of rows: parquet, jsonl, csv, Arrow, and one JSON array. Streamed; a row that cannot be read is told by its file and number.

A row that is wrong comes as a DataError in its place, so that the reader may raise it or leave the row out;
what is wrong with a whole file is raised. Rows are counted from 0, blank lines of jsonl too.
"""

import csv
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from trainers.errors import DataError

ENDINGS = (".parquet", ".jsonl", ".csv", ".arrow", ".json")
Row = dict[str, Any]

_BATCH_ROWS = 1024
_ARROW_FILE_MAGIC = b"ARROW1"
# What is meant as chat messages in a cell, also where it is no JSON but as Python prints them.
_MESSAGES = re.compile(r"""(\[\s*)?\{\s*(['"])(role|content|from|value)\2\s*:.*\}\s*\]?""", re.DOTALL)
_HELPSTEER3 = {"context", "response1", "response2", "overall_preference"}


class Located(NamedTuple):
    """A row with the file (or hub split) and the number it has there; `row` is the fault where it has one."""

    file: str
    number: int
    row: Union[Row, DataError]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}, row {self.number}"


def missing_column(name: str, found: Sequence[str], where: str) -> DataError:
    """The error that names a column, what is needed and what is there."""
    if set(found) >= _HELPSTEER3:
        return DataError(
            f"{where}: {', '.join(found)} are the columns of HelpSteer3, whose preferences are not read: needed are "
            "prompt (its context), chosen and rejected (of its two responses, by the sign of overall_preference)."
        )
    return DataError(
        f"{where}: no column {name!r}; needed are prompt, chosen, rejected; found {', '.join(found)}. "
        "Say which is which with a column map (prompt=…, chosen=…, rejected=…)."
    )


def file_rows(file: Path, needed: Sequence[str] = ()) -> Iterator[Located]:
    """The rows of one file. Raises DataError where it cannot be read at all or lacks a column of `needed`."""
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _arrow_rows,
        ".arrow": _arrow_rows,
    }
    if file.suffix not in readers:
        raise DataError(f"{file}: {file.suffix or 'no ending'} is not read; use {', '.join(ENDINGS)}.")
    yield from readers[file.suffix](file, needed)


def _require_columns(names: Sequence[str], needed: Sequence[str], file: Path) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{file}: column {twice[0]!r} stands twice; keep one.")
    for name in needed:
        if name not in names:
            raise missing_column(name, names, str(file))


def _arrow_rows(file: Path, needed: Sequence[str]) -> Iterator[Located]:
    import pyarrow as pa

    number = 0
    try:
        names, batches = _arrow_batches(file)
        _require_columns(names, needed, file)
        for whole in batches:
            for start in range(0, whole.num_rows, _BATCH_ROWS):
                batch = whole.slice(start, _BATCH_ROWS)
                for row in _batch_rows(batch, file, number):
                    yield Located(str(file), number, row)
                    number += 1
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{file} cannot be read as {file.suffix[1:]}: {(str(error).splitlines() or [repr(error)])[0]}"
        ) from error


def _arrow_batches(file: Path) -> tuple[list[str], Iterator[Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    if file.suffix == ".parquet":
        table = parquet.ParquetFile(file, memory_map=True)
        return table.schema_arrow.names, table.iter_batches(batch_size=_BATCH_ROWS)
    mapped = pa.memory_map(str(file))
    if _begins_as_file(file):
        reader = pa.ipc.open_file(mapped)
        return reader.schema.names, (reader.get_batch(n) for n in range(reader.num_record_batches))
    stream = pa.ipc.open_stream(mapped)
    return stream.schema.names, iter(stream)


def _begins_as_file(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC


def _batch_rows(batch: Any, file: Path, first: int) -> Iterator[Union[Row, DataError]]:
    import pyarrow as pa

    try:
        # Offsets that lead out of a column's buffer would be followed without a word.
        batch.validate(full=True)
        rows = batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if "offset" in str(error).lower():
            raise
        rows = [_single_row(batch.slice(n, 1), f"{file}, row {first + n}") for n in range(batch.num_rows)]
    for row in rows:
        yield row if isinstance(row, DataError) else without_nulls(row)


def without_nulls(row: Row) -> Row:
    """The row without the nulls that Arrow fills nested values with: it gives all of a column the same names."""
    return {name: _filled(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _single_row(batch: Any, where: str) -> Union[Row, DataError]:
    """The only row of a batch, column by column, so that the fault has a name."""
    import pyarrow as pa

    row: Row = {}
    for name in batch.schema.names:
        column = batch.column(name)
        try:
            column.validate(full=True)
            row[name] = column[0].as_py()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            said = str(error).splitlines()[0].removeprefix("Invalid: ").removesuffix(" at string index 0")
            return DataError(f"{where}: column {name!r}: {said}.")
    return row


def _jsonl_rows(file: Path, needed: Sequence[str]) -> Iterator[Located]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                where = f"{file}, row {number}"
                yield Located(str(file), number, _json_row(line.removeprefix(b"\xef\xbb\xbf"), where))


def _json_rows(file: Path, needed: Sequence[str]) -> Iterator[Located]:
    """The rows of one JSON array; without its bracket the file is read as jsonl, which some call so."""
    with file.open("rb") as stream:
        text = stream.read().removeprefix(b"\xef\xbb\xbf")
    if not text.lstrip().startswith(b"["):
        yield from _jsonl_rows(file, needed)
        return
    try:
        rows = json.loads(text.decode(), object_pairs_hook=functools.partial(_object, where=str(file)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    for number, row in enumerate(rows):
        yield Located(str(file), number, _as_row(row, f"{file}, row {number}"))


def _json_row(line: bytes, where: str) -> Union[Row, DataError]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=functools.partial(_object, where=where))
    except UnicodeDecodeError as error:
        return DataError(f"{where}: byte {error.object[error.start]:#x} at {error.start} is no UTF-8.")
    except DataError as error:
        return error
    # A ValueError is broken JSON or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        return DataError(f"{where} cannot be read as JSON: {error}")
    return _as_row(row, where)


def _as_row(row: Any, where: str) -> Union[Row, DataError]:
    if not isinstance(row, dict):
        return DataError(f"{where}: expected an object, found {type(row).__name__}.")
    return row


def _object(pairs: list[tuple[str, Any]], where: str) -> Row:
    """A JSON object, refused where a name stands twice: which one is meant is anybody's guess."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: {twice!r} stands twice.")
    return dict(pairs)


def _csv_rows(file: Path, needed: Sequence[str]) -> Iterator[Located]:
    # The limit of 128 KiB a cell is the module's, for all readers; ours is on the text (rows.py).
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 become lone surrogates, which rows.py refuses with the row.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader, number = csv.reader(stream, strict=True), 0
        try:
            names = next(reader, [])
            _require_columns(names, needed, file)
            for number, cells in enumerate(reader):
                if not cells:
                    continue
                if len(cells) == len(names):
                    where = f"{file}, row {number}"
                    yield Located(str(file), number, _csv_row(dict(zip(names, cells, strict=True)), where))
                    continue
                fault = f"{file}, row {number}: {len(cells)} cells under {len(names)} column names."
                yield Located(str(file), number, DataError(fault))
        except csv.Error as error:
            raise DataError(f"{file} cannot be read as csv, after row {number}: {error}.") from error


def _csv_row(row: Row, where: str) -> Union[Row, DataError]:
    """The row with its cells of chat messages parsed: a csv file has no other way to hold them."""
    for name, cell in row.items():
        if not cell.lstrip().startswith(("[", "{")):
            continue
        try:
            found = json.loads(cell, object_pairs_hook=functools.partial(_object, where=where))
        except (DataError, ValueError, RecursionError) as error:
            if _MESSAGES.fullmatch(cell.strip()):
                return DataError(f"{where}: column {name!r} begins as chat messages, and is no JSON: {error}")
            continue
        turns = found if isinstance(found, list) else [found]
        if turns and all(isinstance(turn, dict) and (turn.keys() & {"role", "from"}) for turn in turns):
            row[name] = found
    return row
