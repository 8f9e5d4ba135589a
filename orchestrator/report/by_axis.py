"""Accuracy at each value of an axis and after each epoch, and which value is the best on held-out training pairs.

A trial that does not read the axis is shown at every value.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.report.comparison import Analysis, Scope
from orchestrator.report.house_style import draw_lines, legend
from orchestrator.report.results import TrialResult
from orchestrator.report.tables import Table, Value, number_of, reward_title
from orchestrator.spec.axes import in_a_name, shown
from orchestrator.store.records import TrialRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def axes_of(trials: Sequence[TrialRecord]) -> dict[str, list[str]]:
    """Return the values of each axis that has several values; numbers are sorted."""
    found: dict[str, dict[str, None]] = {}
    for trial in trials:
        for axis, value in trial.axes.items():
            found.setdefault(axis, {})[shown(value)] = None
    return {
        axis: sorted(values, key=float) if all(map(_is_number, values)) else [*values]
        for axis, values in found.items()
        if len(values) > 1
    }


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", value) is not None


def axis_tables(analysis: Analysis) -> Iterator[Table]:
    """Yield a table for each axis, and for epochs: accuracies and differences by training set, category, reward type and value."""
    for axis, values in axes_of([result.record for result in analysis.results]).items():
        yield _axis_table(
            analysis, axis, {value: Analysis([*at_value(analysis.results, axis, value)]) for value in values}
        )
    kept = [item for item in analysis.results if len({one.epoch for one in item.record.evaluations}) > 1]
    epochs = sorted({one.epoch or 0 for item in kept for one in item.record.evaluations})
    if epochs:
        first = analysis.baseline if any(item.record.reward == analysis.baseline for item in kept) else None
        after = {str(epoch): [_after(item, epoch) for item in kept] for epoch in epochs}
        at_epoch = {epoch: Analysis(here, first) for epoch, here in after.items()}
        yield _axis_table(Analysis(kept, first), "epoch", at_epoch)


def _axis_table(analysis: Analysis, axis: str, at: Mapping[str, Analysis]) -> Table:
    records = [result.record for result in analysis.results]
    first = [reward_without(record, axis) for record in records if record.reward == analysis.baseline]
    kinds = [*dict.fromkeys([*first, *(kind for here in at.values() for kind in here.rewards)])]
    rows: list[dict[str, Value]] = [
        {
            "train_set": scope.train_set,
            "category": scope.category,
            "reward": reward_title(kind),
            axis: value,
            **_numbers(here, scope, kind, kinds[0]),
        }
        for scope in analysis.categories()
        for kind in kinds
        for value, here in at.items()
        if kind in here.rewards
    ]
    held_out = ["held_out"] if any(row.get("held_out") is not None for row in rows) else []
    note = "Means over the models that have every reward type at a value; differences at it."
    return Table(
        name=f"by_{axis}",
        title=f"Accuracy by {axis}",
        note=" ".join([note, *_best(axis, at)]),
        columns=" ".join(("train_set category reward", axis, "accuracy difference", *held_out, "over")),
        titles={
            axis: axis,
            "difference": f"{reward_title(kinds[0])} − it",
            "held_out": "on held-out pairs",
            "over": "interval of accuracy over",
        },
        rows=rows,
        forms={"difference": "+.3f"},
    )


def _after(result: TrialResult, epoch: int) -> TrialResult:
    """Return the trial as if it were evaluated after that epoch only."""
    wanted = tuple(item for item in result.record.evaluations if (item.epoch or 0) == epoch)
    found = tuple(item for item in result.evaluations if (item.epoch or 0) == epoch)
    # The accuracy on held-out pairs is known after the last epoch.
    held_out = result.validation_accuracy if epoch == (result.last_epoch or 0) else None
    record = replace(result.record, evaluations=wanted)
    return replace(result, record=record, evaluations=found, validation_accuracy=held_out)


def at_value(results: Sequence[TrialResult], axis: str, value: str) -> Iterator[TrialResult]:
    """Yield the trials at a value; their reward types no longer name the axis."""
    for result in results:
        record = result.record
        if axis not in record.axes or shown(record.axes[axis]) == value:
            yield replace(result, record=replace(record, reward=reward_without(record, axis)))


def reward_without(record: TrialRecord, *axes: str) -> str:
    """Return the reward type's name without these axes; axes stand at the end of the name."""
    named = {name: in_a_name(name, value) for name, value in record.axes.items()}
    plain = record.reward.removesuffix("".join(named.values()))
    return plain + "".join(text for name, text in named.items() if name not in axes)


def _numbers(here: Analysis, scope: Scope, kind: str, baseline: str) -> dict[str, Value]:
    mean = here.mean(scope, kind, "accuracy")
    if mean is None:
        return {"over": "no trial that counts"}
    gap = here.difference(scope, "accuracy", baseline=baseline, other=kind) if kind != baseline else None
    trials = (trial for seeds in mean.cells.values() for (trial,) in seeds.values())
    found = [trial.validation_accuracy for trial in trials]
    known = [accuracy for accuracy in found if accuracy is not None]
    return {
        "accuracy": mean.estimate,
        "difference": gap.estimate if gap else None,
        "held_out": float(np.mean(known)) if len(known) == len(found) else None,
        "over": mean.over,
    }


def _best(axis: str, at: Mapping[str, Analysis]) -> Iterator[str]:
    """Say which value ranks the most held-out training pairs right; one that lacks a model and seed, as where it diverged, is never named."""
    found: dict[tuple[str, str], dict[str, dict[tuple[str, int], float]]] = {}
    for value, here in at.items():
        for result in here.results:
            record, accuracy = result.record, result.validation_accuracy
            if axis in record.axes and accuracy is not None:
                values = found.setdefault((record.train_set, record.reward), {})
                values.setdefault(value, {})[record.model, record.seed] = accuracy
    for (train_set, kind), values in found.items():
        every = set().union(*values.values())
        means = {
            value: float(np.mean([*cells.values()]))
            for value, cells in values.items()
            if cells.keys() == every
        }
        if len(means) > 1:
            best = [value for value, mean in means.items() if np.isclose(mean, max(means.values()))]
            without = [value for value in at if value not in means]
            incomplete = f"; not complete at {', '.join(without)}" if without else ""
            yield (
                f"Best by held-out pairs, trained on {train_set}: {reward_title(kind)} at {axis} {' or '.join(best)} "
                f"({max(means.values()):.3f}; mean over {number_of(len(every), 'training')}{incomplete})."
            )


def draw_axis(table: Table) -> "Figure | None":
    """Draw accuracy against a numeric axis, a panel per training set and category; None for other axes."""
    axis = table.names[3]
    found = {str(row[axis]) for row in table.rows}
    if not all(map(_is_number, found)) or not any("accuracy" in row for row in table.rows):
        return None
    rows = [{**row, axis: float(str(row[axis]))} for row in table.rows if "accuracy" in row]
    figure, panels = draw_lines(rows, ("train_set", "category"), axis, "accuracy")
    values = [*map(float, found)]
    for panel in panels.values():
        wide = min(values) > 0 and max(values) > 20 * min(values)
        panel.set(xlabel=axis, xscale="log" if wide else "linear")
    legend(figure, panels.values())
    return figure
