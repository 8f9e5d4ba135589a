"""Figures of accuracy, its differences and win-rates: by category, by evaluation set, by model.

Each function draws one matplotlib Figure from an Analysis, or returns None where there is nothing to draw.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.report import published
from orchestrator.report.comparison import Analysis
from orchestrator.report.house_style import GREY, category_panels, legend, look, panels, whiskers, wrapped
from orchestrator.report.scopes import Scope
from orchestrator.report.statistics import Estimate
from orchestrator.report.summary import COMPARED, reward_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy_by_category(analysis: Analysis) -> "Figure | None":
    """Bars by category and reward type, mean over models; the paper's means as diamonds."""
    return _accuracy_bars(analysis, list(analysis.categories()), lambda scope: scope.category)


def accuracy_by_set(analysis: Analysis) -> "Figure | None":
    """Bars by evaluation set, Spanish beside French."""
    return _accuracy_bars(analysis, list(analysis.single_sets()), lambda scope: scope.dataset)


def _accuracy_bars(
    analysis: Analysis, scopes: Sequence[Scope], label: Callable[[Scope], str]
) -> "Figure | None":
    found = {
        (scope, kind): mean.estimate
        for scope in scopes
        for kind in analysis.rewards
        if (mean := analysis.mean_of_models(scope, kind, "accuracy")) is not None
    }
    train_sets = [name for name in analysis.train_sets if any(scope.train_set == name for scope, _ in found)]
    if not train_sets:
        return None
    widest = max(sum(scope.train_set == name for scope in scopes) for name in train_sets)
    figure, axes = panels(len(train_sets), 1, max(5.0, 1.15 * widest + 1.5), 2.5)
    for axis, train_set in zip(axes, train_sets, strict=True):
        here = [scope for scope in scopes if scope.train_set == train_set]
        for number, kind in enumerate(analysis.rewards):
            _bars(axis, analysis, here, found, kind, number)
        axis.axhline(0.5, color=GREY, linewidth=0.9, linestyle=":")
        axis.set_xticks(range(len(here)), [wrapped(label(scope)) for scope in here])
        axis.set_ylim(0, 1.05)
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("accuracy")
        axis.set_title(f"trained on {train_set} (dotted: chance)")
    legend(figure, axes)
    return figure


def _bars(
    axis: "Axes",
    analysis: Analysis,
    scopes: Sequence[Scope],
    found: dict[tuple[Scope, str], Estimate],
    kind: str,
    number: int,
) -> None:
    drawn = look(kind, analysis.rewards)
    width = 0.8 / len(analysis.rewards)
    places = [place for place, scope in enumerate(scopes) if (scope, kind) in found]
    values = [found[scopes[place], kind] for place in places]
    at = [place + (number - (len(analysis.rewards) - 1) / 2) * width for place in places]
    axis.bar(
        at,
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
    quoted = {
        where: value
        for where, place in zip(at, places, strict=True)
        if (scope := scopes[place])
        and not scope.dataset
        and (value := published.number(scope.train_set, scope.sets, kind, "accuracy")) is not None
    }
    if quoted:
        axis.plot(
            list(quoted),
            list(quoted.values()),
            linestyle="none",
            marker="D",
            markersize=5,
            markerfacecolor="white",
            markeredgecolor="black",
            label=f"the paper's mean, {published.SOURCE}",
            zorder=5,
        )


def win_rates(analysis: Analysis) -> "Figure | None":
    """Stacked bars: EX-RM ahead, tied, IM-RM ahead."""
    if not analysis.both:
        return None
    won = {scope: found for scope in analysis.categories() if (found := analysis.win_rate(scope)).cells}
    if not won:
        return None
    figure, (axis,) = panels(1, 1, 6.6, 0.42 * len(won) + 0.8)
    names = [f"{scope.train_set}: {scope.category}" for scope in won]
    explicit, implicit = (look(kind, analysis.rewards) for kind in COMPARED)
    parts = (
        ("EX-RM ahead", explicit.colour, explicit.hatch, [found.ahead for found in won.values()]),
        ("within one point", "#eeeeee", "", [found.ties for found in won.values()]),
        ("IM-RM ahead", implicit.colour, implicit.hatch, [found.behind for found in won.values()]),
    )
    left = np.zeros(len(won))
    cells = np.array([found.cells for found in won.values()])
    for label, colour, hatch, counts in parts:
        shares = np.array(counts) / cells
        axis.barh(
            names, shares, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, label=label
        )
        for row, (share, count) in enumerate(zip(shares, counts, strict=True)):
            if count:
                axis.text(
                    left[row] + share / 2,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
                )
        left = left + shares
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of cells (model × seed × set); in the bars: how many")
    legend(figure, [axis])
    return figure


def accuracy_by_model(analysis: Analysis) -> "Figure | None":
    """Dots with intervals, one row per model, a panel per category."""
    found = {
        (scope, model, kind): mean.estimate
        for scope in analysis.categories()
        for model in analysis.models
        for kind in analysis.rewards
        if (mean := analysis.mean(scope, model, kind, "accuracy")) is not None
    }
    grid = category_panels(
        analysis, {scope for scope, _, _ in found}, 0.32 * len(analysis.models) + 0.7, sharex=True
    )
    if grid is None:
        return None
    figure, axes = grid
    for scope, axis in axes.items():
        for number, kind in enumerate(analysis.rewards):
            shift = (number - (len(analysis.rewards) - 1) / 2) * 0.3
            rows = [row for row, model in enumerate(analysis.models) if (scope, model, kind) in found]
            _dots(
                axis,
                [found[scope, analysis.models[row], kind] for row in rows],
                [row + shift for row in rows],
                analysis,
                kind,
            )
        axis.axvline(0.5, color=GREY, linewidth=0.9, linestyle=":")
        _model_rows(axis, analysis)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("accuracy")
    legend(figure, axes.values())
    return figure


def _dots(
    axis: "Axes", values: Sequence[Estimate], at: Sequence[float], analysis: Analysis, kind: str
) -> None:
    if not values:
        return
    drawn = look(kind, analysis.rewards)
    axis.errorbar(
        [value.value for value in values],
        at,
        xerr=whiskers(values),
        linestyle="none",
        color=drawn.colour,
        marker=drawn.marker,
        markersize=5,
        markeredgecolor="black",
        markeredgewidth=0.5,
        elinewidth=1.2,
        capsize=2,
        label=reward_title(kind),
    )


def _model_rows(axis: "Axes", analysis: Analysis) -> None:
    axis.set_yticks(range(len(analysis.models)), analysis.models)
    axis.set_ylim(len(analysis.models) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def differences(analysis: Analysis) -> "Figure | None":
    """EX−IM with intervals, one row per model and their mean, a panel per category."""
    choices = [*((model, [model]) for model in analysis.models), ("mean", None)]
    found = {
        (scope, row): item.estimate
        for scope in analysis.categories()
        for row, (_, models) in enumerate(choices)
        if (item := analysis.difference(scope, "accuracy", models)) is not None
    }
    grid = category_panels(analysis, {scope for scope, _ in found}, 0.3 * len(choices) + 0.7, sharex=True)
    if grid is None:
        return None
    figure, axes = grid
    for scope, axis in axes.items():
        for row in range(len(choices)):
            if (scope, row) not in found:
                continue
            value, mean = found[scope, row], row == len(choices) - 1
            axis.errorbar(
                [value.value],
                [row],
                xerr=whiskers([value]),
                color="black",
                marker="D" if mean else "o",
                markersize=6 if mean else 4.5,
                markerfacecolor="black" if mean else "white",
                elinewidth=1.6 if mean else 1.0,
                capsize=2.5,
            )
        axis.axvline(0, color=GREY, linewidth=1.0)
        axis.set_yticks(range(len(choices)), [name for name, _ in choices])
        axis.set_ylim(len(choices) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("EX−IM (right of 0: EX-RM ahead)")
    return figure
