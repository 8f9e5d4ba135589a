"""Scoring: a reward model on preference pairs, and the reference model's log-probabilities of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from trainers.errors import DataError, ModelError
from trainers.evaluate.metrics import Rewards
from trainers.models.attention import shared_tokens
from trainers.models.layouts import layout_of
from trainers.models.memory import memory_named
from trainers.models.products import products_of
from trainers.models.reward_parts import RewardModule, log_prob_sums
from trainers.pairs.packing import MicroBatch, References, collate, scoring_groups
from trainers.pairs.tokens import TokenPair, with_rewritings

Report = Callable[[dict[str, Any]], None]


def scoring_batches(
    model: Any, pairs: Sequence[TokenPair], reference: References | None = None
) -> Iterator[MicroBatch]:
    """Yield micro-batches on the model's device, longest pairs first."""
    shared_length = shared_tokens(model)
    for group in scoring_groups(pairs):
        yield collate(
            group,
            layout=layout_of(model),
            shared_tokens=shared_length,
            reference=reference,
            device=str(model.device),
        )


def score_pairs(
    reward: RewardModule, pairs: Sequence[TokenPair], *, reference: References | None, report: Report
) -> tuple[Rewards, Rewards]:
    """Return the rewards of (chosen, rejected) responses in the order of `pairs`, float64.

    Raises ModelError where one is not finite: it would count as ranked wrong.
    """
    scores: dict[int, tuple[float, float]] = {}
    reward.eval()
    for batch in scoring_batches(reward.model, pairs, reference):
        # Not inference_mode: weights that ZeRO-3 gathers in it cannot be trained in the step after a validation.
        no_room = f"{batch.tokens} tokens do not fit in memory for scoring."
        with torch.no_grad(), products_of(reward.model), memory_named(no_room):
            found = reward(batch)
        both = zip(found.chosen_P.tolist(), found.rejected_P.tolist(), strict=True)
        scores.update(zip(batch.indices, both, strict=True))
        report({"done": len(scores), "total": len(pairs)})
    in_order = np.array([scores[pair.index] for pair in pairs], dtype=np.float64)
    if wrong := [pair.index for pair, two in zip(pairs, in_order, strict=True) if not np.isfinite(two).all()]:
        raise ModelError(
            f"rewards of {len(wrong)} of {len(pairs)} pairs are no finite numbers (row {wrong[0]} is the first); look for NaN in "
            "the model's weights, or give --precision fp32."
        )
    return in_order[:, 0], in_order[:, 1]


def compute_reference(model: Any, pairs: Sequence[TokenPair], *, report: Report) -> References:
    """Return the log-prob sums of both responses of each pair and rewriting under `model`, computed by the code that trains."""
    sums: References = {}
    pairs = list(with_rewritings(pairs))
    for batch in scoring_batches(model, pairs):
        no_room = f"{batch.tokens} tokens do not fit in memory for the reference."
        with torch.inference_mode(), products_of(model), memory_named(no_room):
            chosen, rejected = log_prob_sums(model, batch).double().cpu().chunk(2)
        sums.update(zip(batch.indices, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        report({"done": len(sums), "total": len(pairs)})
    return sums


def write_reference(reference: References, file: Path) -> None:
    """Write log-prob sums as parquet: index, chosen, rejected."""
    rows = [{"index": index, "chosen": sums[0], "rejected": sums[1]} for index, sums in reference.items()]
    rows.sort(key=lambda row: row["index"])
    parquet.write_table(pa.Table.from_pylist(rows), file)


def read_reference(file: Path, pairs: Sequence[TokenPair]) -> References:
    """Read what `write_reference` wrote. Raises DataError naming the pairs that are missing."""
    rows = parquet.read_table(file).to_pylist()
    reference = {row["index"]: (row["chosen"], row["rejected"]) for row in rows}
    missing = [pair.index for pair in with_rewritings(pairs) if pair.index not in reference]
    if missing:
        raise DataError(
            f"{file} has no reference log-probs for pairs {missing[:10]} ({len(missing)} in all)."
        )
    return reference
