"""Preference pairs from wherever they are: files, a `save_to_disk` folder, the hub, a fixed address, or built in.

Which rows make a pair is rows.py's, which files are read is formats.py's, the paper's filters and draws are
selections.py's. A row that cannot be read raises DataError with its file and number, or is listed and left out.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainers.data import hamiltonian, paper_hamiltonian, persona, tiny_world
from trainers.data.fetch import cache_folder, fetch
from trainers.data.formats import ENDINGS, Located, Row, file_rows, without_nulls
from trainers.data.length_filter import short_enough
from trainers.data.named import REWRITES, rewrites_url
from trainers.data.records import Pair, listed_turns
from trainers.data.rows import pair_of, prompt_column
from trainers.data.selections import SELECTIONS, Funnel
from trainers.data.turns import text_of
from trainers.errors import DataError
from trainers.specs import BUILTIN, FETCHED, PERSONA, Augmentation, DatasetSpec

# The copies of a smaller share are among those of a larger one.
_COPIES_SEED = 517
# What the held-out split is called where it is not called test.
_VALIDATION = ("validation", "valid", "val", "dev")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
BUILTIN_SETS: dict[str, Callable[[str], list[Pair]]] = {
    "tiny_world": tiny_world.pairs,
    "tiny_world_paraphrase": tiny_world.paraphrased_pairs,
    "tiny_world_candidates": tiny_world.candidate_pairs,
    "tiny_world_reworded": tiny_world.reworded_pairs,
    "tiny_world_other_words": tiny_world.other_words_pairs,
    "hamiltonian": hamiltonian.pairs,
    "hamiltonian_verification": functools.partial(hamiltonian.pairs, spec=hamiltonian.VERIFICATION),
    "hamiltonian_paper": paper_hamiltonian.pairs,
}


def read_pairs(spec: DatasetSpec, split: str, left_out: list[str] | None = None) -> list[Pair]:
    """Every pair of `split` of `spec`, in the source's order. Raises DataError."""
    return list(iter_pairs(spec, split, left_out))


def iter_pairs(
    spec: DatasetSpec, split: str, left_out: list[str] | None = None, funnel: Funnel | None = None
) -> Iterator[Pair]:
    """The pairs of `split` one by one; `left_out` gets a line for each bad row that `skip_bad_rows` leaves out.

    At the end `funnel` has how many rows were left after each step, from what was read to what was kept.

    Copies of the training pairs come last. Raises DataError, at the first bad row or at the end where nothing was left.
    """
    yield from _own_pairs(spec, split, left_out, [] if funnel is None else funnel)
    if spec.augmentation is not None and split == spec.train_split:
        yield from _copies(spec, spec.augmentation)


def _copies(spec: DatasetSpec, added: Augmentation) -> list[Pair]:
    rewriting = dataclasses.replace(
        spec, source=added.source, revision=None, keep=(), selection=None, columns=(), augmentation=None
    )
    rows = list(_own_pairs(rewriting, added.split, None, []))
    order = random.Random(_COPIES_SEED).sample(range(len(rows)), len(rows))
    return [rows[row] for row in sorted(order[: round(added.share * len(rows))])]


def _own_pairs(spec: DatasetSpec, split: str, left_out: list[str] | None, funnel: Funnel) -> Iterator[Pair]:
    if spec.source.startswith(BUILTIN):
        yield from BUILTIN_SETS[spec.source.removeprefix(BUILTIN)](split)
        return
    if spec.source.startswith(PERSONA):
        pairs = persona.pairs(_statements(spec, funnel), split)
        funnel.append(("pairs", len(pairs)))
        yield from pairs
        return
    faults: list[str] = [] if left_out is None else left_out
    found, seen = 0, 0
    # Where prompts are is decided once, by the first row that can be read.
    decided, asked = False, None
    for located in _selected_rows(spec, split, funnel):
        seen += 1
        if not decided and isinstance(located.row, dict):
            decided, asked = True, prompt_column(located.row, spec)
        try:
            pair = _pair(located, spec, split, asked)
        except DataError as error:
            if not spec.skip_bad_rows:
                raise
            faults.append(str(error))
            continue
        if pair is not None:
            found += 1
            yield pair
    if spec.selection is None:
        steps = [("rows", seen), ("readable", seen - len(faults)), (f"in the {split} split", found)]
        funnel.extend(step for step in steps if step[1] != seen or step is steps[0])
    if not found:
        why = f" {seen} rows were read, {len(faults)} of them bad." if seen else ""
        first = f" The first: {faults[0]}" if faults else ""
        raise DataError(f"data set {spec.name}, split {split}: {spec.source} holds no pairs.{why}{first}")


def _statements(spec: DatasetSpec, funnel: Funnel) -> list[str]:
    """Questions of the rows that a `persona:` set is made of. Raises DataError."""
    location = spec.source.removeprefix(PERSONA)
    path = Path(location)
    located: Iterator[Located]
    if path.exists():
        files = [path] if path.is_file() else _split_files(path, persona.FILE_STEM)
        if not files:
            raise DataError(f"{path} holds no {persona.HUB_FILE.partition('/')[2]}.")
        located = itertools.chain.from_iterable(file_rows(file) for file in files)
    else:
        hub = dataclasses.replace(spec, source=location)
        located = itertools.starmap(Located, _hub_rows(hub, "train", data_files=persona.HUB_FILE))
    questions, rows = [], 0
    for item in located:
        rows += 1
        if isinstance(item.row, DataError):
            raise item.row
        if persona.matches(item.row):
            questions.append(text_of(item.row.get("question"), item.where, "question"))
    funnel.extend([("rows", rows), ("whose matching answer is Yes", len(questions))])
    return questions


def has_split(spec: DatasetSpec, split: str) -> bool:
    """Whether a local folder has files of `split`."""
    return bool(_split_files(Path(spec.source), split))


def splits_of(spec: DatasetSpec) -> tuple[str, ...]:
    """The splits that can be read without asking for them by name."""
    path = Path(spec.source)
    if spec.selection:
        return SELECTIONS[spec.selection].splits
    if spec.test_share or not path.exists() or spec.source.startswith(PERSONA):
        return spec.train_split, spec.test_split
    if path.is_file():
        return (spec.train_split,)
    return tuple(
        split for split in (spec.train_split, spec.test_split, *_VALIDATION) if has_split(spec, split)
    )


def _pair(located: Located, spec: DatasetSpec, split: str, asked: str | None) -> Pair | None:
    """The pair of a row; None where the row is not kept or stands in the other split. Raises DataError."""
    row = located.row
    if isinstance(row, DataError):
        raise row
    if not all(fnmatch.fnmatchcase(str(row.get(column)), glob) for column, glob in spec.keep):
        return None
    if not spec.test_share:
        return pair_of(row, located.where, spec, asked)
    if spec.group_by is not None:
        if row.get(spec.group_by) is None:
            raise DataError(f"{located.where}: no value in the group column {spec.group_by!r}.")
        if not _is_in(spec, split, json.dumps(row[spec.group_by], sort_keys=True, default=str)):
            return None
        return pair_of(row, located.where, spec, asked)
    pair = pair_of(row, located.where, spec, asked)
    return pair if _is_in(spec, split, json.dumps(listed_turns(pair.prompt))) else None


def _is_in(spec: DatasetSpec, split: str, group: str) -> bool:
    """Whether a group is in the split: by its hash, so that it stays there whatever rows are added.

    The training rows of a set that is evaluated on them are its train split, whatever it calls its test split.
    """
    digest = hashlib.sha256(f"{spec.split_seed}\n{group}".encode()).digest()
    for_test = int.from_bytes(digest[:8], "big") < spec.test_share * 2**64
    return split == (spec.test_split if for_test else spec.train_split) and (
        not for_test or split != spec.train_split
    )


def _selected_rows(spec: DatasetSpec, split: str, funnel: Funnel) -> Iterator[Located]:
    if spec.selection is None:
        yield from _rows(spec, spec.train_split if spec.test_share else split)
        return
    selection = SELECTIONS[spec.selection]
    if split not in selection.splits:
        raise DataError(f"data set {spec.name} has no split {split}; it has {', '.join(selection.splits)}.")
    try:
        yield from selection.run(functools.partial(_rows, spec), split, short_enough, funnel)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"data set {spec.name}: a row of {spec.source} is not as expected ({error!r})."
        ) from error


def _rows(spec: DatasetSpec, split: str) -> Iterator[Located]:
    """The rows of a split of the source, as they are."""
    path = Path(spec.source)
    if spec.source.startswith(FETCHED):
        yield from file_rows(_fetched(spec.source.removeprefix(FETCHED), split))
    elif path.exists():
        yield from _local_rows(spec, path, split)
    else:
        yield from itertools.starmap(Located, _hub_rows(spec, split))


def _fetched(name: str, split: str) -> Path:
    if split not in ("train", "test"):
        raise DataError(f"data set {name} has the splits train and test, not {split}.")
    file = cache_folder() / "fetched" / REWRITES[name] / split / "data-00000-of-00001.arrow"
    return fetch(rewrites_url(name, split), file, what=f"data set {name}")


def _local_rows(spec: DatasetSpec, path: Path, split: str) -> Iterator[Located]:
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is neither a file nor a folder.")
    files = [path] if path.is_file() else _split_files(path, split)
    if not files:
        found = sorted({entry.name for entry in path.iterdir()})
        raise DataError(
            f"{path} has no {split} split: expected {split}.parquet, {split}.jsonl, {split}.csv or a folder {split}/ "
            f"written by save_to_disk; found {', '.join(found[:8]) or 'nothing'}.{_held_out(path, split)}"
        )
    needed: Sequence[str] = (spec.column("chosen"), spec.column("rejected"))
    if spec.selection:
        needed = SELECTIONS[spec.selection].columns
    elif spec.group_by:
        needed = (*needed, spec.group_by)
    for file in files:
        yield from file_rows(file, needed)


def _split_files(path: Path, split: str) -> list[Path]:
    """The files of a split: one, or shards of one kind. Raises DataError where it is not clear which are meant."""
    saved = [path / split, *([path] if split == "train" else [])]
    # Copies of a hub data set keep their files in data/.
    kinds = [
        *([state] for folder in saved if (state := folder / "state.json").is_file()),
        *(
            sorted(place.glob(pattern))
            for place in (path, path / "data")
            for ending in ENDINGS
            for pattern in (f"{split}{ending}", f"{split}-*{ending}")
        ),
    ]
    found = [files for files in kinds if files]
    if len(found) > 1:
        first = ", ".join(str(files[0].relative_to(path)) for files in found)
        raise DataError(f"{path} holds the {split} split more than once ({first}): which is meant? Keep one.")
    (files,) = found or ([],)
    if files and files[0].name == "state.json":
        return [files[0].parent / name for name in _listed_files(files[0])]
    return files


def _held_out(path: Path, split: str) -> str:
    """A sentence on a split that may be meant by the one that is missing."""
    others = [name for name in _VALIDATION if split == "test" and _split_files(path, name)]
    return "".join(
        f" Its {name} split is not taken for a test split: rename its file, or give that file itself."
        for name in others[:1]
    )


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


def resolved_revision(spec: DatasetSpec) -> str | None:
    """The commit of a hub source: the pinned one, or what the hub says now; None for what has none. Raises DataError."""
    location = spec.source.removeprefix(PERSONA)
    remote = not spec.source.startswith((BUILTIN, FETCHED)) and not Path(location).exists()
    if spec.revision is not None or not remote:
        return spec.revision
    from huggingface_hub import HfApi
    from huggingface_hub import logging as hub_logging

    # What it says of its own retries is said once, by us.
    hub_logging.set_verbosity_error()
    try:
        revision: str | None = HfApi().dataset_info(location).sha
    except Exception as error:
        raise _unreachable(dataclasses.replace(spec, source=location), spec.train_split, error) from error
    return revision


def _hub_rows(spec: DatasetSpec, split: str, data_files: str | None = None) -> Iterator[tuple[str, int, Row]]:
    from datasets import load_dataset
    from huggingface_hub import logging as hub_logging

    hub_logging.set_verbosity_error()
    try:
        rows: Any = load_dataset(spec.source, split=split, revision=spec.revision, data_files=data_files)
    except Exception as error:
        raise _unreachable(spec, split, error) from error
    for number, row in enumerate(rows):
        yield f"{spec.source}:{split}", number, without_nulls(dict(row))


def _unreachable(spec: DatasetSpec, split: str, error: Exception) -> DataError:
    revision = f" at revision {spec.revision}" if spec.revision else ""
    raw = "" if spec.selection is None else " (its own files, before any filter: prepare --from PATH)"
    return DataError(
        f"data set {spec.name}: {spec.source} is no local path and the hub did not give its split {split} "
        f"({type(error).__name__}). Check the name, the network and HF_TOKEN. Without a network, fetch "
        f"https://huggingface.co/datasets/{spec.source}{revision} elsewhere{raw}, "
        f"or pass {spec.name}=PATH of its pairs."
    )
