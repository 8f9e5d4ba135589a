"""Who a data set is: its rows, whatever file they came in. What the hub gave is remembered in the store."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.artifacts import Store
from orchestrator.identity import HUB_ID
from orchestrator.spec import content_key
from orchestrator.stages import Split
from trainers.data import records, sources
from trainers.data.records import Pair
from trainers.disk import replace
from trainers.errors import DataError, StorageError
from trainers.objects import Location
from trainers.specs import BUILTIN, MANUAL, PERSONA, DatasetSpec


class DatasetReader:
    """Reads each split once; knows it by its rows afterwards."""

    def __init__(self, store: Store, *, fetch: bool = True) -> None:
        self._store = store
        self._fetch = fetch
        self._splits: dict[tuple[DatasetSpec, str], Split] = {}
        self._chosen: dict[tuple[DatasetSpec, str], frozenset[str]] = {}
        self._originals: dict[tuple[DatasetSpec, str], frozenset[str]] = {}

    def split(self, spec: DatasetSpec, split: str) -> Split:
        """The split's identity. With `fetch` its rows are in the store afterwards; without, it may be unfetched.

        Raises DataError.
        """
        if (spec, split) not in self._splits:
            remote = not spec.source.startswith(BUILTIN) and not Path(_location(spec)).exists()
            self._splits[spec, split] = self._remote(spec, split) if remote else self._read(spec, split)
        return self._splits[spec, split]

    def rewrites(self, eval_set: DatasetSpec, train_set: DatasetSpec) -> bool:
        """Whether `eval_set` declares, by name or by its rows' originals, that it rewrites `train_set`."""
        if eval_set.rewriting_of is not None:
            return eval_set.rewriting_of == train_set.name
        originals = self._originals.get((eval_set, eval_set.test_split), frozenset())
        if not originals:
            return False
        splits = [
            split
            for split in (train_set.train_split, train_set.test_split)
            if (train_set, split) in self._splits or _has_files(train_set, split)
        ]
        for split in splits:
            self.split(train_set, split)
        texts = frozenset[str]().union(*(self._chosen.get((train_set, split), ()) for split in splits))
        return 2 * len(originals & texts) >= len(originals)

    def _read(self, spec: DatasetSpec, split: str) -> Split:
        pairs = sources.read_pairs(spec, split)
        found = Split(name=spec.name, split=split, digest=records.content_digest(pairs), rows=len(pairs))
        self._chosen[spec, split] = _digests(pair.chosen for pair in pairs)
        self._originals[spec, split] = _digests(
            pair.original_chosen for pair in pairs if pair.original_chosen
        )
        if self._fetch:
            self._keep(found, pairs)
        return found

    def _remote(self, spec: DatasetSpec, split: str) -> Split:
        if not spec.source.startswith(MANUAL) and not HUB_ID.fullmatch(_location(spec)):
            raise DataError(
                f"data set {spec.name}: there is no file or folder {_location(spec)}, and it is no hub id."
            )
        # Sources were remembered before pairs could be added to them.
        added = {} if spec.augmentation is None else {"augmentation": spec.augmentation}
        key = content_key(
            "source", 1, id=spec.source, revision=spec.revision, keep=spec.keep, split=split, **added
        )
        record = self._store.root / "sources" / f"{key}.json"
        known = _read_record(record) if record.is_file() else None
        # The rows of a remembered set may have been collected as garbage; then it is fetched again.
        if known and (not self._fetch or self._store.complete("dataset", known["digest"])):
            self._chosen[spec, split] = frozenset(known["chosen"])
            self._originals[spec, split] = frozenset(known["originals"])
            return Split(name=spec.name, split=split, digest=known["digest"], rows=known["rows"])
        if not self._fetch:
            return Split(name=spec.name, split=split, digest=f"not fetched {key}", rows=0)
        found = self._read(spec, split)
        remembered = {
            "digest": found.digest,
            "rows": found.rows,
            "chosen": sorted(self._chosen[spec, split]),
            "originals": sorted(self._originals[spec, split]),
        }
        replace(record, json.dumps(remembered))
        return found

    def _keep(self, split: Split, pairs: list[Pair]) -> None:
        if self._store.complete("dataset", split.digest):
            return
        with self._store.write("dataset", split.digest, name=split.name, split=split.split) as attempt:
            records.write_pairs(pairs, attempt.directory / "pairs.jsonl")
            attempt.info["rows"] = len(pairs)


def _location(spec: DatasetSpec) -> str:
    """Path or hub id: of the statements, where the set is made of some."""
    return spec.source.removeprefix(PERSONA)


def _has_files(spec: DatasetSpec, split: str) -> bool:
    """Whether a split that nobody asked for can be read without a network."""
    return spec.source.startswith(BUILTIN) or (Path(spec.source).is_dir() and sources.has_split(spec, split))


def _digests(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def _read_record(file: Location) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(file.read_text())
        _ = known["digest"], known["rows"], known["chosen"], known["originals"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} is unreadable ({error}); delete it to fetch the data set again."
        ) from error
    return known
