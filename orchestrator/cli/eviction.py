"""Weights that go once they are evaluated, to free their space; everything else of a training stays.

Which go is decided by a pure function (`evictable`) on the results.
"""

import json
from collections.abc import Sequence
from typing import Literal

from orchestrator.cli.gc import delete
from orchestrator.report.results import TrialResult
from orchestrator.spec.declaration import declared_sweeps, read_declaration
from orchestrator.spec.trial_plan import unscored
from orchestrator.store.artifacts import EVICTED, Store
from orchestrator.store.manifests import holds_weights
from trainers.disk import replace
from trainers.errors import StorageError

KeepWeights = Literal["all", "best", "none"]


def evict(store: Store, key: str) -> int:
    """Remove the weights of a committed training; bytes freed. Its log, card and manifest stay. Raises StorageError.

    The marker is written first: a removal that was cut short is ended by the next call, or by gc.
    """
    manifest = store.manifest("train", key)
    if manifest is None:
        raise StorageError(f"artifact train/{key} is not in {store.root}; there are no weights to evict.")
    weights = {name: said["size"] for name, said in manifest["files"].items() if holds_weights(name)}
    if not weights:
        return 0
    folder = store.root / "artifacts" / "train" / key
    if store.evicted("train", key) is None:
        record = {
            "attempt": manifest["attempt"],
            "files": sorted(weights),
            "bytes": sum(weights.values()),
            "train_seconds": manifest["seconds"],
        }
        replace(folder / EVICTED, json.dumps(record, indent=1, sort_keys=True))
    return sum(delete(folder / manifest["attempt"] / name) for name in weights)


def evict_weights(
    store: Store,
    sweep: str,
    results: Sequence[TrialResult],
    keep: KeepWeights,
) -> int:
    """Evict what `keep` does not keep of a sweep's trials, but for those of other sweeps that have yet to be evaluated. Bytes freed.

    Raises StorageError.
    """
    chosen = evictable(results, keep)
    if not chosen:
        return 0
    others = [read_declaration(name, store) for name in declared_sweeps(store) if name != sweep]
    wanted = {
        trial.key
        for other in others
        for trial in other.trials
        if unscored(store, trial.key, [item.key for item in trial.evaluations])
    }
    return sum(evict(store, key) for key in chosen if key not in wanted)


def evictable(results: Sequence[TrialResult], keep: KeepWeights) -> list[str]:
    """Keys of the trials whose weights go: of complete ones all, or all but the most accurate of each group.

    A group is a model, training set and reward type; it is judged when all of its trials are complete.
    """
    if keep == "all":
        return []
    if keep == "none":
        return [result.record.key for result in results if result.complete]
    groups: dict[tuple[str, str, str], list[TrialResult]] = {}
    for result in results:
        record = result.record
        groups.setdefault((record.model, record.train_set, record.reward), []).append(result)
    judged = [group for group in groups.values() if all(result.complete for result in group)]
    best = {max(group, key=_rank).record.key for group in judged}
    return [result.record.key for group in judged for result in group if result.record.key not in best]


def _rank(result: TrialResult) -> tuple[float, int]:
    """By mean accuracy over the evaluation sets; among equals the lowest seed comes first."""
    accuracies = [item.metrics["accuracy"] for item in result.final]
    return sum(accuracies) / len(accuracies) if accuracies else 0.0, -result.record.seed
