"""Figures of training: its curves, and the learning dynamics that explain them (the reference's §5).

Each function draws one matplotlib Figure from rows of numbers, or returns None where there is nothing to draw.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.report.house_style import GREY, legend, look, panels
from orchestrator.report.statistics import Floats
from orchestrator.report.summary import reward_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[tuple[str, str, str, int], list[dict[str, Any]]]


def training_curves(curves: Curves, rewards: Sequence[str]) -> "Figure | None":
    """Loss and accuracy by step: a thin line per training, a thick one for the median of a reward type."""
    known = {key: rows for key, rows in curves.items() if rows}
    train_sets = list(dict.fromkeys(train_set for train_set, *_ in known))
    if not train_sets:
        return None
    figure, axes = panels(len(train_sets), 2, 3.9, 2.2)
    for number, (train_set, metric) in enumerate(
        (name, metric) for name in train_sets for metric in ("loss", "accuracy")
    ):
        axis = axes[number]
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
                _curves(axis, lines, kind, rewards)
        axis.set_title(f"trained on {train_set}: {metric}")
        axis.set_xlabel("optimiser step")
    legend(figure, axes)
    return figure


def _curves(axis: "Axes", lines: list[tuple[Floats, Floats]], kind: str, rewards: Sequence[str]) -> None:
    drawn = look(kind, rewards)
    for steps, values in lines:
        axis.plot(steps, values, color=drawn.colour, alpha=0.25, linewidth=0.7)
    last = max(steps[-1] for steps, _ in lines)
    at = np.linspace(min(steps[0] for steps, _ in lines), last, 60)
    # A training that is still under way says nothing of later steps.
    drawn_to = [np.interp(at, steps, _smooth(values), right=math.nan) for steps, values in lines]
    known = ~np.isnan(drawn_to).all(axis=0)
    median = np.nanmedian(np.array(drawn_to)[:, known], axis=0)
    axis.plot(
        at[known],
        median,
        color=drawn.colour,
        linewidth=2.0,
        linestyle=drawn.line,
        marker=drawn.marker,
        markevery=12,
        markersize=4,
        markeredgecolor="black",
        markeredgewidth=0.5,
        label=f"{reward_title(kind)}, median",
    )


def _smooth(values: Floats, width: int = 5) -> Floats:
    """Moving mean over the neighbours that there are."""
    if len(values) < width:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def learning_dynamics(rows: Sequence[dict[str, Any]], rewards: Sequence[str]) -> "Figure | None":
    """Predicted against measured change of reward on unseen pairs, a panel per reward type (the reference's §5)."""
    kinds = [kind for kind in rewards if any(row["reward"] == kind for row in rows)]
    if not kinds:
        return None
    figure, axes = panels(1, len(kinds), 3.4, 3.0)
    for axis, kind in zip(axes, kinds, strict=True):
        drawn = look(kind, rewards)
        here = [row for row in rows if row["reward"] == kind]
        predicted, measured = ([row[name] for row in here] for name in ("predicted", "measured"))
        ends = [min(*predicted, *measured), max(*predicted, *measured)]
        axis.plot(ends, ends, color=GREY, linewidth=0.9, linestyle=":")
        axis.scatter(
            predicted,
            measured,
            s=14,
            color=drawn.colour,
            marker=drawn.marker,
            edgecolor="black",
            linewidth=0.3,
        )
        axis.set_title(reward_title(kind))
        axis.set_xlabel("predicted change of reward")
        axis.set_ylabel("measured")
    return figure
