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

# Pairs that a page shows, and letters of each text.
SHOWN = 200
LETTERS = 1200


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


def shown(rows: Sequence[Mapping[str, Any]], rewards: Sequence[str]) -> list[dict[str, Any]]:
    """Return at most SHOWN rows with texts, equally many of each set: those with the largest disagreement in either direction."""
    sets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["prompt"] is not None:
            found = {**row, **_order(row, rewards)}
            sets.setdefault((row["train_set"], row["evaluation_set"]), []).append(found)
    each = SHOWN // max(1, len(sets))
    chosen = []
    for items in sets.values():
        items.sort(key=lambda row: row["disagreement"])
        # Take both ends; where all types agree, these are the pairs with the largest margins.
        ends = (
            items if len(items) <= each else [*items[: each // 2], *items[len(items) - (each - each // 2) :]]
        )
        chosen += ends
    for row in chosen:
        for name in ("prompt", "chosen", "rejected"):
            if len(row[name]) > LETTERS:
                row[name] = f"{row[name][:LETTERS]} […]"
    return sorted(chosen, key=lambda row: -row["disagreement"])


def _order(row: Mapping[str, Any], rewards: Sequence[str]) -> dict[str, float]:
    """Return the sort keys of the page: the lead of the first type over the others, and the mean absolute margin."""
    right, margin = ([float(row[f"{kind}_{what}"]) for kind in rewards] for what in ("right", "margin"))
    first = right[0] - float(np.mean(right[1:])) if len(rewards) > 1 else right[0] - 0.5
    lead = margin[0] - float(np.mean(margin[1:])) if len(rewards) > 1 else margin[0]
    # Margins break ties between pairs that equally many trainings rank right.
    return {"disagreement": first + 1e-3 * float(np.tanh(lead)), "confidence": float(np.mean(np.abs(margin)))}
