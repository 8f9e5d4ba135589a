"""scores.parquet: one row per pair of an evaluation set. Importing this imports no torch, so that results load fast."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from trainers.data.records import Candidates
from trainers.evaluate.metrics import Ensemble, Rewards, summary
from trainers.evaluate.suites import suite_numbers

if TYPE_CHECKING:
    from trainers.pairs.tokens import TokenPair

SUITE_SCORE = "suite/score"
_PLACE = ("item", "number", "subset", "group", "chosen", "rejected")


def write_scores(
    file: Path,
    dataset: str,
    pairs: "Sequence[TokenPair]",
    chosen: Rewards,
    rejected: Rewards,
    places: Sequence[Candidates] = (),
    together: Ensemble | None = None,
) -> dict[str, float]:
    """Write per-pair rewards as parquet with the metrics in its metadata, and return the metrics.

    With `places`, the pairs are a suite's: each row also says which of the answers to which prompt it holds, and the
    suite's numbers stand in the metadata under "suite". `together` adds the spreads of several models.
    """
    metrics = summary(chosen, rejected) | (together.summary if together else {})
    suite = suite_numbers(places, chosen, rejected) if places else {}
    table = pa.table(
        {
            "dataset": [dataset] * len(pairs),
            "index": [pair.index for pair in pairs],
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_tokens": [len(pair.scored[0]) for pair in pairs],
            "rejected_tokens": [len(pair.scored[1]) for pair in pairs],
            **(together.spreads if together else {}),
            **{name: [getattr(place, name) for place in places] for name in _PLACE if places},
        }
    )
    noted = {"metrics": json.dumps(metrics), **({"suite": json.dumps(suite)} if suite else {})}
    parquet.write_table(table.replace_schema_metadata(noted), file)
    return metrics | {f"suite/{name}": value for name, value in suite.items()}


def write_places(file: Path, places: Iterable[Candidates | None]) -> None:
    """Write the places of a suite's pairs; no file where the pairs are no suite's."""
    if rows := [place for place in places if place]:
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def read_places(file: Path) -> list[Candidates]:
    """Read what `write_places` wrote; nothing where it wrote no file."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else ()
    return [Candidates(*row) for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairScores:
    """Rewards of a set's pairs, their rows in the source split, and by how many tokens the chosen response is longer.

    `suite` holds a suite's numbers ("suite/score", "suite/section/chat", …), `prompts` the number of each pair's prompt, None
    where each has one of its own.
    """

    chosen: Rewards
    rejected: Rewards
    index: NDArray[np.int64]
    longer: NDArray[np.int64]
    suite: dict[str, float] = field(default_factory=dict)
    prompts: NDArray[np.int64] | None = None

    @property
    def units(self) -> NDArray[np.int64]:
        """The number of each pair's independent unit: its prompt, or the pair where each has a prompt of its own."""
        return self.index if self.prompts is None else self.prompts


def read_pair_scores(file: Path) -> PairScores:
    """Read everything that `write_scores` wrote of each pair."""
    names = ["chosen_reward", "rejected_reward", "index", "chosen_tokens", "rejected_tokens"]
    # A report reads thousands of small files: opened one by one, without threads, each takes a sixth of the time.
    with parquet.ParquetFile(file) as opened:
        of_suite = "number" in opened.schema_arrow.names
        table = opened.read(columns=[*names, *(["number"] if of_suite else [])], use_threads=False)
    chosen, rejected, index, chosen_tokens, rejected_tokens = (table[name].to_numpy() for name in names)
    suite = json.loads((table.schema.metadata or {}).get(b"suite", b"{}"))
    return PairScores(
        chosen=chosen,
        rejected=rejected,
        index=index,
        longer=chosen_tokens - rejected_tokens,
        suite={f"suite/{name}": value for name, value in suite.items()},
        prompts=table["number"].to_numpy() if of_suite else None,
    )
