"""Audits of the data in the store: computed once per content, kept in <storage>/audits/ by content key.

What one set holds hangs on its rows, what two share on the rows of both; so every sweep on the same data shares them.
A file that is not what was written is made again.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.trials import content_key
from orchestrator.store.artifacts import Store
from trainers.data import audit
from trainers.data.audit.duplicates import TextIndex
from trainers.data.audit.overlaps import indexed, overlap_of
from trainers.data.audit.rewrites import originals
from trainers.data.audit.sets import Role
from trainers.disk import SEAL, replace, seal

# What this process has read or computed, by root and key: a grid asks for each overlap once per trial.
_known: dict[tuple[str, str], dict[str, Any]] = {}


def leaked_rows(store: Store, train_digest: str, eval_digest: str) -> NDArray[np.int64] | None:
    """Rows of the evaluation split that stand in the training split, drawn or not; None where rows are not there."""
    found = overlap(store, ("", train_digest), ("", eval_digest))
    return None if found is None else np.array(found.leaked, dtype=np.int64)


def overlap(store: Store, train: tuple[str, str], evaluated: tuple[str, str]) -> audit.Overlap | None:
    """What two splits, each (name, digest), share; None where the rows of one are not in the store."""
    key = content_key("overlap", audit.VERSION, train=train[1], evaluated=evaluated[1])

    def compute() -> dict[str, Any] | None:
        seen, pairs = _train_index(store, train[1]), pairs_of(store, evaluated[1])
        if not seen or not pairs:
            return None
        return dataclasses.asdict(overlap_of(seen, indexed(pairs), pairs, names=("", "")))

    record = _kept(store, key, compute)
    if record is None:
        return None
    own = {field.name: record[field.name] for field in dataclasses.fields(audit.Overlap)}
    return audit.Overlap(
        **{**own, "train": train[0], "evaluated": evaluated[0], "leaked": tuple(record["leaked"])}
    )


def set_audit(
    store: Store, name: str, digest: str, role: Role, rewrites: Sequence[str] = ()
) -> audit.SetAudit | None:
    """What one split holds; None where its rows are not in the store. `rewrites` are digests of what it rewrites."""
    key = content_key("audit", audit.VERSION, dataset=digest, rewrites=sorted(rewrites))

    def compute() -> dict[str, Any] | None:
        pairs = pairs_of(store, digest)
        if not pairs:
            return None
        candidates = (pair for other in sorted(rewrites) for pair in pairs_of(store, other))
        data = audit.AuditSet(
            name=name,
            role=role,
            pairs=pairs,
            rewrites=originals(pairs, candidates, declared=bool(rewrites)),
        )
        return dataclasses.asdict(audit.audit_set(data))

    record = _kept(store, key, compute)
    return None if record is None else audit.read_set_audit(record, name, role)


# One training set is compared with every evaluation set before the next one is.
@lru_cache(maxsize=1)
def _indexed(root: str, digest: str, store: Store) -> tuple[TextIndex, ...]:
    pairs = pairs_of(store, digest)
    return indexed(pairs) if pairs else ()


def _train_index(store: Store, digest: str) -> tuple[TextIndex, ...]:
    return _indexed(str(store.root), digest, store)


def _kept(store: Store, key: str, compute: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """The record of `key`, from this process, from the store, or computed and stored."""
    place = (str(store.root), key)
    if place in _known:
        return _known[place]
    file = store.root / "audits" / f"{key}.json"
    record = _read(file.read_bytes()) if file.is_file() else None
    if record is None:
        computed = compute()
        if computed is None:
            return None
        # As it will be read.
        record = json.loads(json.dumps(computed))
        replace(file, json.dumps({**record, SEAL: seal(record)}, ensure_ascii=False))
    _known[place] = record
    return record


def _read(content: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(content)
    except ValueError:
        return None
    sound = isinstance(record, dict) and record.get(SEAL) == seal(record)
    return record if sound else None
