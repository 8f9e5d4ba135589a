"""Preference pairs from wherever they are: parquet, jsonl, a `save_to_disk` folder, the hub, or built in.

Columns are prompt, chosen and rejected, each as text or as chat messages ({role, content}). Where chosen
and rejected are whole conversations, their last turn is the response and the turns before it the prompt.
A row that cannot be read raises DataError with its file and row number.
"""

import fnmatch
import functools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainers.data import hamiltonian, persona, tiny_world
from trainers.data.records import Message, Pair, user_prompt
from trainers.errors import DataError
from trainers.specs import BUILTIN, MANUAL, PERSONA, Augmentation, DatasetSpec

Row = dict[str, Any]
# The copies of a smaller share are among those of a larger one.
_COPIES_SEED = 517
_SURROGATE = re.compile(r"[\ud800-\udfff]")

BUILTIN_SETS: Mapping[str, Callable[[str], list[Pair]]] = {
    "tiny_world": tiny_world.pairs,
    "tiny_world_paraphrase": tiny_world.paraphrased_pairs,
    "tiny_world_reworded": tiny_world.reworded_pairs,
    "tiny_world_other_words": tiny_world.other_words_pairs,
    "hamiltonian": hamiltonian.pairs,
    "hamiltonian_verification": functools.partial(hamiltonian.pairs, spec=hamiltonian.VERIFICATION),
    "hamiltonian_paper": functools.partial(hamiltonian.pairs, spec=hamiltonian.PAPER),
}


def read_pairs(spec: DatasetSpec, split: str) -> list[Pair]:
    """Every pair of `split` of `spec`, in the source's order, copies of the training pairs last. Raises DataError."""
    if spec.augmentation is None or split != spec.train_split:
        return _read_pairs(spec, split)
    return [*_read_pairs(spec, split), *_copies(spec, spec.augmentation)]


def _copies(spec: DatasetSpec, added: Augmentation) -> list[Pair]:
    rewriting = replace(spec, source=added.source, revision=None, keep=(), augmentation=None)
    rows = _read_pairs(rewriting, added.split)
    order = random.Random(_COPIES_SEED).sample(range(len(rows)), len(rows))
    return [rows[row] for row in sorted(order[: round(added.share * len(rows))])]


def _read_pairs(spec: DatasetSpec, split: str) -> list[Pair]:
    if spec.source.startswith(BUILTIN):
        return BUILTIN_SETS[spec.source.removeprefix(BUILTIN)](split)
    if spec.source.startswith(MANUAL):
        raise DataError(
            f"data set {spec.name} is not fetched: take it from {spec.source.removeprefix(MANUAL)} "
            f"and pass {spec.name}=PATH in its place."
        )
    if spec.source.startswith(PERSONA):
        return persona.pairs(_statements(spec), split)
    path = Path(spec.source)
    located = _local_rows(path, split) if path.exists() else _hub_rows(spec, split)
    pairs = [
        _pair(row, f"{where}, row {number}")
        for where, number, row in located
        if all(fnmatch.fnmatchcase(str(row.get(column)), glob) for column, glob in spec.keep)
    ]
    if not pairs:
        raise DataError(f"data set {spec.name}, split {split}: {spec.source} holds no pairs.")
    return pairs


def _statements(spec: DatasetSpec) -> list[str]:
    """Questions of the rows that a `persona:` set is made of. Raises DataError."""
    location = spec.source.removeprefix(PERSONA)
    path = Path(location)
    if path.exists():
        located = _local_rows(path, persona.FILE_STEM)
    else:
        located = _hub_rows(replace(spec, source=location), "train", data_files=persona.HUB_FILE)
    return [
        _text(row.get("question"), f"{where}, row {number}", "question")
        for where, number, row in located
        if persona.matches(row)
    ]


def has_split(spec: DatasetSpec, split: str) -> bool:
    """Whether a local folder has files of `split`."""
    return bool(_split_files(Path(spec.source), split))


def _local_rows(path: Path, split: str) -> Iterator[tuple[str, int, Row]]:
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is neither a file nor a folder.")
    files = [path] if path.is_file() else _split_files(path, split)
    if not files:
        found = sorted({entry.name for entry in path.iterdir()})
        raise DataError(
            f"{path} has no {split} split: expected {split}.parquet, {split}.jsonl or a folder {split}/ "
            f"written by save_to_disk; found {', '.join(found[:8]) or 'nothing'}."
        )
    for file in files:
        for number, row in enumerate(_file_rows(file)):
            yield str(file), number, row


def _split_files(path: Path, split: str) -> list[Path]:
    folder = path / split
    if (folder / "state.json").is_file():
        return [folder / name for name in _listed_files(folder / "state.json")]
    patterns = [f"{split}.parquet", f"{split}-*.parquet", f"{split}.jsonl", f"{split}-*.jsonl"]
    return sorted(file for pattern in patterns for file in path.glob(pattern))


def _listed_files(state: Path) -> list[str]:
    """The names that save_to_disk noted, none of which may lead out of the folder. Raises DataError."""
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{state} does not list the files of a saved data set ({error!r}).") from error
    for name in names:
        if (
            not isinstance(name, str)
            or not name
            or name != Path(name).name
            or not (state.parent / name).is_file()
        ):
            raise DataError(f"{state} names {name!r}, which is no file in its folder.")
    return names


def _file_rows(file: Path) -> Iterator[Row]:
    if file.suffix == ".jsonl":
        yield from _jsonl_rows(file)
        return
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if file.suffix == ".arrow":
            with pa.memory_map(str(file)) as mapped:
                table = pa.ipc.open_stream(mapped).read_all()
        elif file.suffix == ".parquet":
            table = parquet.read_table(file)
        else:
            raise DataError(
                f"{file}: {file.suffix or 'no ending'} is not read; use .parquet, .jsonl or .arrow."
            )
        # Offsets that lead out of a column's buffer would be followed without a word.
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{file} cannot be read as {file.suffix[1:]}: {(str(error).splitlines() or [repr(error)])[0]}"
        ) from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: column {twice[0]!r} stands twice; keep one.")
    for name in ("chosen", "rejected"):
        if name not in table.column_names:
            raise _missing_column(name, table.column_names, str(file))
    start = 0
    for batch in table.to_batches(max_chunksize=1024):
        try:
            yield from batch.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"{file}, rows {start} to {start + batch.num_rows - 1}: {error}.") from error
        start += batch.num_rows


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                row = json.loads(
                    line, object_pairs_hook=functools.partial(_object, where=f"{file}, row {number}")
                )
                if not isinstance(row, dict):
                    raise DataError(f"{file}, row {number}: expected an object, found {type(row).__name__}.")
                yield row
        # A ValueError is broken JSON, broken UTF-8, or a number of thousands of digits.
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} cannot be read as jsonl: {error}") from error


def _object(pairs: list[tuple[str, Any]], where: str) -> Row:
    """A JSON object, refused where a name stands twice: which one is meant is anybody's guess."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: {twice!r} stands twice.")
    return dict(pairs)


def _hub_rows(spec: DatasetSpec, split: str, data_files: str | None = None) -> Iterator[tuple[str, int, Row]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(spec.source, data_files=data_files, split=split, revision=spec.revision)
    except Exception as error:
        raise DataError(
            f"data set {spec.name}: {spec.source} is no local path and the hub did not give its split {split} "
            f"({type(error).__name__}). Check the name, the network and HF_TOKEN, or pass {spec.name}=PATH."
        ) from error
    for number, row in enumerate(rows):
        yield f"{spec.source}:{split}", number, dict(row)


def _pair(row: Row, where: str) -> Pair:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _missing_column(name, list(row), where)
    before_chosen, chosen = _response(row["chosen"], where, "chosen")
    before_rejected, rejected = _response(row["rejected"], where, "rejected")
    original = row.get("orig_chosen")
    if before_chosen != before_rejected:
        raise DataError(f"{where}: the turns before the responses differ between chosen and rejected.")
    if before_chosen:
        prompt = before_chosen
    elif "prompt" in row:
        prompt = _prompt(row["prompt"], where)
    else:
        raise _missing_column("prompt", list(row), where)
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        original_chosen=_text(original, where, "orig_chosen")
        if isinstance(original, str) and original
        else None,
    )


def _missing_column(name: str, found: list[str], where: str) -> DataError:
    return DataError(
        f"{where}: no column {name!r}; needed are prompt, chosen, rejected; found {', '.join(found)}."
    )


def _prompt(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return _messages(value, where, "prompt")
    return user_prompt(_text(value, where, "prompt"))


def _response(value: Any, where: str, column: str) -> tuple[tuple[Message, ...], str]:
    """The turns before a response (none for plain text) and the response."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        *before, last = _messages(value, where, column)
        return tuple(before), last.content
    if isinstance(value, list) and value and all(isinstance(step, str) for step in value):
        return (), _text(" ".join(value), where, column)
    return (), _text(value, where, column)


def _messages(value: list[dict[str, Any]], where: str, column: str) -> tuple[Message, ...]:
    return tuple(
        Message(_text(turn.get("role"), where, column), _text(turn.get("content"), where, column))
        for turn in value
    )


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text or chat messages."
        )
    if not value.strip():
        raise DataError(f"{where}: column {column!r} is empty.")
    if not value.isascii() and _SURROGATE.search(value):
        raise DataError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text.")
    return value
