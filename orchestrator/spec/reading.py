"""How the rows of one's own sets are read in a sweep: the flags of `python -m trainers.data prepare`, for all sets or for one.

They say which rows a set holds, so they are in a key as far as they change the rows: a set is known by its content.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from trainers.data.sources import has_split, parse_column
from trainers.errors import SpecError, nearest
from trainers.specs import BUILTIN, FETCHED, PERSONA, DatasetSpec

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Flags on the rows of sets that are given by a path or a hub id."""

    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET/]MEANING=COLUMN")] = ()
    """Which column of one's own sets is which: prompt=question chosen=best; SET/prompt=… of one set alone."""
    test_share: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET/]X")] = ()
    """Share that makes the test split of one's own training sets that have none; SET/X of one set alone."""
    group_by: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET/]COLUMN")] = ()
    """With --test-share, rows with one value in this column stay together (default: rows with one prompt)."""
    split_seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of that division."""
    skip_bad_rows: bool = False
    """Leave out, count and list the rows of one's own sets that cannot be read."""


def read_as(
    train_sets: Sequence[DatasetSpec], eval_sets: Sequence[DatasetSpec], options: ReadingOptions
) -> tuple[tuple[DatasetSpec, ...], tuple[DatasetSpec, ...]]:
    """The sets as the flags say. The catalog's are left as they are. Raises SpecError.

    A division concerns what is trained on; a set that is only evaluated is evaluated whole, unless it is named.
    """
    own = {spec.name: spec for spec in (*eval_sets, *train_sets) if _is_own(spec)}
    given = [
        flag
        for flag, value in (
            ("--columns", options.columns),
            ("--test-share", options.test_share),
            ("--group-by", options.group_by),
            ("--skip-bad-rows", options.skip_bad_rows),
        )
        if value
    ]
    if given and not own:
        raise SpecError(
            f"{', '.join(given)}: every set here is the catalog's, whose rows are read one way; give a PATH or hub id."
        )
    columns = _by_set("--columns", options.columns, own, parse_column)
    shares = _by_set("--test-share", options.test_share, own, _share)
    groups = _by_set("--group-by", options.group_by, own, str)
    if groups and not shares:
        raise SpecError(
            f"--group-by {' '.join(options.group_by)}: groups stay together in a division; give --test-share."
        )
    divided = {spec.name for spec in train_sets if spec.name in own and not _has_test_split(spec)}
    if "" in shares and not divided:
        raise SpecError(
            f"--test-share {' '.join(options.test_share)}: no training set of one's own lacks a test split; "
            "give SET/X to divide one all the same."
        )

    def read(spec: DatasetSpec) -> DatasetSpec:
        if spec.name not in own:
            return spec
        share = _of(shares, spec.name, general=spec.name in divided)
        return replace(
            spec,
            columns=tuple({**dict(columns.get("", [])), **dict(columns.get(spec.name, []))}.items()),
            test_share=share or 0.0,
            group_by=_of(groups, spec.name, general=share is not None),
            split_seed=options.split_seed,
            skip_bad_rows=options.skip_bad_rows,
        )

    return tuple(map(read, train_sets)), tuple(map(read, eval_sets))


def _of(found: dict[str, list[Value]], name: str, *, general: bool) -> Value | None:
    """What was said of the set, else what was said of all, where that concerns it."""
    words = found.get(name) or (found.get("") if general else None)
    return words[0] if words else None


def _is_own(spec: DatasetSpec) -> bool:
    return spec.selection is None and not spec.source.startswith((BUILTIN, FETCHED, PERSONA))


def _has_test_split(spec: DatasetSpec) -> bool:
    return Path(spec.source).is_dir() and has_split(spec, spec.test_split)


def _by_set(
    flag: str, texts: Sequence[str], own: dict[str, DatasetSpec], parse: Callable[[str], Value]
) -> dict[str, list[Value]]:
    """The words for each set, those for all under the empty name. Raises SpecError."""
    found: dict[str, list[Value]] = {}
    for text in texts:
        name, slash, word = text.partition("/")
        if slash and name in own:
            found.setdefault(name, []).append(parse(word))
            continue
        # A column may be called so; what comes before a meaning or a share is a set's name.
        if slash and flag != "--group-by" and "=" not in name:
            raise SpecError(f"{flag} {text}: no set of one's own here is {name}; {nearest(name, own)}")
        found.setdefault("", []).append(parse(text))
    for name, words in found.items():
        said = [word[0] if isinstance(word, tuple) else flag for word in words]
        if len(set(said)) < len(said):
            raise SpecError(
                f"{flag} {' '.join(texts)}: two values for {name or 'all sets'}; give each one once."
            )
    return found


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise SpecError(f"--test-share {text}: give a share above 0 and below 1.")
    return share
