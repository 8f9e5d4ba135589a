"""Example pairs for the report: the text of each test pair, with the margin that each reward type gives it.

A margin is the mean over the models and seeds that have every type, in standard deviations of the set's rewards; `right` is
the share of these trainings that rank the pair right.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.report.comparison import Analysis, SetOutcomes, set_outcomes
from orchestrator.spec.datasets import pairs_of
from orchestrator.store.artifacts import Store
from trainers.data.records import Pair

# Pairs that a page shows.
SHOWN = 60


def pair_rows(analysis: Analysis, store: Store) -> list[dict[str, Any]]:
    """Return one row per training set, evaluation set and pair; texts that the store lacks are None."""
    return [
        row
        for item in set_outcomes(analysis, analysis.rewards)
        for row in _rows(item, pairs_of(store, item.dataset_digest))
    ]


def _rows(item: SetOutcomes, texts: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    for place, index in enumerate(item.index.tolist()):
        pair = texts[index] if index < len(texts) else None
        yield {
            "train_set": item.train_set,
            "evaluation_set": item.dataset,
            "category": item.category,
            "index": index,
            "prompt": pair and "\n\n".join(f"{turn.role}: {turn.content}" for turn in pair.prompt),
            "chosen": pair and pair.chosen,
            "rejected": pair and pair.rejected,
            **{f"{kind}_margin": float(margin_P[place]) for kind, margin_P in item.margin.items()},
            **{f"{kind}_right": float(right_P[place]) for kind, right_P in item.right.items()},
        }


def shown_examples(rows: Sequence[Mapping[str, Any]], rewards: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return at most SHOWN rows with texts, equally many of each set: from both ends of the first type's lead over the others."""

    def lead(row: Mapping[str, Any]) -> tuple[float, float]:
        """Margins break ties between pairs that equally many trainings rank right."""
        right, margin = ([float(row[f"{kind}_{what}"]) for kind in rewards] for what in ("right", "margin"))
        return right[0] - float(np.mean(right[1:] or 0.5)), margin[0] - float(np.mean(margin[1:] or 0.0))

    sets: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["prompt"] is not None:
            sets.setdefault((row["train_set"], row["evaluation_set"]), []).append(row)
    half = max(1, SHOWN // max(1, len(sets)) // 2)
    chosen: list[Mapping[str, Any]] = []
    for items in sets.values():
        items.sort(key=lead)
        chosen += items if len(items) <= 2 * half else [*items[:half], *items[len(items) - half :]]
    return sorted(chosen, key=lead, reverse=True)
