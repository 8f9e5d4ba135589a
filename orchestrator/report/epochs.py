"""Accuracy by epoch, where a sweep evaluates more than the last: one line per model, reward type and set."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from orchestrator.report.results import TrialResult

Accuracies = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRow:
    """Accuracy on one set after each epoch: one value for each of `seeds` that is there."""

    train_set: str
    model: str
    reward: str
    evaluation_set: str
    accuracy: dict[int, Accuracies]
    seeds: int

    def texts(self, epochs: Sequence[int]) -> tuple[str, ...]:
        """The line as printed: means over seeds, and how many are missing."""
        return (self.train_set, self.model, self.reward, self.evaluation_set, *map(self._text, epochs))

    def _text(self, epoch: int) -> str:
        found = self.accuracy.get(epoch)
        if not found:
            return "–"
        missing = self.seeds - len(found)
        return f"{statistics.fmean(found):.3f}" + (f", {missing} missing" if missing else "")


def epoch_rows(results: Sequence[TrialResult]) -> list[EpochRow]:
    """A row for every set of every group of seeds that is evaluated after several epochs; none where none is.

    What did not learn by its last epoch is in none.
    """
    found: dict[tuple[str, str, str, str], dict[int, Accuracies]] = {}
    seeds: Counter[tuple[str, str, str]] = Counter()
    for result in results:
        record = result.record
        if len({item.epoch for item in record.evaluations}) < 2 or (result.trained and not result.learned):
            continue
        seeds[record.train_set, record.model, record.reward] += 1
        for item in result.evaluations:
            line = (record.train_set, record.model, record.reward, item.dataset)
            epochs, epoch = found.setdefault(line, {}), item.epoch or 0
            epochs[epoch] = (*epochs.get(epoch, ()), item.metrics["accuracy"])
    return [
        EpochRow(
            train_set=train_set,
            model=model,
            reward=reward,
            evaluation_set=evaluation_set,
            accuracy=accuracy,
            seeds=seeds[train_set, model, reward],
        )
        for (train_set, model, reward, evaluation_set), accuracy in found.items()
    ]


def epoch_table(rows: Sequence[EpochRow], most: int = 8) -> Table:
    """For a terminal: `most` of the epochs, evenly spaced, the first and the last among them."""
    epochs = _epochs(rows)
    if len(epochs) > most:
        epochs = [epochs[round(place * (len(epochs) - 1) / (most - 1))] for place in range(most)]
    table = Table(title="accuracy by epoch", title_justify="left")
    for name in _LABELS:
        table.add_column(name, overflow="fold")
    for epoch in epochs:
        table.add_column(str(epoch), justify="right")
    for row in rows:
        table.add_row(*row.texts(epochs))
    return table


def epoch_lines(rows: Sequence[EpochRow]) -> list[str]:
    """The section of the report, every epoch in it; nothing where there are no rows."""
    if not rows:
        return []
    epochs = _epochs(rows)
    lines = [(*_LABELS, *map(str, epochs)), ("---",) * (len(_LABELS) + len(epochs))]
    lines += [row.texts(epochs) for row in rows]
    return [
        "",
        "Accuracy after each epoch, mean over seeds:",
        "",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


_LABELS = ("trained on", "model", "reward", "evaluated on")


def _epochs(rows: Sequence[EpochRow]) -> list[int]:
    return sorted({epoch for row in rows for epoch in row.accuracy})
