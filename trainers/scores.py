"""scores.parquet: one row per pair of an evaluation set. Imports no torch, so that results are read in no time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
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


def read_scores(file: Path) -> tuple[Rewards, Rewards]:
    """(chosen, rejected) rewards that `write_scores` wrote."""
    # A report reads thousands of small files: opened one by one, without threads, each takes a sixth of the time.
    with parquet.ParquetFile(file) as opened:
        table = opened.read(columns=["chosen_reward", "rejected_reward"], use_threads=False)
    return table["chosen_reward"].to_numpy(), table["rejected_reward"].to_numpy()
