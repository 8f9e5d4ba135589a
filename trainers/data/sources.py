"""Preference pairs from wherever they are: files, a `save_to_disk` folder, the hub, a fixed address, or built in.

formats.py says how files and rows are read, known.py which sets have a name and what the paper drew of them.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from trainers.data.files import Fault, Located, file_rows, file_stem, split_files, without_nulls
from trainers.data.formats import Format, format_of, pairs_of
from trainers.data.known import (
    BUILTIN_SETS,
    DATASETS,
    PERSONA,
    PERSONA_FILE,
    REWRITES,
    Funnel,
    named_set,
    rewrites_base,
    selected_rows,
    selected_splits,
)
from trainers.data.records import PLACE, Candidates, Pair, listed_turns
from trainers.errors import DataError, SpecError, nearest
from trainers.evaluate.suites import SUITES, Suite
from trainers.specs import BUILTIN, COLUMNS, FETCHED, Augmentation, DatasetSpec, Ratings, clean_name
from trainers.storage import alone, digest_file, disk_named, replace

CACHE_VARIABLE = "RMSWEEP_CACHE"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# A smaller share of copies is part of a larger one.
_COPIES_SEED = 517
# Names of a held-out split that is not called test.
_VALIDATION = ("validation", "valid", "val", "dev")


# The set that words on a command line name.

NamedSet = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME|PATH")]]


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """How the rows of your own sets are read."""

    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MEANING=COLUMN")] = ()
    """Names of your columns: prompt=question chosen=best rejected=worst."""
    group_by: str | None = None
    """With --test-share, keep rows with the same value in this column together (default: rows with the same prompt)."""
    ratings: Ratings = "all"
    """Of several rated answers, pair each with all that are rated lower, or the best alone."""
    ties: bool = False
    """Also keep answers that are rated alike in the training split."""
    test_share: float = 0.0
    """Share of the groups that become the test split of a set that has none."""
    split_seed: int = 0
    """Seed of the division into train and test."""


@dataclass(frozen=True, kw_only=True)
class Reading(RowFlags):
    """How a set's rows are read."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="PATH")] = None
    """A copy of what a named set is made of: the hub's own files, or the folder of rewritten responses."""
    skip_bad_rows: bool = False
    """Leave out the rows that cannot be read; count and list them."""


def dataset_spec(data: str) -> DatasetSpec:
    """Return the set that a word names: a file, a folder, a known name or a hub id. Raises DataError."""
    whole, split = split_off(data)
    if split:
        return dataclasses.replace(dataset_spec(whole), train_split=split, test_split=split)
    path = Path(data).expanduser()
    if not path.exists():
        if spec := named_set(data):
            return spec
        name, equals, copy = data.partition("=")
        if equals and name in SUITES:
            return suite_spec(name, copy)
        if not HUB_ID.fullmatch(data):
            raise DataError(
                f"{data}: there is no such file or folder, it is no known data set "
                f"({', '.join(spec.name for spec in DATASETS)}) and no hub id."
            )
    try:
        name = clean_name(file_stem(path))
    except SpecError:
        name = "data"
    return DatasetSpec(name=name, source=str(path) if path.exists() else data)


def split_off(word: str) -> tuple[str, str]:
    """Divide PATH:SPLIT, unless a file of that spelling is there; the split is empty where none is named."""
    source, colon, split = word.rpartition(":")
    named = colon and source and re.fullmatch(r"[\w.-]+", split) and not Path(word).expanduser().exists()
    return (source, split) if named else (word, "")


def suite_spec(name: str, copy: str = "") -> DatasetSpec:
    """Return a suite, read from its place on the hub or from a copy. Raises SpecError, DataError."""
    if name not in SUITES:
        raise SpecError(f"--suites {name} is no suite; {nearest(name, SUITES)}")
    spec, path = named_set(name), Path(copy).expanduser()
    assert spec is not None
    if copy and not path.exists():
        raise DataError(f"{name}={copy}: there is no such file or folder.")
    return dataclasses.replace(spec, source=str(path)) if copy else spec


def chosen_spec(data: str, reading: Reading) -> DatasetSpec:
    """Return the set that a word and the flags name. Raises SpecError, DataError."""
    spec = dataset_spec(data)
    if reading.from_ is not None:
        path = reading.from_.expanduser()
        if named_set(spec.name) != spec or not (spec.selection or spec.source.startswith(FETCHED)):
            raise SpecError(f"--from {path}: {spec.name} is not made of other files; give the path itself.")
        if not path.exists():
            raise DataError(f"--from {path}: there is no such file or folder.")
        # Nobody says which revision a copy is of.
        spec = dataclasses.replace(spec, source=str(path), revision=None)
    given = row_fields(reading)
    fixed = [*given]
    if reading.skip_bad_rows and spec.selection and spec.selection not in SUITES:
        fixed.append("skip_bad_rows")
    if fixed and (spec.selection or spec.source.startswith(BUILTIN)):
        raise SpecError(
            f"{flags(fixed)}: which rows {spec.name} has is set; give its files as a PATH to change that."
        )
    if reading.test_share and has_own_test(spec):
        raise SpecError(
            f"--test-share {reading.test_share:g}: {data} has a {spec.test_split} split of its own; leave it out."
        )
    return dataclasses.replace(spec, **given, skip_bad_rows=reading.skip_bad_rows)


def row_fields(rows: RowFlags) -> dict[str, Any]:
    """Return the flags that were given, as fields of a DatasetSpec. Raises SpecError."""
    require_share(rows)
    usual = {field.name: field.default for field in dataclasses.fields(RowFlags)}
    given = {name: getattr(rows, name) for name in usual if getattr(rows, name) != usual[name]}
    return given | ({"columns": tuple(map(parse_column, rows.columns))} if rows.columns else {})


def require_share(reading: Any) -> None:
    """Raise SpecError where flags say how a set is divided, and none that it is."""
    if (reading.group_by or reading.split_seed) and not reading.test_share:
        raise SpecError("--group-by and --split-seed say how --test-share divides a set; give that, too.")


def flags(names: Iterable[str]) -> str:
    """Return the flags of these fields, for a message."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def parse_column(text: str) -> tuple[str, str]:
    """Return the (meaning, column) that a word of --columns names. Raises SpecError."""
    meaning, sign, column = text.partition("=")
    if not (sign and column) or meaning not in COLUMNS:
        raise SpecError(
            f"--columns {text}: write MEANING=COLUMN, for example prompt=question; MEANING is one of {', '.join(COLUMNS)}."
        )
    return meaning, column


def own_split(spec: DatasetSpec, split: str) -> str:
    """Return what a set calls its train or test split."""
    return {"train": spec.train_split, "test": spec.test_split}.get(split, split)


# The pairs of a split.


def read_pairs(spec: DatasetSpec, split: str, left_out: list[str] | None = None) -> list[Pair]:
    """Return every pair of `split`, in the source's order. Raises DataError."""
    return list(iter_pairs(spec, split, left_out))


def iter_pairs(
    spec: DatasetSpec, split: str, left_out: list[str] | None = None, funnel: Funnel | None = None
) -> Iterator[Pair]:
    """Yield the pairs of `split` one by one, copies of the training pairs last.

    `left_out` gets a line for each bad row that `skip_bad_rows` leaves out; at the end `funnel` holds how
    many rows were left after each step (nothing for the paper's draws). Raises DataError at the first bad
    row, or at the end where nothing was left.
    """
    yield from _own_pairs(spec, split, left_out, [] if funnel is None else funnel)
    if spec.augmentation is not None and split == spec.train_split:
        yield from _copies(spec, spec.augmentation)


def said_left_out(left_out: Sequence[str]) -> str:
    """Return lines that count and list the bad rows that were left out; empty where there are none."""
    more = [f"and {len(left_out) - 20} more"] if len(left_out) > 20 else []
    lines = [f"{len(left_out)} bad rows left out:", *left_out[:20], *more]
    return "\n  ".join(lines) + "\n" if left_out else ""


def mixed(shares: Sequence[float], rows: Sequence[Sequence[Pair]]) -> Iterator[Pair]:
    """Yield the largest mixture of the sets in these shares, by a seeded draw from each, in the order of its rows.

    Raises DataError where a set would have no pair in it.
    """
    size = min(len(own) / share for share, own in zip(shares, rows, strict=True))
    for share, own in zip(shares, rows, strict=True):
        if not (count := round(share * size)):
            raise DataError(
                f"a mixture of {size:.0f} pairs has none of a set with a share of {share:g}; raise it."
            )
        yield from _drawn(own, count)


def _copies(spec: DatasetSpec, added: Augmentation) -> list[Pair]:
    rewriting = dataclasses.replace(
        spec, source=added.source, revision=None, keep=(), selection=None, columns=(), augmentation=None
    )
    rows = list(_own_pairs(rewriting, added.split, None, []))
    return _drawn(rows, round(added.share * len(rows)))


def _drawn(rows: Sequence[Pair], count: int) -> list[Pair]:
    """Return the first `count` rows of a seeded permutation, in the order of the rows."""
    order = random.Random(_COPIES_SEED).sample(range(len(rows)), len(rows))
    return [rows[row] for row in sorted(order[:count])]


def _own_pairs(spec: DatasetSpec, split: str, left_out: list[str] | None, funnel: Funnel) -> Iterator[Pair]:
    if split != spec.train_split:
        # A tie says nothing about a ranking.
        spec = dataclasses.replace(spec, ties=False)
    if spec.source.startswith(BUILTIN):
        yield from BUILTIN_SETS[spec.source.removeprefix(BUILTIN)](split)
        return
    faults: list[str] = [] if left_out is None else left_out
    if spec.selection and split not in (splits := selected_splits(spec.selection)):
        only = "a suite is only evaluated: " if spec.selection in SUITES else ""
        raise DataError(f"data set {spec.name} has no split {split}; {only}it has {', '.join(splits)}.")
    suite, subsets = SUITES.get(spec.selection or ""), set[str]()
    rows, ranked, unranked, read, found = 0, 0, 0, 0, 0
    # The first good row decides how all are read.
    read_as: Format | None = None
    for located in _selected_rows(spec, split):
        rows += 1
        try:
            row = located.sound()
            if not all(fnmatch.fnmatchcase(str(row.get(column)), glob) for column, glob in spec.keep):
                continue
            if suite:
                pairs = _suite_pairs(located, spec, suite, number=ranked)
                subsets |= {pair.candidates.subset for pair in pairs if pair.candidates}
            else:
                form = read_as or format_of(row, spec)
                pairs = pairs_of(located, spec, form)
                read_as = form
            taken = [pair for pair in pairs if _is_in(spec, split, located, pair)]
        except DataError as error:
            if not spec.skip_bad_rows:
                raise
            faults.append(str(error))
            continue
        ranked += bool(pairs)
        unranked += not pairs
        read += len(pairs)
        found += len(taken)
        yield from taken
    if missing := sorted(suite.subsets - subsets) if suite else []:
        raise DataError(
            f"{spec.source} has no rows of {', '.join(missing)}, without which there is no score of {spec.name}: "
            "complete the copy, or give it by its path alone, and what it has is evaluated as pairs."
        )
    sound = rows - len(faults)
    if spec.selection is None or suite:
        named = suite.title if suite else read_as.name if read_as else ""
        unit = "prompts" if suite else "rows"
        funnel.append((f"{unit}, read as {named}" if named else unit, rows))
        steps = (("readable", sound), ("with a preference", sound - unranked), ("pairs", read))
        for step in (*steps, (f"in the {split} split", found)):
            if step[1] != funnel[-1][1]:
                funnel.append(step)
    if not found:
        ties = f", {unranked} without a preference" if unranked else ""
        share = f", none in this split with a test share of {spec.test_share:g}" if read else ""
        why = f" {rows} rows were read, {len(faults)} of them bad{ties}{share}." if rows else ""
        first = f" The first: {faults[0]}" if faults else ""
        raise DataError(f"data set {spec.name}, split {split}: {spec.source} holds no pairs.{why}{first}")


def _suite_pairs(located: Located, spec: DatasetSpec, suite: Suite, *, number: int) -> list[Pair]:
    """Return the pairs by which the answers to a suite's prompt are scored, with their places. Raises DataError."""
    try:
        item = suite.item(located.sound())
    except Fault as fault:
        raise DataError(f"{located.where}: {fault}") from fault
    counts, pairs = (len(item.right), len(item.wrong)), list[Pair]()
    for right, wrong in item.scored():
        place = Candidates(
            str(spec.selection), item.name, number, item.subset, item.group, *counts, right, wrong
        )
        row = {"prompt": item.prompt, "chosen": item.right[right], "rejected": item.wrong[wrong]}
        row[PLACE] = place._asdict()
        pairs += pairs_of(located._replace(row=row), spec, format_of(row, spec))
    return pairs


def _suite_rows(spec: DatasetSpec, suite: Suite) -> Iterator[Located]:
    """Yield a suite's rows; where a row holds one answer, those to one prompt are one row, listed under `answers`."""
    place, splits = Path(spec.source), suite.splits
    if place.exists():
        # A copy may be of one split, or one file.
        splits = tuple(split for split in splits if has_split(spec, split)) or splits[:1]
    rows = itertools.chain.from_iterable(_rows(spec, split) for split in splits)
    if not suite.prompt_id:
        yield from rows
        return
    prompt: Any = None

    def prompt_of(located: Located) -> Any:
        # A bad row is taken to be of the prompt before it, which would be scored too well without it.
        nonlocal prompt
        prompt = located.row.get(suite.prompt_id) if isinstance(located.row, dict) else prompt
        return prompt

    for _, same in itertools.groupby(rows, prompt_of):
        answers = list(same)
        bad = next((one for one in answers if isinstance(one.row, Fault)), None)
        yield bad or answers[0]._replace(row={**answers[0].sound(), "answers": [one.row for one in answers]})


def _is_in(spec: DatasetSpec, split: str, located: Located, pair: Pair) -> bool:
    """Return whether a row's group is in the split: its hash decides, so that it stays there whatever rows are added.

    A set that is evaluated on its training rows has one name for both splits: that is its train split.
    """
    if not spec.test_share:
        return True
    group: Any = listed_turns(pair.prompt)
    if spec.group_by is not None and (group := located.sound().get(spec.group_by)) is None:
        raise DataError(f"{located.where}: no value in the group column {spec.group_by!r}.")
    said = json.dumps(group, sort_keys=True, default=str) if spec.group_by else json.dumps(group)
    digest = hashlib.sha256(f"{spec.split_seed}\n{said}".encode()).digest()
    for_test = int.from_bytes(digest[:8], "big") < spec.test_share * 2**64
    return split in (spec.train_split, spec.test_split) and for_test == (split != spec.train_split)


def _selected_rows(spec: DatasetSpec, split: str) -> Iterator[Located]:
    if spec.selection is None:
        yield from _rows(spec, spec.train_split if spec.test_share else split)
        return
    if spec.selection in SUITES:
        yield from _suite_rows(spec, SUITES[spec.selection])
        return
    try:
        yield from selected_rows(spec.selection, functools.partial(_rows, spec), split)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"data set {spec.name}: a row of {spec.source} is not as expected ({error!r})."
        ) from error


# The rows of a source.


def _rows(spec: DatasetSpec, split: str) -> Iterator[Located]:
    path = Path(spec.source)
    if spec.source.startswith(FETCHED):
        yield from file_rows(_fetched(spec.source.removeprefix(FETCHED), split))
    elif path.exists():
        yield from _local_rows(spec, path, split)
    else:
        yield from _hub_rows(spec, split)


def _local_rows(spec: DatasetSpec, path: Path, split: str) -> Iterator[Located]:
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is neither a file nor a folder.")
    files = [path] if path.is_file() else _files_of(spec, path, split)
    if not files:
        found = ", ".join(sorted({entry.name for entry in path.iterdir()})[:8])
        other = next((f" Its {n} split" for n in _VALIDATION if split == "test" and split_files(path, n)), "")
        raise DataError(
            f"{path} has no {split} split: expected {split}.parquet, {split}.jsonl, {split}.csv or a folder {split}/; "
            f"found {found or 'nothing'}."
            + (other and f"{other} is not taken for a test split: rename its file, or give that file itself.")
        )
    for file in files:
        yield from file_rows(file)


def _files_of(spec: DatasetSpec, path: Path, split: str) -> list[Path]:
    """Return a folder's files of `split`; where it has no split of its own, those of its config folder. Raises DataError."""
    if files := split_files(path, split):
        return files
    own = (spec.train_split, spec.test_split)
    folders = [
        item for item in sorted(path.iterdir()) if item.is_dir() and item.name not in (*own, split, "data")
    ]
    if not folders or any(split_files(path, name) for name in own):
        return []
    configs = {folder: found for folder in folders if (found := split_files(folder, split))}
    # A suite's languages are folders.
    if len(configs) > 1 and spec.selection not in SUITES:
        raise DataError(
            f"{path} has no {split} split of its own, its folders have: {', '.join(folder.name for folder in [*configs][:8])}. "
            f"Give one of them, for example {next(iter(configs))}."
        )
    return [file for found in configs.values() for file in found]


def has_split(spec: DatasetSpec, split: str) -> bool:
    """Return whether a source is a local folder that has files of `split`. Raises DataError."""
    path = Path(spec.source)
    return path.is_dir() and bool(_files_of(spec, path, split))


def has_own_test(spec: DatasetSpec) -> bool:
    """Return whether there is nothing to divide: one split is named, or a folder has both. Raises DataError."""
    return spec.train_split == spec.test_split or has_split(spec, spec.test_split)


def splits_of(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the splits that a set has, as far as that can be told without reading it."""
    path = Path(spec.source)
    own = tuple(dict.fromkeys((spec.train_split, spec.test_split)))
    if spec.selection:
        return tuple(split for split in own if split in selected_splits(spec.selection))
    if spec.test_share or not path.exists():
        return own
    if path.is_file():
        return (spec.train_split,)
    return tuple(split for split in dict.fromkeys((*own, *_VALIDATION)) if has_split(spec, split))


def resolved_revision(spec: DatasetSpec) -> str | None:
    """Return the commit of a hub source, pinned or the hub's newest; None for other sources. Raises DataError."""
    remote = not spec.source.startswith((BUILTIN, FETCHED)) and not Path(spec.source).exists()
    if spec.revision is not None or not remote:
        return spec.revision
    from huggingface_hub import HfApi

    with _hub_named(spec, spec.train_split):
        return HfApi().dataset_info(spec.source).sha


def _hub_rows(spec: DatasetSpec, split: str) -> Iterator[Located]:
    from datasets import get_dataset_config_names, load_dataset

    data_files = {split: PERSONA_FILE} if spec.selection == PERSONA else None
    with _hub_named(spec, split):
        # A suite's languages are configurations; other sets have one.
        names = get_dataset_config_names(spec.source, spec.revision) if spec.selection in SUITES else [None]
        found: Any = [
            load_dataset(spec.source, name, split=split, revision=spec.revision, data_files=data_files)
            for name in names
        ]
    for number, row in enumerate(itertools.chain.from_iterable(found)):
        yield Located(f"{spec.source}:{split}", number, without_nulls(dict(row)))


@contextlib.contextmanager
def _hub_named(spec: DatasetSpec, split: str) -> Iterator[None]:
    """Turn whatever goes wrong with the hub into one DataError, which says what to do without it."""
    from huggingface_hub import logging as hub_logging

    hub_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        revision = f" at revision {spec.revision}" if spec.revision else ""
        raw = "" if spec.selection is None else " (its own files, before any filter: prepare --from PATH)"
        raise DataError(
            f"data set {spec.name}: {spec.source} is no local path and the hub did not give its split {split} "
            f"({type(error).__name__}). Check the name, the network and HF_TOKEN. Without a network, fetch "
            f"https://huggingface.co/datasets/{spec.source}{revision} elsewhere{raw}, "
            f"or pass {spec.name}=PATH of its pairs."
        ) from error


def _fetched(name: str, split: str) -> Path:
    """Return a file of a rewriting, which is downloaded once. Raises DataError, which says how to do it by hand.

    The digest of the first download is kept beside the file: a file that has changed is fetched again, and other bytes
    are refused.
    """
    import pooch  # type: ignore[import-untyped]

    if split not in ("train", "test"):
        raise DataError(f"data set {name} has the splits train and test, not {split}.")
    place = f"{REWRITES[name]}/{split}/data-00000-of-00001.arrow"
    url = f"{rewrites_base()}/{place}"
    file = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/rmsweep").expanduser() / "fetched" / place
    noted = file.with_name(f"{file.name}.sha256")
    # pooch would print the address, and that of a mirror may hold a password.
    pooch.get_logger().setLevel("WARNING")
    # Files of a megabyte: read whole, so that a failed answer leaves no connection open.
    download = pooch.HTTPDownloader(stream=False, timeout=30)
    with alone(file), disk_named(file):
        expected = noted.read_text().strip() if noted.is_file() else None
        changed = expected is not None and file.is_file() and digest_file(file) != expected
        if changed or not file.is_file():
            print(
                f"data set {name}: {'the copy has changed, ' if changed else ''}downloading", file=sys.stderr
            )
        try:
            pooch.retrieve(url, expected, fname=file.name, path=file.parent, downloader=download)
        # What requests raises is an OSError, other bytes than at the first fetch a ValueError.
        except (OSError, ValueError) as error:
            raise DataError(
                f"data set {name}: {url} could not be fetched ({error}). With a network, run the same command again; "
                f"without one, fetch that address elsewhere and put it at {file}, or give a copy with --from PATH. If other "
                f"bytes are meant, delete {noted}."
            ) from error
        if not expected:
            replace(noted, digest_file(file) + "\n")
    return file
