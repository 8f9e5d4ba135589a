"""Figures of rewards: how margins are distributed, and how far confidence is to be believed.

Each function draws one matplotlib Figure from an Analysis, or returns None where there is nothing to draw.
"""

from typing import TYPE_CHECKING

import numpy as np

from orchestrator.report.comparison import Analysis
from orchestrator.report.house_style import GREY, category_panels, legend, look
from orchestrator.report.summary import reward_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def margin_distributions(analysis: Analysis) -> "Figure | None":
    """Histograms of margins over their rewards' standard deviation."""
    found = {
        (scope, kind): margins
        for scope in analysis.categories()
        for kind in analysis.rewards
        if len(margins := analysis.margins(scope, kind, scaled=True))
    }
    grid = category_panels(analysis, {scope for scope, _ in found}, 1.9)
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
        axis.axvline(0, color=GREY, linewidth=0.9, linestyle=":")
        axis.set_xlabel("margin / standard deviation of rewards")
        axis.set_yticks([])
    legend(figure, axes.values())
    return figure


def reliability(analysis: Analysis) -> "Figure | None":
    """Accuracy against confidence, ten bins of equally many pairs."""
    found = {
        (scope, kind): curve
        for scope in analysis.categories()
        for kind in analysis.rewards
        if (curve := analysis.calibration(scope, kind)) is not None
    }
    grid = category_panels(analysis, {scope for scope, _ in found}, 2.4)
    if grid is None:
        return None
    figure, axes = grid
    for scope, axis in axes.items():
        axis.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.9, linestyle=":")
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
    legend(figure, axes.values())
    return figure
