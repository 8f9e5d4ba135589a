"""The reference stage: log-prob sums of the untrained model on every pair, computed once per model and set."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet

from trainers.errors import DataError
from trainers.evaluate import scoring_batches
from trainers.memory import memory_named
from trainers.packing import References
from trainers.pairs import TokenPair
from trainers.scoring import log_prob_sums


def compute_reference(
    model: Any, pairs: Sequence[TokenPair], *, report: Callable[[dict[str, Any]], None]
) -> References:
    """Index of each pair → (chosen, rejected) log-prob sums under `model`; the trainer's own code and kernels."""
    sums: References = {}
    for batch in scoring_batches(model, pairs):
        with (
            torch.inference_mode(),
            memory_named(f"{batch.tokens} tokens do not fit in memory for the reference."),
        ):
            chosen, rejected = log_prob_sums(model, batch).double().cpu().chunk(2)
        sums.update(zip(batch.indices, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        report({"done": len(sums), "total": len(pairs)})
    return sums


def write_reference(reference: References, file: Path) -> None:
    """Write log-prob sums as parquet: index, chosen, rejected."""
    rows = sorted(reference.items())
    table = {
        "index": [index for index, _ in rows],
        "chosen": [chosen for _, (chosen, _) in rows],
        "rejected": [rejected for _, (_, rejected) in rows],
    }
    parquet.write_table(pa.table(table), file)


def read_reference(file: Path, pairs: Sequence[TokenPair]) -> References:
    """What `write_reference` wrote. Raises DataError naming the pairs that are missing."""
    rows = parquet.read_table(file).to_pylist()
    reference = {row["index"]: (row["chosen"], row["rejected"]) for row in rows}
    missing = [pair.index for pair in pairs if pair.index not in reference]
    if missing:
        raise DataError(
            f"{file} has no reference log-probs for pairs {missing[:10]} ({len(missing)} in all)."
        )
    return reference
