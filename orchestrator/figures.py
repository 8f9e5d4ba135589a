"""The report's figures, in one house style: Okabe–Ito colours, told apart in grey by marker and hatch as well.

Each function draws one matplotlib Figure from an Analysis, or returns None where there is nothing to draw. No pyplot:
no state is shared, and nothing opens a window. The same numbers give the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import paper
from orchestrator.analysis import Analysis, Scope
from orchestrator.report import COMPARED, reward_title
from orchestrator.spec import CATEGORIES
from orchestrator.statistics import Estimate, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "rmsweep",
    "svg.fonttype": "path",
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a reward type is drawn."""

    colour: str
    marker: str
    hatch: str
    line: str


# Blue and orange differ most in lightness among Okabe and Ito's colours, so that they stay apart in grey.
_LOOKS = {
    "ex_rm": Look(colour="#0072B2", marker="o", hatch="", line="-"),
    "im_rm": Look(colour="#E69F00", marker="s", hatch="///", line="--"),
    "ex_grm": Look(colour="#009E73", marker="^", hatch="...", line="-."),
}
_OTHERS = (
    Look(colour="#CC79A7", marker="D", hatch="xxx", line=":"),
    Look(colour="#56B4E9", marker="v", hatch="\\\\\\", line="-."),
    Look(colour="#D55E00", marker="P", hatch="++", line=":"),
)
_GREY = "#555555"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A figure as files: `name` without ending, a title, and what it shows, for those who do not see it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


def look(reward: str, rewards: Sequence[str]) -> Look:
    """The look of a reward type among those of a sweep."""
    if reward in _LOOKS:
        return _LOOKS[reward]
    others = [kind for kind in rewards if kind not in _LOOKS]
    return _OTHERS[others.index(reward) % len(_OTHERS)]


def rendered(name: str, title: str, caption: str, draw: "Callable[[], Figure | None]") -> Drawn | None:
    """Draw in the house style; None where there is nothing to draw."""
    import matplotlib

    # Over matplotlib's defaults: a user's own matplotlibrc changes nothing.
    style: Any = {**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"}
    with matplotlib.rc_context(style):
        figure = draw()
        if figure is None:
            return None
        # The layout is found once, not once more for each file.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Drawn(name=name, title=title, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def panels(rows: int, columns: int, width: float, height: float, **more: Any) -> "tuple[Figure, list[Axes]]":
    """A figure of equal panels, `width` × `height` inches each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, list(axes.flat)


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
        axis.axhline(0.5, color=_GREY, linewidth=0.9, linestyle=":")
        axis.set_xticks(range(len(here)), [_wrapped(label(scope)) for scope in here])
        axis.set_ylim(0, 1.05)
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("accuracy")
        axis.set_title(f"trained on {train_set} (dotted: chance)")
    _legend(figure, axes)
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
        yerr=_whiskers(values),
        error_kw={"elinewidth": 1.1, "capsize": 2.5, "ecolor": "black"},
        label=reward_title(kind),
    )
    quoted = {
        where: value
        for where, place in zip(at, places, strict=True)
        if (scope := scopes[place])
        and not scope.dataset
        and (value := paper.number(scope.train_set, scope.sets, kind, "accuracy")) is not None
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
            label=f"the paper's mean, {paper.SOURCE}",
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
    _legend(figure, [axis])
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
    grid = _grid(analysis, {scope for scope, _, _ in found}, 0.32 * len(analysis.models) + 0.7, sharex=True)
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
        axis.axvline(0.5, color=_GREY, linewidth=0.9, linestyle=":")
        _model_rows(axis, analysis)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("accuracy")
    _legend(figure, axes.values())
    return figure


def differences(analysis: Analysis) -> "Figure | None":
    """EX−IM with intervals, one row per model and their mean, a panel per category."""
    choices = [*((model, [model]) for model in analysis.models), ("mean", None)]
    found = {
        (scope, row): item.estimate
        for scope in analysis.categories()
        for row, (_, models) in enumerate(choices)
        if (item := analysis.difference(scope, "accuracy", models)) is not None
    }
    grid = _grid(analysis, {scope for scope, _ in found}, 0.3 * len(choices) + 0.7, sharex=True)
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
                xerr=_whiskers([value]),
                color="black",
                marker="D" if mean else "o",
                markersize=6 if mean else 4.5,
                markerfacecolor="black" if mean else "white",
                elinewidth=1.6 if mean else 1.0,
                capsize=2.5,
            )
        axis.axvline(0, color=_GREY, linewidth=1.0)
        axis.set_yticks(range(len(choices)), [name for name, _ in choices])
        axis.set_ylim(len(choices) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("EX−IM (right of 0: EX-RM ahead)")
    return figure


def margin_distributions(analysis: Analysis) -> "Figure | None":
    """Histograms of margins over their rewards' standard deviation."""
    found = {
        (scope, kind): margins
        for scope in analysis.categories()
        for kind in analysis.rewards
        if len(margins := analysis.margins(scope, kind, scaled=True))
    }
    grid = _grid(analysis, {scope for scope, _ in found}, 1.9)
    if grid is None:
        return None
    figure, axes = grid
    edges = np.linspace(-4, 4, 49)
    for scope, axis in axes.items():
        for kind in (kind for kind in analysis.rewards if (scope, kind) in found):
            drawn = look(kind, analysis.rewards)
            heights, _ = np.histogram(np.clip(found[scope, kind], -4, 4), edges, density=True)
            axis.stairs(heights, edges, fill=True, color=drawn.colour, alpha=0.25)
            axis.stairs(
                heights,
                edges,
                color=drawn.colour,
                linewidth=1.5,
                linestyle=drawn.line,
                label=reward_title(kind),
            )
        axis.axvline(0, color=_GREY, linewidth=0.9, linestyle=":")
        axis.set_xlabel("margin / standard deviation of rewards")
        axis.set_yticks([])
    _legend(figure, axes.values())
    return figure


def reliability(analysis: Analysis) -> "Figure | None":
    """Accuracy against confidence, ten bins of equally many pairs."""
    found = {
        (scope, kind): curve
        for scope in analysis.categories()
        for kind in analysis.rewards
        if (curve := analysis.calibration(scope, kind)) is not None
    }
    grid = _grid(analysis, {scope for scope, _ in found}, 2.4)
    if grid is None:
        return None
    figure, axes = grid
    for scope, axis in axes.items():
        axis.plot([0.5, 1], [0.5, 1], color=_GREY, linewidth=0.9, linestyle=":")
        for kind in (kind for kind in analysis.rewards if (scope, kind) in found):
            drawn, curve = look(kind, analysis.rewards), found[scope, kind]
            axis.plot(
                curve.confidence,
                curve.accuracy,
                color=drawn.colour,
                linestyle=drawn.line,
                marker=drawn.marker,
                markersize=4,
                markeredgecolor="black",
                markeredgewidth=0.5,
                label=reward_title(kind),
            )
        axis.set_xlim(0.49, 1.01)
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("confidence σ(|margin|)")
        axis.set_ylabel("share ranked right")
    _legend(figure, axes.values())
    return figure


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
    _legend(figure, axes)
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
        axis.plot(ends, ends, color=_GREY, linewidth=0.9, linestyle=":")
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


def _dots(
    axis: "Axes", values: Sequence[Estimate], at: Sequence[float], analysis: Analysis, kind: str
) -> None:
    if not values:
        return
    drawn = look(kind, analysis.rewards)
    axis.errorbar(
        [value.value for value in values],
        at,
        xerr=_whiskers(values),
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


def _grid(
    analysis: Analysis, scopes: set[Scope], height: float, **more: Any
) -> "tuple[Figure, dict[Scope, Axes]] | None":
    """A row per training set and a column per category that there is; titles say which."""
    ordered = [scope for scope in analysis.categories() if scope in scopes]
    if not ordered:
        return None
    train_sets = list(dict.fromkeys(scope.train_set for scope in ordered))
    categories = [name for name in CATEGORIES if any(scope.category == name for scope in ordered)]
    figure, axes = panels(len(train_sets), len(categories), 3.1, height, **more)
    placed: dict[Scope, Axes] = {}
    for scope in ordered:
        where = train_sets.index(scope.train_set) * len(categories) + categories.index(scope.category)
        placed[scope] = axes[where]
        axes[where].set_title(f"{scope.train_set}: {scope.category}")
    for axis in axes:
        axis.set_visible(axis in placed.values())
        # Shared axes are labelled in the last row only, where there may be no panel.
        axis.tick_params(labelbottom=True)
    return figure, placed


def _model_rows(axis: "Axes", analysis: Analysis) -> None:
    axis.set_yticks(range(len(analysis.models)), analysis.models)
    axis.set_ylim(len(analysis.models) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _whiskers(values: Sequence[Estimate]) -> Floats:
    """Lengths of the error bars, [2, n]; a percentile interval may lie beside its estimate."""
    return np.array(
        [
            [max(0.0, item.value - item.low) for item in values],
            [max(0.0, item.high - item.value) for item in values],
        ]
    )


def _legend(figure: "Figure", axes: "Sequence[Axes] | Any") -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, max(1, len(handles)))
    )


def _wrapped(name: str, width: int = 13) -> str:
    """A name in lines of at most `width` letters, broken at its spaces and underscores."""
    lines = [""]
    for word in re.findall(r"[^ _]+[ _]?", name):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


def every_figure(analysis: Analysis, curves: Curves, dynamics: Sequence[dict[str, Any]]) -> Iterator[Drawn]:
    """Every figure for which there are numbers, in the report's order."""
    wanted: tuple[tuple[str, str, str, Callable[[], Figure | None]], ...] = (
        (
            "accuracy_by_category",
            "Accuracy by category",
            "Mean over models, with 95 % intervals.",
            lambda: accuracy_by_category(analysis),
        ),
        (
            "differences",
            "EX−IM by model",
            "Paired by seed and pair, with 95 % intervals.",
            lambda: differences(analysis),
        ),
        (
            "accuracy_by_set",
            "Accuracy by evaluation set",
            "Mean over models, with 95 % intervals.",
            lambda: accuracy_by_set(analysis),
        ),
        ("win_rates", "Win-rate", "Cells in which a type is ahead.", lambda: win_rates(analysis)),
        (
            "accuracy_by_model",
            "Accuracy by model",
            "Mean over seeds, with 95 % intervals.",
            lambda: accuracy_by_model(analysis),
        ),
        (
            "margins",
            "Margins",
            "Of every pair, model and seed; what lies beyond ±4 stands at the edge.",
            lambda: margin_distributions(analysis),
        ),
        (
            "reliability",
            "Reliability",
            "On the dotted line confidence and accuracy agree; below it the model is too sure.",
            lambda: reliability(analysis),
        ),
        (
            "training_curves",
            "Training curves",
            "On the training pairs: a thin line per training, a thick one for their median, a mean of five points.",
            lambda: training_curves(curves, analysis.rewards),
        ),
        (
            "learning_dynamics",
            "Learning dynamics",
            "On the dotted line the prediction is exact.",
            lambda: learning_dynamics(dynamics, analysis.rewards),
        ),
    )
    for name, title, caption, draw in wanted:
        found = rendered(name, title, caption, draw)
        if found is not None:
            yield found
