"""The house style of figures: Okabe–Ito colours, told apart in grey by marker and hatch as well.

No pyplot: no state is shared, and nothing opens a window. The same numbers give the same bytes.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.report.statistics import Estimate, Floats
from orchestrator.report.tables import reward_title

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
    """Colour, marker and line of a reward type."""

    colour: str
    marker: str
    hatch: str
    line: str


# Okabe and Ito's colours in the order of a sweep's reward types. Blue and orange differ most in lightness, so that they stay
# apart in grey.
_LOOKS = (
    Look(colour="#0072B2", marker="o", hatch="", line="-"),
    Look(colour="#E69F00", marker="s", hatch="///", line="--"),
    Look(colour="#009E73", marker="^", hatch="...", line="-."),
    Look(colour="#CC79A7", marker="D", hatch="xxx", line=":"),
    Look(colour="#56B4E9", marker="v", hatch="\\\\\\", line="-."),
    Look(colour="#D55E00", marker="P", hatch="++", line=":"),
)
GREY = "#555555"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnFigure:
    """A figure as files: `name` without ending, a title, and what it shows, for those who do not see it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


def look(reward: str, rewards: Sequence[str]) -> Look:
    """Return the look of a reward type among those of a sweep; from the seventh on, a colour has another marker, hatch and line."""
    again, number = divmod(list(rewards).index(reward), len(_LOOKS))
    return replace(_LOOKS[(number + again) % len(_LOOKS)], colour=_LOOKS[number].colour)


def line_style(reward: str, rewards: Sequence[str]) -> dict[str, Any]:
    """Return what matplotlib needs to draw a reward type's line with its markers."""
    drawn = look(reward, rewards)
    return {
        "color": drawn.colour,
        "linestyle": drawn.line,
        "marker": drawn.marker,
        "markersize": 4,
        "markeredgecolor": "black",
        "markeredgewidth": 0.5,
    }


def rendered(name: str, title: str, caption: str, draw: "Callable[[], Figure | None]") -> DrawnFigure | None:
    """Draw in the house style; None where there is nothing to draw. The caption says so where letters that the font lacks are boxes."""
    import matplotlib

    # Over matplotlib's defaults: a user's own matplotlibrc changes nothing.
    style: Any = {**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"}
    with matplotlib.rc_context(style), warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", "Glyph ")
        figure = draw()
        if figure is None:
            return None
        # The layout is found once, not once more for each file.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    others = [item for item in told if not str(item.message).startswith("Glyph ")]
    for item in others:
        warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
    if len(others) < len(told):
        caption += " Letters that the font lacks are shown as boxes."
    return DrawnFigure(name=name, title=title, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def panels(count: int, columns: int, width: float, height: float, **more: Any) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels, `columns` at most in a row, `width` × `height` inches each."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.35), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **more).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def whiskers(values: Sequence[Estimate]) -> Floats:
    """Return the lengths of error bars, [2, n]."""
    return np.array([[item.value - item.low, item.high - item.value] for item in values]).T


def draw_lines(
    rows: Sequence[Mapping[str, Any]], panel: Sequence[str], at: str, value: str
) -> "tuple[Figure, dict[tuple[str, ...], Axes]]":
    """Draw a panel for each value of the columns `panel`, in it a line of estimates for each reward type.

    Returns the figure, which has no legend yet, and the axes by the value of their panel.
    """

    def place(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in panel)

    places = list(dict.fromkeys(map(place, rows)))
    kinds = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = panels(len(places), 3, 3.2, 2.6)
    for axis, here in zip(axes, places, strict=True):
        for kind in kinds:
            line = [row for row in rows if (place(row), row["reward"]) == (here, kind)]
            places_at, values = [row[at] for row in line], [row[value] for row in line]
            style = line_style(kind, kinds)
            axis.vlines(
                places_at, [item.low for item in values], [item.high for item in values], color=style["color"]
            )
            axis.plot(places_at, [item.value for item in values], label=reward_title(kind), **style)
        axis.set_title(" · ".join(here[-2:]))
        axis.set_ylim(-0.05, 1.05)
    axes[0].set_ylabel("accuracy")
    return figure, dict(zip(places, axes, strict=True))


def legend(figure: "Figure", axes: "Iterable[Axes]") -> None:
    """One legend for all panels, below them, in four columns at most."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(4, max(1, len(handles))),
    )
