"""Accuracy by epoch, where a sweep evaluates more than the last: one line per model, reward type and set."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from orchestrator.results import TrialResult

Accuracies = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRow:
    """Accuracy on one set after each epoch: one value per seed."""

    train_set: str
    model: str
    reward: str
    evaluation_set: str
    accuracy: dict[int, Accuracies]

    def texts(self, epochs: Sequence[int]) -> tuple[str, ...]:
        """The line as printed: means over seeds."""
        means = [
            f"{statistics.fmean(self.accuracy[epoch]):.3f}" if epoch in self.accuracy else "–"
            for epoch in epochs
        ]
        return (self.train_set, self.model, self.reward, self.evaluation_set, *means)


def epoch_rows(results: Sequence[TrialResult]) -> list[EpochRow]:
    """A row for every set of every group of seeds that is evaluated after several epochs; none where none is."""
    found: dict[tuple[str, str, str, str], dict[int, Accuracies]] = {}
    for result in results:
        record = result.record
        if len({item.epoch for item in record.evaluations}) < 2:
            continue
        for item in result.evaluations:
            line = (record.train_set, record.model, record.reward, item.dataset)
            epochs, epoch = found.setdefault(line, {}), item.epoch or 0
            epochs[epoch] = (*epochs.get(epoch, ()), item.metrics["accuracy"])
    return [
        EpochRow(
            train_set=train_set, model=model, reward=reward, evaluation_set=evaluation_set, accuracy=accuracy
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
