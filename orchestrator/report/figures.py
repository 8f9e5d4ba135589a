"""Every figure of a report: accuracy and its differences, margins, training.

Each function draws one matplotlib Figure from numbers, or returns None where there is nothing to draw.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.report import published
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
from orchestrator.report.scaling import draw_scaling
from orchestrator.report.statistics import Calibration, Estimate, Floats
from orchestrator.report.tables import MEAN, Table, reward_title
from orchestrator.store.records import CATEGORIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The width of a page, in inches at which its letters are as tall as the page's.
WIDE = 9.5
# The rows of each training's log, by training set, model, reward type and seed.
Curves = dict[tuple[str, str, str, int], list[dict[str, Any]]]


def _per_category(
    analysis: Analysis,
    ask: Callable[[Scope, str], Any],
    draw: "Callable[[Axes, str, Any], None]",
    finish: "Callable[[Axes], object]",
    height: float,
    kinds: Sequence[str],
    **more: Any,
) -> "Figure | None":
    """Draw a row of panels per training set and a column per category; None where there is nothing to draw.

    A panel is `finish`ed when all kinds are drawn.
    """
    found = {
        scope: {kind: item for kind in kinds if (item := ask(scope, kind)) is not None}
        for scope in analysis.categories()
    }
    known = {scope: items for scope, items in found.items() if items}
    if not known:
        return None
    train_sets = list(dict.fromkeys(scope.train_set for scope in known))
    categories = [name for name in CATEGORIES if any(scope.category == name for scope in known)]
    count, width = len(train_sets) * len(categories), max(3.1, WIDE / len(categories))
    figure, axes = panels(count, len(categories), width, height, **more)
    for axis in axes:
        axis.set_visible(False)
        # Shared axes are labelled in the last row only, where there may be no panel.
        axis.tick_params(labelbottom=True)
    shown = []
    for scope, items in known.items():
        axis = axes[train_sets.index(scope.train_set) * len(categories) + categories.index(scope.category)]
        axis.set_visible(True)
        axis.set_title(f"{scope.train_set}: {scope.category}")
        for kind, item in items.items():
            draw(axis, kind, item)
        finish(axis)
        shown.append(axis)
    legend(figure, shown)
    return figure


def _beside(number: int, of: int, width: float) -> float:
    """Return the offset of one reward type's bar or dot from the middle of all."""
    return (number - (of - 1) / 2) * width


def accuracy_bars(analysis: Analysis, scopes: Iterable[Scope]) -> "Figure | None":
    """Bars by category or set and reward type, mean over models; each model as a dot, the paper's means as diamonds."""
    scopes, rewards = list(scopes), analysis.rewards
    found = {(scope, kind): analysis.mean(scope, kind, "accuracy") for scope in scopes for kind in rewards}
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
    return textwrap.fill(name.replace("_", " "), 13, break_long_words=False, break_on_hyphens=False)


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
    style: dict[str, Any] = {
        "linestyle": "none",
        "markerfacecolor": "white",
        "markeredgecolor": "black",
        "zorder": 4,
    }
    for at, (scope, mean) in bars.items():
        if len(mean.models) > 1:
            places = at + width * 0.3 * np.linspace(-1, 1, len(mean.models))
            axis.plot(places, mean.by_model, marker="o", markersize=3, label="each model", **style)
        theirs = published.number(scope.train_set, scope.sets, kind, "accuracy")
        if theirs is not None and not scope.dataset:
            label = f"the paper's mean, {published.SOURCE}"
            axis.plot([at], [theirs], marker="D", markersize=5, label=label, **style)


def _win_rates(analysis: Analysis) -> "Figure | None":
    won = {
        f"{scope.train_set}: {scope.category}, {reward_title(other)}": (found, look(other, analysis.rewards))
        for scope in analysis.categories()
        for other in analysis.others
        if (found := analysis.win_rate(scope, other)).cells
    }
    if not won:
        return None
    figure, (axis,) = panels(1, 1, WIDE, 0.42 * len(won) + 0.8)
    ours, theirs = look(analysis.baseline, analysis.rewards), [drawn for _, drawn in won.values()]
    counts = np.array([[found.ahead, found.ties, found.behind] for found, _ in won.values()])
    parts: tuple[tuple[str, Any, Any], ...] = (
        (f"{reward_title(analysis.baseline)} ahead", ours.colour, ours.hatch),
        ("within one point", "#eeeeee", ""),
        ("the other ahead", [drawn.colour for drawn in theirs], [drawn.hatch for drawn in theirs]),
    )
    left = np.zeros(len(won))
    for (label, colour, hatch), of_part in zip(parts, counts.T, strict=True):
        shares = of_part / counts.sum(axis=1)
        style = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        drawn_bars = axis.barh(list(won), shares, left=left, label=label, **style)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        said = [str(count or "") for count in of_part]
        axis.bar_label(drawn_bars, said, label_type="center", fontsize=8, bbox=box)
        left = left + shares
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlim=(0, 1), xlabel="share of cells (model × seed × set); in the bars: how many")
    legend(figure, [axis])
    return figure


def _by_model(
    analysis: Analysis,
    names: Sequence[str],
    kinds: Sequence[str],
    ask: Callable[[Scope, str, str], Mean | None],
    label: Callable[[str], str],
    form: str,
    finish: "Callable[[Axes], object]",
) -> "Figure | None":
    """Dots with intervals and values, a row per name, a panel per category, a line per kind."""

    def means(scope: Scope, kind: str) -> dict[int, Estimate] | None:
        found = {row: ask(scope, name, kind) for row, name in enumerate(names)}
        return {row: mean.estimate for row, mean in found.items() if mean is not None} or None

    def draw(axis: "Axes", kind: str, rows: dict[int, Estimate]) -> None:
        style = {**line_style(kind, analysis.rewards), "linestyle": "none", "elinewidth": 1.2, "capsize": 2.5}
        shift = _beside(kinds.index(kind), len(kinds), 0.3)
        at, places = [value.value for value in rows.values()], [row + shift for row in rows]
        axis.errorbar(at, places, xerr=whiskers([*rows.values()]), label=label(kind), **style)
        for row, value in rows.items():
            place: dict[str, Any] = {
                "xytext": (0, 4),
                "textcoords": "offset points",
                "ha": "center",
                "fontsize": 7,
            }
            axis.annotate(f"{value.value:{form}}", (value.value, row + shift), **place)

    def named(axis: "Axes") -> None:
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        finish(axis)

    height = (0.2 + 0.14 * len(kinds)) * len(names) + 0.7
    return _per_category(analysis, means, draw, named, height, kinds, sharex=True)


def _accuracy_by_model(analysis: Analysis) -> "Figure | None":

    def ask(scope: Scope, model: str, kind: str) -> Mean | None:
        return analysis.mean(scope, kind, "accuracy", [model])

    def finish(axis: "Axes") -> None:
        axis.axvline(0.5, color=GREY, linewidth=0.9, linestyle=":")
        axis.set(xlim=(-0.04, 1.04), xlabel="accuracy")

    return _by_model(analysis, analysis.models, analysis.rewards, ask, reward_title, ".2f", finish)


def _differences(analysis: Analysis) -> "Figure | None":
    names = [*analysis.models, MEAN]

    def ask(scope: Scope, name: str, other: str) -> Mean | None:
        return analysis.difference(scope, "accuracy", None if name == MEAN else [name], other=other)

    def finish(axis: "Axes") -> None:
        axis.axvline(0, color=GREY, linewidth=1.0)
        axis.axhline(len(names) - 1.5, color=GREY, linewidth=0.6)
        axis.set_xlabel(f"right of 0: {reward_title(analysis.baseline)} ahead")

    return _by_model(analysis, names, analysis.others, ask, analysis.title, "+.2f", finish)


def _margins(analysis: Analysis) -> "Figure | None":
    edges = np.linspace(-4, 4, 49)

    def margins(scope: Scope, kind: str) -> Floats | None:
        found = analysis.margins(scope, kind, scaled=True)
        return found if len(found) else None

    def draw(axis: "Axes", kind: str, found: Floats) -> None:
        drawn, title = look(kind, analysis.rewards), reward_title(kind)
        heights, _ = np.histogram(np.clip(found, -4, 4), edges, density=True)
        axis.stairs(heights, edges, fill=True, color=drawn.colour, alpha=0.25)
        axis.stairs(heights, edges, color=drawn.colour, linewidth=1.5, linestyle=drawn.line, label=title)

    def finish(axis: "Axes") -> None:
        axis.axvline(0, color=GREY, linewidth=0.9, linestyle=":")
        axis.set(xlabel="margin / standard deviation of rewards", yticks=[])

    return _per_category(analysis, margins, draw, finish, 1.9, analysis.rewards)


def reliability(analysis: Analysis) -> "Figure | None":
    """Accuracy against confidence, ten bins of equally many pairs; each panel as wide as its confidences."""
    widest: dict[int, float] = {}

    def draw(axis: "Axes", kind: str, curve: Calibration) -> None:
        style = line_style(kind, analysis.rewards)
        axis.plot(curve.confidence, curve.accuracy, label=reward_title(kind), **style)
        widest[id(axis)] = max(widest.get(id(axis), 0.5), *curve.confidence)

    def finish(axis: "Axes") -> None:
        most = max(0.005, widest[id(axis)] - 0.5)
        axis.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.9, linestyle=":", zorder=1.9)
        axis.set(xlim=(0.5 - 0.04 * most, 0.5 + 1.04 * most), ylim=(-0.02, 1.02))
        axis.locator_params(axis="x", nbins=5)
        axis.set(xlabel="confidence σ(|margin|)", ylabel="share ranked right")

    return _per_category(analysis, analysis.calibration, draw, finish, 2.4, analysis.rewards)


def _training_curves(curves: Curves, rewards: Sequence[str]) -> "Figure | None":
    """Loss and accuracy by step: a thin line per training, a thick one for the median of a reward type."""
    known = {key: rows for key, rows in curves.items() if rows}
    train_sets = list(dict.fromkeys(train_set for train_set, *_ in known))
    if not train_sets:
        return None
    figure, axes = panels(2 * len(train_sets), 2, WIDE / 2, 2.2)
    wanted = [(name, metric) for name in train_sets for metric in ("loss", "accuracy")]
    for axis, (train_set, metric) in zip(axes, wanted, strict=True):
        for kind in rewards:
            lines = [
                (
                    np.array([row["step"] for row in rows]),
                    np.array([row.get(metric, math.nan) for row in rows]),
                )
                for key, rows in known.items()
                if (key[0], key[2]) == (train_set, kind)
            ]
            if lines:
                _median_curve(axis, lines, kind, rewards)
        axis.set(title=f"trained on {train_set}: {metric}", xlabel="optimiser step")
    legend(figure, axes)
    return figure


def _median_curve(
    axis: "Axes", lines: list[tuple[Floats, Floats]], kind: str, rewards: Sequence[str]
) -> None:
    style = line_style(kind, rewards)
    for steps, values in lines:
        axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.7)
    at = np.linspace(min(steps[0] for steps, _ in lines), max(steps[-1] for steps, _ in lines), 40)
    # A training that is still under way says nothing of later steps.
    drawn_to = np.array([np.interp(at, steps, values, right=math.nan) for steps, values in lines])
    known = ~np.isnan(drawn_to).all(axis=0)
    median = np.nanmedian(drawn_to[:, known], axis=0)
    axis.plot(at[known], median, linewidth=2.0, markevery=8, label=f"{reward_title(kind)}, median", **style)


def every_figure(analysis: Analysis, curves: Curves, by_axis: Sequence[Table] = ()) -> Iterator[DrawnFigure]:
    """Every figure for which there are numbers, in the report's order."""
    means = "Mean over models with its 95 % interval; each model beside it."
    paired = "Paired by seed and pair, with 95 % intervals; where one excludes 0, a type is ahead."
    by_model = "Mean over seeds, with 95 % intervals."
    margins = "Of every pair, model and seed; what lies beyond ±4 stands at the edge."
    sure = "On the dotted line confidence and accuracy agree; below it the model is too sure."
    fitted = "Fitted lines with 95 % intervals; a point is a model."
    curved = "On the training pairs: a thin line per training, a thick one for their median."
    bars, rewards = partial(accuracy_bars, analysis), analysis.rewards
    wanted: tuple[tuple[str, str, str, Callable[[], Figure | None]], ...] = (
        ("accuracy_by_category", "Accuracy by category", means, lambda: bars(analysis.categories())),
        ("differences", "Differences by model", paired, lambda: _differences(analysis)),
        ("accuracy_by_set", "Accuracy by evaluation set", means, lambda: bars(analysis.single_sets())),
        ("win_rates", "Win-rate", "Cells in which a type is ahead.", lambda: _win_rates(analysis)),
        ("accuracy_by_model", "Accuracy by model", by_model, lambda: _accuracy_by_model(analysis)),
        ("margins", "Margins", margins, lambda: _margins(analysis)),
        ("reliability", "Reliability", sure, lambda: reliability(analysis)),
        *((item.name, item.title, item.note, partial(draw_axis, item)) for item in by_axis),
        ("scaling", "Over size", fitted, lambda: draw_scaling(analysis)),
        ("training_curves", "Training curves", curved, lambda: _training_curves(curves, rewards)),
    )
    for name, title, caption, draw in wanted:
        if drawn := rendered(name, title, caption, draw):
            yield drawn
