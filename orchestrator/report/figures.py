"""Every figure of a report: accuracies and their differences.

Each function draws one matplotlib Figure from numbers, or returns None where there is nothing to draw.
"""

import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.report.by_axis import draw_axis
from orchestrator.report.comparison import Analysis, Mean, Scope
from orchestrator.report.house_style import (
    GREY,
    DrawnFigure,
    legend,
    line_style,
    look,
    panels,
    rendered,
    whiskers,
)
from orchestrator.report.tables import MEAN, Table, reward_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The width of a page, in inches at which its letters are as tall as the page's.
WIDE = 9.5


def accuracy_bars(analysis: Analysis, scopes: Iterable[Scope]) -> "Figure | None":
    """Bars by category or set and reward type, mean over models; each model as a dot."""
    scopes, rewards = list(scopes), analysis.rewards
    found = {
        (scope, kind): analysis.mean_of_models(scope, kind, "accuracy")
        for scope in scopes
        for kind in rewards
    }
    by_set: dict[str, list[Scope]] = {}
    for scope in scopes:
        if any(found[scope, kind] for kind in rewards):
            by_set.setdefault(scope.train_set, []).append(scope)
    if not by_set:
        return None
    figure, axes = panels(len(by_set), 1, max(WIDE, 1.15 * max(map(len, by_set.values())) + 1.5), 2.5)
    for axis, (train_set, here) in zip(axes, by_set.items(), strict=True):
        for kind in rewards:
            _bars(axis, [(scope, found[scope, kind]) for scope in here], kind, rewards)
        axis.axhline(0.5, color=GREY, linewidth=0.9, linestyle=":")
        axis.set_xticks(range(len(here)), [_short(scope.dataset or scope.category) for scope in here])
        axis.set(ylim=(0, 1.18), yticks=np.linspace(0, 1, 6), ylabel="accuracy")
        axis.grid(axis="x", visible=False)
        axis.set_title(f"trained on {train_set} (dotted: chance)")
    legend(figure, axes)
    return figure


def _short(name: str) -> str:
    return textwrap.fill(name.replace("_", " "), 13)


def _bars(
    axis: "Axes", found: Sequence[tuple[Scope, Mean | None]], kind: str, rewards: Sequence[str]
) -> None:
    drawn, width = look(kind, rewards), 0.8 / len(rewards)
    shift = _beside(rewards.index(kind), len(rewards), width)
    bars = {place + shift: (scope, mean) for place, (scope, mean) in enumerate(found) if mean}
    values = [mean.estimate for _, mean in bars.values()]
    drawn_bars = axis.bar(
        list(bars),
        [value.value for value in values],
        width * 0.92,
        color=drawn.colour,
        edgecolor="black",
        linewidth=0.6,
        hatch=drawn.hatch,
        yerr=whiskers(values),
        error_kw={"elinewidth": 1.1, "capsize": 2.5, "ecolor": "black"},
        label=reward_title(kind),
    )
    # A bar of 0 would look like one that is not there.
    axis.bar_label(drawn_bars, fmt="%.2f", fontsize=7.5, padding=2)
    for at, (_, mean) in bars.items():
        if len(mean.models) > 1:
            places = at + width * 0.3 * np.linspace(-1, 1, len(mean.models))
            axis.plot(
                places, mean.by_model, "o", mfc="white", mec="black", ms=3, zorder=4, label="each model"
            )


def _beside(number: int, of: int, width: float) -> float:
    """Return the offset of one reward type's bar or dot from the middle of all."""
    return (number - (of - 1) / 2) * width


def _differences(analysis: Analysis) -> "Figure | None":
    """Dots with intervals and values: a row per model and one of their mean, a panel per category."""
    names, others = [*analysis.models, MEAN], analysis.others
    found = {
        scope: {
            (row, other): mean.estimate
            for (row, name), other in itertools.product(enumerate(names), others)
            if (mean := _difference(analysis, scope, name, other))
        }
        for scope in analysis.categories()
    }
    known = {scope: values for scope, values in found.items() if values}
    if not known:
        return None
    height = (0.2 + 0.14 * len(others)) * len(names) + 0.7
    figure, axes = panels(len(known), 3, WIDE / 3, height)
    for axis, (scope, estimates) in zip(axes, known.items(), strict=True):
        for number, other in enumerate(others):
            shift = _beside(number, len(others), 0.3)
            rows = {row + shift: value for (row, kind), value in estimates.items() if kind == other}
            if rows:
                style = {**line_style(other, analysis.rewards), "linestyle": "none", "capsize": 2.5}
                values, label = list(rows.values()), analysis.title(other)
                at = [value.value for value in values]
                axis.errorbar(at, list(rows), xerr=whiskers(values), label=label, **style)
            for row, value in rows.items():
                place: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{value.value:+.2f}", (value.value, row), fontsize=7, **place)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.axvline(0, color=GREY, linewidth=1.0)
        axis.axhline(len(names) - 1.5, color=GREY, linewidth=0.6)
        axis.set_title(f"{scope.train_set}: {scope.category}")
        axis.set_xlabel(f"right of 0: {reward_title(analysis.baseline)} ahead")
    legend(figure, axes)
    return figure


def _difference(analysis: Analysis, scope: Scope, name: str, other: str) -> Mean | None:
    return analysis.difference(scope, "accuracy", None if name == MEAN else [name], other=other)


def every_figure(analysis: Analysis, by_axis: Sequence[Table] = ()) -> Iterator[DrawnFigure]:
    """Every figure for which there are numbers, in the report's order."""
    means = "Mean over models with its 95 % interval; each model beside it."
    paired = "Paired by seed and pair, with 95 % intervals; where one excludes 0, a type is ahead."
    bars = partial(accuracy_bars, analysis)
    wanted: tuple[tuple[str, str, str, Callable[[], Figure | None]], ...] = (
        ("accuracy_by_category", "Accuracy by category", means, lambda: bars(analysis.categories())),
        ("differences", "Differences by model", paired, lambda: _differences(analysis)),
        ("accuracy_by_set", "Accuracy by evaluation set", means, lambda: bars(analysis.single_sets())),
        *((item.name, item.title, item.note, partial(draw_axis, item)) for item in by_axis),
    )
    for name, title, caption, draw in wanted:
        if drawn := rendered(name, title, caption, draw):
            yield drawn
