"""Scoring: a trained reward model on the pairs of an evaluation set, one reward per response."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from trainers.metrics import Rewards
from trainers.pairs import MicroBatch, TokenPair, collate

# Padded tokens per forward: enough to fill a core, little enough for full-vocabulary logits in fp32.
_TOKENS_PER_FORWARD = 2048


def scoring_batches(
    pairs: Sequence[TokenPair],
    *,
    pad_id: int,
    device: str = "cpu",
    reference: dict[int, tuple[float, float]] | None = None,
) -> Iterator[MicroBatch]:
    """Micro-batches of pairs of like length, longest first."""
    waiting = sorted(pairs, key=lambda pair: (-pair.longest, pair.index))
    while waiting:
        count = max(1, _TOKENS_PER_FORWARD // (2 * waiting[0].longest))
        yield collate(waiting[:count], pad_id=pad_id, reference=reference, device=device)
        waiting = waiting[count:]


def score_pairs(
    reward: nn.Module,
    pairs: Sequence[TokenPair],
    *,
    pad_id: int,
    device: str,
    reference: dict[int, tuple[float, float]] | None,
    report: Callable[[dict[str, Any]], None],
) -> tuple[Rewards, Rewards]:
    """Rewards of (chosen, rejected) responses in the order of `pairs`, float64."""
    scores: dict[int, tuple[float, float]] = {}
    reward.eval()
    for batch in scoring_batches(pairs, pad_id=pad_id, device=device, reference=reference):
        with torch.inference_mode():
            chosen, rejected = reward(batch)
        scores.update(zip(batch.indices, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        report({"done": len(scores), "total": len(pairs)})
    in_order = np.array([scores[pair.index] for pair in pairs], dtype=np.float64)
    return in_order[:, 0], in_order[:, 1]
