"""Audits of the data in the store: computed once per content, stored in <storage>/audits/ by content key.

The audit of a set depends only on its rows, and the overlap of two sets on the rows of both, so sweeps on the same data
share them. A damaged file is computed again.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.keys import content_key
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration
from trainers.data import audit, overlaps
from trainers.storage import SEAL, replace, seal


def audit_sweep(declaration: Declaration, store: Store) -> audit.Audit:
    """Return the audit of a sweep's training and evaluation sets, without those whose rows are not in the store."""
    # Names and digests: what trains, and by each what is evaluated after it.
    asked: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for trial in declaration.trials:
        evaluated = asked.setdefault((trial.train_set, trial.train_digest), {})
        evaluated.update(dict.fromkeys((item.dataset, item.dataset_digest) for item in trial.evaluations))
    every = dict.fromkeys(
        (item.dataset, item.dataset_digest) for trial in declaration.trials for item in trial.evaluations
    )
    sets = [set_audit(store, f"{name}/train", digest, "train") for name, digest in asked]
    sets += [
        set_audit(store, f"{name}/test", digest, "eval", _originals(declaration, name, digest))
        for name, digest in every
    ]
    between = [
        overlap(store, (f"{trained[0]}/train", trained[1]), (f"{name}/test", digest))
        for trained, evaluated in asked.items()
        for name, digest in evaluated
    ]
    return audit.Audit(
        sets=tuple(item for item in sets if item is not None),
        between=tuple(item for item in between if item is not None),
        tokens=tuple(_token_findings(declaration, store)),
    )


def _originals(declaration: Declaration, name: str, digest: str) -> list[str]:
    """Return the digests of the splits whose responses an evaluation set rewrites, if a trial declares that."""
    found: set[str] = set()
    for trial in declaration.trials:
        sets = {(item.dataset, item.dataset_digest, item.category) for item in trial.evaluations}
        if (name, digest, "token-level shift") in sets:
            own = {item for _, item, category in sets if category == "in-distribution"}
            found |= {trial.train_digest, *own}
    return sorted(found)


def _token_findings(declaration: Declaration, store: Store) -> Iterator[audit.Finding]:
    """Yield the findings in tokenised sets, once for all models with the same finding."""
    # Planning does not need the tokenisers that this import loads.
    from trainers.pairs.tokens import read_counts

    models: dict[tuple[str, str], list[str]] = {}
    for trial in declaration.trials:
        prepared = [(f"{item.dataset}/test", item.prepared) for item in trial.evaluations]
        for place in ((f"{trial.train_set}/train", trial.prepared), *prepared):
            models.setdefault(place, []).append(trial.model)
    found: dict[audit.Finding, list[str]] = {}
    for (name, key), readers in models.items():
        # A damaged manifest is said where its stage is made again.
        manifest = store.sound_manifest("prepare", key)
        info = manifest["info"] if manifest else {}
        if (counts := read_counts(info)) is not None:
            for finding in audit.token_findings(name, counts, info["pairs"]):
                found.setdefault(finding, []).extend(readers)
    for finding, readers in found.items():
        yield finding._replace(where=f"{finding.where}, read by {', '.join(dict.fromkeys(readers))}")


def leaked_rows(store: Store, train_digest: str, eval_digest: str) -> NDArray[np.int64] | None:
    """Return the rows of the evaluation split that training has seen or could have drawn; None where rows are missing."""
    found = overlap(store, ("", train_digest), ("", eval_digest))
    return None if found is None else np.array(found.leaked, dtype=np.int64)


def overlap(store: Store, train: tuple[str, str], evaluated: tuple[str, str]) -> overlaps.Overlap | None:
    """Return what two splits, each (name, digest), share; None where the rows of one are not in the store."""
    key = content_key("overlap", audit.VERSION, train=train[1], evaluated=evaluated[1])

    def compute() -> dict[str, Any] | None:
        seen, pairs = _train_index(store, train[1]), pairs_of(store, evaluated[1])
        if not seen or not pairs:
            return None
        return dataclasses.asdict(overlaps.overlap(seen, overlaps.IndexedPairs(pairs), names=("", "")))

    record = _kept(store, key, compute)
    if record is None:
        return None
    named = {"train": train[0], "evaluated": evaluated[0], "leaked": tuple(record["leaked"])}
    return overlaps.Overlap(**{**record, **named})


def set_audit(
    store: Store, name: str, digest: str, role: audit.Role, rewrites: Sequence[str] = ()
) -> audit.SetAudit | None:
    """Return what one split holds; None where its rows are not in the store. `rewrites` are digests of what it rewrites."""
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
            rewrites=audit.originals(pairs, candidates, declared=bool(rewrites)),
        )
        return dataclasses.asdict(audit.audit_set(data))

    record = _kept(store, key, compute)
    return None if record is None else audit.read_set_audit(record, name, role)


# One training set is compared with every evaluation set before the next one is.
@lru_cache(maxsize=1)
def _train_index(store: Store, digest: str) -> overlaps.IndexedPairs | None:
    pairs = pairs_of(store, digest)
    return overlaps.IndexedPairs(pairs) if pairs else None


def _kept(store: Store, key: str, compute: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the record of `key` from the store; where it is not there or damaged, computed and stored, unless it is None."""
    file = store.root / "audits" / f"{key}.json"
    try:
        record = json.loads(file.read_bytes())
        if record.pop(SEAL) == seal(record):
            return dict(record)
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        pass
    if (computed := compute()) is None:
        return None
    # As it will be read.
    record = json.loads(json.dumps(computed))
    replace(file, json.dumps({**record, SEAL: seal(record)}, ensure_ascii=False))
    return dict(record)
