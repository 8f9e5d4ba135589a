"""Curves of a training in the view: which of its steps are shown, and the rows of one that is still running."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from pyarrow import parquet

from orchestrator.store.artifacts import Store
from trainers.errors import Damaged
from trainers.storage import Location, matching

CURVES = ("loss", "accuracy", "margin", "grad_norm", "lr")
CURVE_POINTS = 100

logger = logging.getLogger(__name__)


def curve_rows(store: Store, key: str) -> list[dict[str, Any]]:
    """The shown rows of a training's log, or of its last complete checkpoint while there is no artifact.

    None of them where the log is damaged: a training is not done again for the sake of its curve.
    """
    if store.complete("train", key):
        try:
            rows = parquet.read_table(store.read_file("train", key, "log.parquet")).to_pylist()
        except Damaged as error:
            logger.warning("%s; its curve is left out", error)
            return []
        return thinned(rows, len(rows), CURVE_POINTS)
    rows, total = _checkpointed(store.root / "checkpoints" / key)
    return thinned(rows, total, CURVE_POINTS)


def thinned(rows: Sequence[dict[str, Any]], total: int, points: int) -> list[dict[str, Any]]:
    """The rows of at most `points` of `total` steps, evenly spread from 1 to `total`.

    Which steps these are depends on nothing else, so that what is shown early is shown at the end as well.
    """
    if total <= points:
        return list(rows)
    wanted = {1 + round(i * (total - 1) / (points - 1)) for i in range(points)}
    return [row for row in rows if int(row["step"]) in wanted]


def _checkpointed(folder: Location) -> tuple[list[dict[str, Any]], int]:
    """Rows and total number of steps in the marker with the highest step; a half-written or foreign file is none."""
    best: tuple[int, list[dict[str, Any]], int] = (0, [], 0)
    for file in matching(folder, "*.json"):
        try:
            marker = json.loads(file.read_text())
            step, total = int(marker["step"]), int(marker["total"])
            rows = [_row(row) for row in marker["log"]]
        # A training that goes on removes and replaces its markers meanwhile.
        except (OSError, ValueError, KeyError, TypeError):
            continue
        best = max(best, (step, rows, total), key=lambda item: item[0])
    return best[1], best[2]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """What a curve needs of a row; raises KeyError, ValueError or TypeError where it is no row of a log."""
    values = {name: float(row.get(name, math.nan)) for name in CURVES}
    return {"step": int(row["step"]), "time": float(row["time"]), **values}
