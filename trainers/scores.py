"""scores.parquet: one row per pair of an evaluation set. Imports no torch, so that results are read in no time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from trainers.metrics import Rewards, summary

if TYPE_CHECKING:
    from trainers.pairs import TokenPair


def write_scores(
    file: Path, dataset: str, pairs: "Sequence[TokenPair]", chosen: Rewards, rejected: Rewards
) -> dict[str, float]:
    """Write per-pair rewards as parquet, one row per pair; the metrics, which stand in its metadata, too."""
    metrics = summary(chosen, rejected)
    table = pa.table(
        {
            "dataset": [dataset] * len(pairs),
            "index": [pair.index for pair in pairs],
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_tokens": [len(pair.chosen) for pair in pairs],
            "rejected_tokens": [len(pair.rejected) for pair in pairs],
        }
    )
    parquet.write_table(table.replace_schema_metadata({"metrics": json.dumps(metrics)}), file)
    return metrics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairScores:
    """Rewards of the pairs of a set; `index` is the pair's row in it."""

    index: NDArray[np.int64]
    chosen: Rewards
    rejected: Rewards


def read_pair_scores(file: Path) -> PairScores:
    """What `write_scores` wrote, pair by pair."""
    # A report reads thousands of small files: opened one by one, without threads, each takes a sixth of the time.
    with parquet.ParquetFile(file) as opened:
        table = opened.read(columns=["index", "chosen_reward", "rejected_reward"], use_threads=False)
    return PairScores(
        index=table["index"].to_numpy(),
        chosen=table["chosen_reward"].to_numpy(),
        rejected=table["rejected_reward"].to_numpy(),
    )


def read_scores(file: Path) -> tuple[Rewards, Rewards]:
    """(chosen, rejected) rewards that `write_scores` wrote."""
    scores = read_pair_scores(file)
    return scores.chosen, scores.rejected
