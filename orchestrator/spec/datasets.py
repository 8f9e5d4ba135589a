"""Reads data sets and identifies each split by the digest of its rows, whatever file they came in.

The store remembers what the hub gave. The flags on one's own sets choose rows, so they change a key only where they
change the rows.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from orchestrator.spec.keys import content_key
from orchestrator.spec.stages import Split
from orchestrator.store.artifacts import Store
from trainers.data import sources
from trainers.data.known import LENGTH_TOKENIZER, Funnel, length_tokenizer, said_funnel
from trainers.data.records import Digest, Pair, read_written_pairs, written
from trainers.errors import DataError, SpecError, StorageError, nearest
from trainers.specs import BUILTIN, FETCHED, DatasetSpec, Ratings
from trainers.storage import Location, disk_named, replace

# What says which rows of a source are meant; at these defaults it is not in a source's key.
_ROWS_MEANT = (
    *("augmentation", "selection", "columns", "group_by"),
    *("test_share", "split_seed", "skip_bad_rows", "ratings", "ties"),
)


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
            remote = (
                not spec.mixture and not spec.source.startswith(BUILTIN) and not Path(spec.source).exists()
            )
            self._known[spec, split] = self._remote(spec, split) if remote else self._read(spec, split)
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
            if (train_set, split) in self._known or _has_files(train_set, split):
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
        with self._spool() as spool:
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
            told = {name: known[name] for name in ("digest", "rows", "without_margin", "without_rewriting")}
            return _Known(
                split=Split(name=spec.name, split=split, **told),
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
            "digest": found.split.digest,
            "rows": found.split.rows,
            "without_margin": found.split.without_margin,
            "without_rewriting": found.split.without_rewriting,
            "chosen": sorted(found.chosen),
            "originals": sorted(found.originals),
        }
        replace(record, json.dumps(remembered))
        return found

    @contextlib.contextmanager
    def _spool(self) -> Iterator[Path | None]:
        """Yield a temporary file for the rows; None where rows are not kept."""
        if not self._fetch:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="rmsweep-rows-") as folder, disk_named(Path(folder)):
            yield Path(folder) / "pairs.jsonl"


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


def _has_files(spec: DatasetSpec, split: str) -> bool:
    """Whether a split can be read without a network."""
    place, read_from = Path(spec.source), spec.train_split if spec.test_share else split
    return (
        spec.source.startswith(BUILTIN)
        or place.is_file()
        or (place.is_dir() and sources.has_split(spec, read_from))
    )


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_record(file: Location) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(file.read_text())
        _ = known["digest"], known["chosen"], known["originals"]
        # An earlier rmsweep did not count these rows.
        known = dict.fromkeys(("without_margin", "without_rewriting"), known["rows"]) | known
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} is unreadable ({error}); delete it to fetch the data set again."
        ) from error
    return known


Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Flags on the rows of sets that are given by a path or a hub id."""

    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET/]MEANING=COLUMN")] = ()
    """Columns of one's own sets, as in prompt=question chosen=best; SET/prompt=… for one set only."""
    test_share: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET/]X")] = ()
    """Share of one's own training sets without a test split that becomes one; SET/X for one set only."""
    group_by: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET/]COLUMN")] = ()
    """With --test-share, rows with the same value in this column stay together (default: the same prompt)."""
    split_seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of the division by --test-share."""
    skip_bad_rows: bool = False
    """Leave out, count and list the rows of one's own sets that cannot be read."""
    ratings: Ratings = "all"
    """Pair each rated answer with all that are rated lower, or only the best one."""
    ties: bool = False
    """Train also on pairs of answers with the same rating, as pairs with a label of 0.5."""


def read_as(
    train_sets: Sequence[DatasetSpec],
    eval_sets: Sequence[DatasetSpec],
    options: ReadingOptions,
    suites: Sequence[str] = (),
) -> tuple[tuple[DatasetSpec, ...], tuple[DatasetSpec, ...]]:
    """Apply the flags to one's own sets; the catalog's stay as they are, and `suites` skip bad rows. Raises SpecError.

    --test-share divides training sets; a set that is only evaluated is divided only where the flag names it.
    """
    trained = [part for spec in train_sets for part in spec.parts]
    own = {
        spec.name: spec
        for spec in (*eval_sets, *trained)
        if spec.selection is None and not spec.source.startswith((BUILTIN, FETCHED))
    }
    flags = (
        "columns",
        "test_share",
        "group_by",
        "split_seed",
        "ties",
        *([] if suites else ["skip_bad_rows"]),
    )
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(options, name)]
    given += ["--ratings"] if options.ratings != "all" else []
    if given and not own:
        raise SpecError(
            f"{', '.join(given)}: every set here is the catalog's, whose rows are read one way; give a PATH or hub id."
        )
    columns = _by_set("--columns", options.columns, own, sources.parse_column)
    shares = _by_set("--test-share", options.test_share, own, _share)
    groups = _by_set("--group-by", options.group_by, own, str)
    if groups and not shares:
        raise SpecError(
            f"--group-by {' '.join(options.group_by)}: groups stay together in a division; give --test-share."
        )
    if options.split_seed and not shares:
        raise SpecError(
            f"--split-seed {options.split_seed}: it divides sets with --test-share; give that, too."
        )
    divided = {
        spec.name
        for spec in trained
        if spec.name in own and not (Path(spec.source).is_dir() and sources.has_split(spec, spec.test_split))
    }
    if "" in shares and not divided:
        raise SpecError(
            f"--test-share {' '.join(options.test_share)}: no training set of one's own lacks a test split; "
            "give SET/X to divide one all the same."
        )

    def read(spec: DatasetSpec) -> DatasetSpec:
        if spec.mixture:
            return dataclasses.replace(
                spec, mixture=tuple((read(part), share) for part, share in spec.mixture)
            )
        if spec.name not in own:
            return spec
        share = _of(shares, spec.name, general=spec.name in divided)
        return dataclasses.replace(
            spec,
            columns=tuple({**dict(columns.get("", [])), **dict(columns.get(spec.name, []))}.items()),
            test_share=share or 0.0,
            group_by=_of(groups, spec.name, general=share is not None),
            split_seed=options.split_seed,
            skip_bad_rows=options.skip_bad_rows,
            ratings=options.ratings,
            ties=options.ties,
        )

    return tuple(map(read, train_sets)), tuple(map(read, eval_sets))


def _of(found: dict[str, list[Value]], name: str, *, general: bool) -> Value | None:
    """Return the value given for this set, else, with `general`, the value given for all sets."""
    words = found.get(name) or (found.get("") if general else None)
    return words[0] if words else None


def _by_set(
    flag: str, texts: Sequence[str], own: dict[str, DatasetSpec], parse: Callable[[str], Value]
) -> dict[str, list[Value]]:
    """Sort a flag's values by set; values for all sets stand under the empty name. Raises SpecError."""
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
