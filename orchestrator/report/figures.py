"""Every figure of a report, in its order."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.report.accuracy_figures import (
    accuracy_by_category,
    accuracy_by_model,
    accuracy_by_set,
    differences,
    win_rates,
)
from orchestrator.report.comparison import Analysis
from orchestrator.report.house_style import Drawn, rendered
from orchestrator.report.reward_figures import margin_distributions, reliability
from orchestrator.report.training_figures import Curves, learning_dynamics, training_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
