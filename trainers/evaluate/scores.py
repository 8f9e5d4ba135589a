"""scores.parquet: one row per pair of an evaluation set. Importing this imports no torch, so that results load fast."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from trainers.evaluate.metrics import Rewards, summary

if TYPE_CHECKING:
    from trainers.pairs.tokens import TokenPair


def write_scores(
    file: Path, dataset: str, pairs: "Sequence[TokenPair]", chosen: Rewards, rejected: Rewards
) -> dict[str, float]:
    """Write per-pair rewards as parquet with the metrics in its metadata, and return the metrics."""
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
    """Rewards of a set's pairs, their rows in the source split, and by how many tokens the chosen response is longer."""

    chosen: Rewards
    rejected: Rewards
    index: NDArray[np.int64]
    longer: NDArray[np.int64]


def read_pair_scores(file: Path) -> PairScores:
    """Read everything that `write_scores` wrote of each pair."""
    names = ["chosen_reward", "rejected_reward", "index", "chosen_tokens", "rejected_tokens"]
    # A report reads thousands of small files: opened one by one, without threads, each takes a sixth of the time.
    with parquet.ParquetFile(file) as opened:
        table = opened.read(columns=names, use_threads=False)
    chosen, rejected, index, chosen_tokens, rejected_tokens = (table[name].to_numpy() for name in names)
    return PairScores(chosen=chosen, rejected=rejected, index=index, longer=chosen_tokens - rejected_tokens)
