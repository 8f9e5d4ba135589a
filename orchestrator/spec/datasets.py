"""Reads data sets and identifies each split by the digest of its rows, whatever file they came in.

The store remembers what the hub gave. The flags on one's own sets choose rows, so they change a key only where they
change the rows.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from orchestrator.spec.keys import content_key
from orchestrator.spec.stages import Split
from orchestrator.store.artifacts import Store
from trainers.data import sources
from trainers.data.known import LENGTH_TOKENIZER, Funnel, length_tokenizer, said_funnel
from trainers.data.records import Digest, Pair, read_written_pairs, written
from trainers.errors import DataError, SpecError, StorageError, nearest
from trainers.specs import BUILTIN, FETCHED, DatasetSpec
from trainers.storage import Location, disk_named, replace

# What says which rows of a source are meant; at these defaults it is not in a source's key.
_ROWS_MEANT = (
    *("augmentation", "selection", "columns", "group_by"),
    *("test_share", "split_seed", "skip_bad_rows", "ratings", "ties"),
)

# What the store remembers of a split that the hub gave.
_REMEMBERED = ("digest", "rows", "without_margin", "without_rewriting")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A split with short digests of its chosen responses, and of those that its responses rewrite."""

    split: Split
    chosen: frozenset[str] = frozenset()
    originals: frozenset[str] = frozenset()


class DatasetReader:
    """Reads each split once and remembers it. `left_out` lists the bad rows of each (set, split) that was read."""

    def __init__(self, store: Store, *, fetch: bool = True) -> None:
        self._store = store
        self._fetch = fetch
        self._known: dict[tuple[DatasetSpec, str], _Known] = {}
        self.left_out: dict[tuple[str, str], list[str]] = {}
        self._read_as: dict[tuple[str, str], str] = {}

    def split(self, spec: DatasetSpec, split: str) -> Split:
        """Identify a split. With `fetch` its rows are in the store afterwards; without, it may be unfetched.

        Raises DataError.
        """
        if (spec, split) not in self._known:
            self._known[spec, split] = (self._remote if _is_remote(spec) else self._read)(spec, split)
        return self._known[spec, split].split

    def rewrites(self, eval_set: DatasetSpec, train_set: DatasetSpec) -> bool:
        """Whether `eval_set` declares, by name or by its rows' originals, that it rewrites `train_set`."""
        if eval_set.rewriting_of is not None:
            return eval_set.rewriting_of == train_set.name
        known = self._known.get((eval_set, eval_set.test_split))
        if known is None or not known.originals:
            return False
        originals, texts = known.originals, set[str]()
        for split in (train_set.train_split, train_set.test_split):
            # The hub is not asked for a split that nothing else needs; a folder may lack it.
            folder = Path(train_set.source).is_dir() and not train_set.test_share
            try:
                lacks = bool(train_set.mixture) or (folder and not sources.has_split(train_set, split))
            except DataError:
                # Several of its folders have one, of which none is meant.
                lacks = True
            if (train_set, split) in self._known or not (_is_remote(train_set) or lacks):
                self.split(train_set, split)
                texts |= self._known[train_set, split].chosen
        return 2 * len(originals & texts) >= len(originals)

    def said_left_out(self, most: int = 5) -> tuple[str, ...]:
        """Say which format each split was recognised as, and how many bad rows were left out, with the first ones."""
        read_as = (
            f"data set {name}, split {split}: {said}" for (name, split), said in sorted(self._read_as.items())
        )
        return *read_as, *(
            f"data set {name}, split {split}: {len(lines)} bad rows left out: {'; '.join(lines[:most])}"
            + (f"; and {len(lines) - most} more" if len(lines) > most else "")
            for (name, split), lines in sorted(self.left_out.items())
        )

    def _read(self, spec: DatasetSpec, split: str) -> _Known:
        """Read the rows once, in a stream, for their digest; with `fetch` a copy goes into the store."""
        parts = [self.split(part, part.train_split) for part, _ in spec.mixture]
        if not all(part.fetched for part in parts):
            return _Known(split=Split(name=spec.name, split=split, digest=f"not fetched {spec.source}"))
        if len({part.digest for part in parts}) < len(parts):
            names = ", ".join(part.name for part in parts)
            raise DataError(f"data set {spec.name}: {names} hold the same rows; name each set once.")
        digest, chosen, originals = Digest(), set[str](), set[str]()
        left_out: list[str] = []
        funnel: Funnel = []
        found_pairs = self._mixed(spec, parts) if parts else sources.iter_pairs(spec, split, left_out, funnel)
        with tempfile.TemporaryDirectory(prefix="rmsweep-rows-") as folder, disk_named(Path(folder)):
            spool = Path(folder) / "pairs.jsonl" if self._fetch else None
            for pair in written(found_pairs, spool):
                digest.add(pair)
                chosen.add(_short_digest(pair.chosen))
                if pair.original_chosen:
                    originals.add(_short_digest(pair.original_chosen))
            found = Split(
                name=spec.name,
                split=split,
                digest=digest.hexdigest(),
                rows=digest.rows,
                without_margin=digest.without_margin,
                without_rewriting=digest.without_rewriting,
                mixed=tuple(part.digest for part in parts),
            )
            if left_out:
                self.left_out[spec.name, split] = left_out
            if funnel and "read as" in funnel[0][0]:
                self._read_as[spec.name, split] = said_funnel(funnel)
            if spool is not None and not self._store.complete("dataset", found.digest):
                with self._store.write("dataset", found.digest, name=found.name, split=split) as attempt:
                    shutil.copyfile(spool, attempt.directory / "pairs.jsonl")
                    attempt.info |= {"rows": found.rows} | ({"left_out": len(left_out)} if left_out else {})
        return _Known(split=found, chosen=frozenset(chosen), originals=frozenset(originals))

    def _mixed(self, spec: DatasetSpec, parts: Sequence[Split]) -> Iterator[Pair]:
        """Yield the pairs of a mixture, from the store's copies where it has them; of a set with its own draw, those."""
        from trainers.pairs.tokens import draw_order

        rows = []
        for part, known in zip(spec.parts, parts, strict=True):
            own = pairs_of(self._store, known.digest) or sources.read_pairs(part, part.train_split)
            if draw := part.train_draw:
                own = [own[row] for row in sorted(draw_order(len(own), draw)[: draw.max_pairs])]
            rows.append(own)
        return sources.mixed([share for _, share in spec.mixture], rows)

    def _remote(self, spec: DatasetSpec, split: str) -> _Known:
        if not spec.source.startswith(FETCHED) and not sources.HUB_ID.fullmatch(spec.source):
            raise DataError(
                f"data set {spec.name}: there is no file or folder {spec.source}, and it is no hub id."
            )
        key = _source_key(spec, split)
        record = self._store.root / "sources" / f"{key}.json"
        known = _read_record(record) if record.is_file() else None
        # A remembered set is fetched again where gc has removed its rows.
        if known and (not self._fetch or self._store.complete("dataset", known["digest"])):
            return _Known(
                split=Split(name=spec.name, split=split, **{name: known[name] for name in _REMEMBERED}),
                chosen=frozenset(known["chosen"]),
                originals=frozenset(known["originals"]),
            )
        if not self._fetch:
            return _Known(split=Split(name=spec.name, split=split, digest=f"not fetched {key}"))
        # The same revision again, whatever the hub has now.
        revision = (known or {}).get("revision") or sources.resolved_revision(spec)
        found = self._read(dataclasses.replace(spec, revision=revision), split)
        remembered = {
            "source": spec.source,
            "set": spec.name,
            "split": split,
            "revision": revision,
            **{name: getattr(found.split, name) for name in _REMEMBERED},
            "chosen": sorted(found.chosen),
            "originals": sorted(found.originals),
        }
        replace(record, json.dumps(remembered))
        return found


def _source_key(spec: DatasetSpec, split: str) -> str:
    meant = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name in _ROWS_MEANT and getattr(spec, field.name) != field.default
    }
    if spec.selection and length_tokenizer() != LENGTH_TOKENIZER:
        meant["length_tokenizer"] = length_tokenizer()
    return content_key(
        "source", 2, id=spec.source, revision=spec.revision, keep=spec.keep, split=split, **meant
    )


def pairs_of(store: Store, digest: str) -> Sequence[Pair]:
    """Read the rows of a split from the store; none where they are missing or damaged."""
    try:
        # Of answers the digest is the key of the stage that drew them.
        kind = next((kind for kind in ("dataset", "sample") if store.complete(kind, digest)), None)
        return read_written_pairs(store.read_file(kind, digest, "pairs.jsonl")) if kind else ()
    except StorageError:
        return ()


def _is_remote(spec: DatasetSpec) -> bool:
    return not (spec.mixture or spec.source.startswith(BUILTIN) or Path(spec.source).exists())


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_record(file: Location) -> dict[str, Any]:
    """Return what is remembered of a split that the hub gave."""
    try:
        known: dict[str, Any] = json.loads(file.read_text())
        _ = [known[name] for name in (*_REMEMBERED, "chosen", "originals")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} is unreadable ({error}); delete it to fetch the data set again."
        ) from error
    return known


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(sources.RowFlags):
    """Flags on the rows of sets that are given by a path or a hub id."""

    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET/]MEANING=COLUMN")] = ()
    """Columns of your own sets, as in prompt=question chosen=best; SET/prompt=… for one set only."""
    skip_bad_rows: bool = False
    """Leave out, count and list the rows of your own sets that cannot be read."""


def read_as(
    train_sets: Sequence[DatasetSpec],
    eval_sets: Sequence[DatasetSpec],
    options: ReadingOptions,
    suites: Sequence[str] = (),
) -> tuple[tuple[DatasetSpec, ...], tuple[DatasetSpec, ...]]:
    """Apply the flags to one's own sets; the catalog's stay as they are, and `suites` skip bad rows. Raises SpecError.

    --test-share divides the training sets that lack a test split.
    """
    trained = [part for spec in train_sets for part in spec.parts]
    own = {
        spec.name
        for spec in (*eval_sets, *trained)
        if spec.selection is None and not spec.source.startswith((BUILTIN, FETCHED))
    }
    divided = {
        spec.name
        for spec in trained
        if options.test_share and spec.name in own and not sources.has_split(spec, spec.test_split)
    }
    flags = dataclasses.fields(ReadingOptions)
    fields = {item.name: getattr(options, item.name) for item in flags}
    given = [
        item.name
        for item in flags
        if fields[item.name] != item.default and not (suites and item.name == "skip_bad_rows")
    ]
    if given and not own:
        raise SpecError(
            f"{sources.flags(given)}: every set here is the catalog's, whose rows are read one way; give a PATH or hub id."
        )
    sources.require_share(options)
    if options.test_share and not divided:
        raise SpecError(
            f"--test-share {options.test_share:g}: no training set of one's own lacks a test split; leave it out."
        )
    columns: dict[str, list[tuple[str, str]]] = {}
    for text in options.columns:
        name, slash, word = text.partition("/")
        # A column may have a slash in its name.
        named = slash and "=" not in name
        if named and name not in own:
            raise SpecError(f"--columns {text}: no set of one's own here is {name}; {nearest(name, own)}")
        columns.setdefault(name if named else "", []).append(sources.parse_column(word if named else text))

    def read(spec: DatasetSpec) -> DatasetSpec:
        if spec.mixture:
            return dataclasses.replace(
                spec, mixture=tuple((read(part), share) for part, share in spec.mixture)
            )
        if spec.name not in own:
            return spec
        mine = columns.get(spec.name, [])
        shared = [item for item in columns.get("", []) if item[0] not in dict(mine)]
        undivided = {} if spec.name in divided else {"test_share": 0.0, "group_by": None}
        return dataclasses.replace(spec, **{**fields, "columns": (*shared, *mine), **undivided})

    return tuple(map(read, train_sets)), tuple(map(read, eval_sets))
