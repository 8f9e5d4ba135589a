"""Files → rows: parquet, Arrow, jsonl, csv or one JSON array, streamed; and which files of a folder hold a split.

Rows are counted from 0, blank lines of jsonl too. A bad row is a Fault in the row's place, so that a reader
may raise it or leave the row out; a file that cannot be read at all is a DataError that is raised.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from trainers.errors import DataError

Row = dict[str, Any]

_BATCH_ROWS = 1024
_BOM = b"\xef\xbb\xbf"
# A cell that is meant as chat messages, even where it is not JSON but what Python prints.
_MESSAGES = re.compile(r"""(\[\s*)?\{\s*(['"])(role|content|from|value)\2\s*:.*\}\s*\]?""", re.DOTALL)
# JSON with these names is a turn; JSON such as {"from": "Rome", "to": "Milan"} is an answer.
_TURNS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


class Fault(Exception):
    """What is wrong with a row, before its file and number are added."""


class Located(NamedTuple):
    """A row with its file (or hub split) and its number there; `row` is the fault where the row is bad."""

    file: str
    number: int
    row: Union[Row, Fault]

    @property
    def where(self) -> str:
        """The file and the number, for messages."""
        return f"{self.file}, row {self.number}"

    def sound(self) -> Row:
        """Return the row. Raises DataError where it is bad."""
        if isinstance(self.row, Fault):
            raise DataError(f"{self.where}: {self.row}") from self.row
        return self.row


# None is a blank line, which counts as a row and is none.
_Rows = Iterator[Union[Row, Fault, None]]


def file_ending(file: Path) -> str:
    """Return the ending of a file that can be read, in small letters; empty for any other file."""
    return next((ending for ending in ENDINGS if file.name.lower().endswith(ending)), "")


def file_stem(path: Path) -> str:
    """Return what a file is called without its ending, and a folder as it is."""
    path = path.absolute()
    ending = file_ending(path) or path.suffix if path.is_file() else ""
    return path.name[: len(path.name) - len(ending)]


def file_rows(file: Path) -> Iterator[Located]:
    """Yield the rows of one file. Raises DataError where it cannot be read, or has two columns of one name."""
    import pyarrow as pa

    ending = file_ending(file)
    if not ending:
        raise DataError(f"{file}: {file.suffix or 'no ending'} is not read; use {', '.join(ENDINGS)}.")
    kind = ending.split(".")[1]

    number = -1
    try:
        for number, row in enumerate(_READERS[kind](file)):
            if row is not None:
                yield Located(str(file), number, row)
    except (pa.ArrowException, csv.Error, OSError, ValueError, RecursionError, MemoryError) as error:
        said = (str(error).splitlines() or [repr(error)])[0]
        after = f", after row {number}" if number >= 0 else ""
        raise DataError(f"{file} cannot be read as {kind}{after}: {said}") from error


def split_files(path: Path, split: str) -> list[Path]:
    """Return the files of a split: one, or shards of one kind. Raises DataError where some are missing, or where it is unclear which are meant."""

    def own(folder: Path, otherwise: str) -> tuple[Path, str]:
        """A folder that datasets wrote may hold its caches beside its data."""
        return folder, "data" if (folder / "state.json").is_file() else otherwise

    places = [own(path / split, ""), (path, split), (path / "data", split)]
    # What datasets or Spark wrote of a set without splits.
    places += [own(path, "part")] if split == "train" else []
    found: dict[Any, list[Path]] = {}
    for place, name in places:
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            ending = file_ending(file)
            stem = file.name[: -len(ending)] if ending else ""
            if stem and (not name or stem == name or stem.startswith(f"{name}-")):
                # Two whole files differ by the case of their endings.
                found.setdefault((place, ending, stem == name and file), []).append(file)
    if len(found) > 1:
        first = ", ".join(str(files[0].relative_to(path)) for files in found.values())
        raise DataError(f"{path} holds the {split} split more than once ({first}): which is meant? Keep one.")
    (files,) = found.values() or ([],)
    counted = re.search(r"-\d{5}-of-(\d{5})", files[0].name) if files else None
    if counted and len(files) != int(counted[1]):
        raise DataError(
            f"{path} has {len(files)} files of its {split} split, and {files[0].name} says that there are {int(counted[1])}: "
            "fetch those that are missing, or remove those of another version."
        )
    return files


def _require_distinct(file: Path, columns: Sequence[str]) -> None:
    if twice := sorted({name for name in columns if list(columns).count(name) > 1}):
        raise DataError(f"{file}: column {twice[0]!r} stands twice; keep one.")


# Parquet and Arrow.


def _arrow_rows(file: Path) -> _Rows:
    import pyarrow as pa
    from pyarrow import parquet

    mapped = pa.memory_map(str(file))
    magic = mapped.read(6)
    mapped.seek(0)
    batches: Any
    if file_ending(file) == ".parquet":
        table = parquet.ParquetFile(mapped)
        schema, batches = table.schema_arrow, table.iter_batches(batch_size=_BATCH_ROWS)
    elif magic == b"ARROW1":
        reader = pa.ipc.open_file(mapped)
        schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pa.ipc.open_stream(mapped)
        schema = batches.schema
    _require_distinct(file, schema.names)
    for whole in batches:
        for start in range(0, whole.num_rows, _BATCH_ROWS):
            yield from _batch_rows(whole.slice(start, _BATCH_ROWS))


def _batch_rows(batch: Any) -> Iterator[Union[Row, Fault]]:
    import pyarrow as pa

    try:
        # Without this check, offsets that lead out of a column's buffer would be followed.
        batch.validate(full=True)
        yield from map(without_nulls, batch.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if "offset" in str(error).lower():
            raise
        if batch.num_rows == 1:
            said, names = str(error).splitlines()[0], batch.schema.names
            yield Fault(
                re.sub(r"^In column (\d+): Invalid: ", lambda at: f"column {names[int(at[1])]!r}: ", said)
            )
        else:
            for number in range(batch.num_rows):
                yield from _batch_rows(batch.slice(number, 1))


def without_nulls(row: Row) -> Row:
    """Return the row without nulls in nested values: Arrow adds them to give all values of a column the same names."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items() if item is not None}
        return [filled(item) for item in value] if isinstance(value, list) else value

    return {name: filled(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}


# Texts, packed or not.


def _opened(file: Path) -> io.BufferedReader:
    import pyarrow as pa

    packing = {"gz": "gzip", "zst": "zstd"}.get(file_ending(file).rpartition(".")[2])
    return io.BufferedReader(pa.input_stream(str(file), compression=packing), 2**20)


def _jsonl_rows(file: Path) -> _Rows:
    with _opened(file) as lines:
        for line in lines:
            yield _json_row(line.removeprefix(_BOM)) if line.strip() else None


def _json_rows(file: Path) -> _Rows:
    """Yield the rows of one JSON array; a file that does not begin with a bracket is read as jsonl."""
    with _opened(file) as stream:
        text = stream.read().removeprefix(_BOM)
    if not text.lstrip().startswith(b"["):
        yield from _jsonl_rows(file)
        return
    for row in _DECODER.decode(text.decode()):
        yield _object_or_fault(row)


def _json_row(line: bytes) -> Union[Row, Fault]:
    try:
        row = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return Fault(f"byte {error.object[error.start]:#x} at {error.start} is no UTF-8.")
    # A ValueError is broken JSON, a name that stands twice, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        return Fault(f"cannot be read as JSON: {error}")
    return _object_or_fault(row)


def _object_or_fault(row: Any) -> Union[Row, Fault]:
    return row if isinstance(row, dict) else Fault(f"expected an object, found {type(row).__name__}.")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object. Raises ValueError where a name stands twice, because either value may be meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _csv_rows(file: Path) -> _Rows:
    # csv's own limit of 128 KiB a cell is lifted; formats.py has ours.
    csv.field_size_limit(2**31 - 1)
    divide = "\t" if file_ending(file).startswith(".tsv") else ","
    # Bytes that are no UTF-8 become lone surrogates, which formats.py refuses with the row.
    with io.TextIOWrapper(_opened(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True, delimiter=divide)
        names = next(reader, [])
        _require_distinct(file, names)
        for cells in reader:
            if cells and len(cells) != len(names):
                yield Fault(f"{len(cells)} cells under {len(names)} column names.")
            else:
                yield _csv_row(dict(zip(names, cells, strict=True))) if cells else None


def _csv_row(row: Row) -> Union[Row, Fault]:
    """Return the row with chat messages parsed: in a csv file they are JSON text."""
    for name, cell in row.items():
        if not cell.lstrip().startswith(("[", "{")):
            continue
        try:
            found = _DECODER.decode(cell)
        except (ValueError, RecursionError) as error:
            if _MESSAGES.fullmatch(cell.strip()):
                return Fault(f"column {name!r} begins as chat messages, and is no JSON: {error}")
            continue
        turns = found if isinstance(found, list) else [found]
        if turns and all(isinstance(turn, dict) and any(turn.keys() >= t for t in _TURNS) for turn in turns):
            row[name] = found
    return row


_READERS: dict[str, Callable[[Path], _Rows]] = {
    "parquet": _arrow_rows,
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "arrow": _arrow_rows,
    "json": _json_rows,
    "ndjson": _jsonl_rows,
    "tsv": _csv_rows,
}
_PACKED = tuple(
    f".{kind}.{packing}" for kind in _READERS for packing in ("gz", "zst") if _READERS[kind] != _arrow_rows
)
ENDINGS = (*(f".{kind}" for kind in _READERS), *_PACKED)
