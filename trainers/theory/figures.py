"""Figures of the analyses, each as PNG and SVG; drawn without a display."""

from pathlib import Path
from typing import Any


def new_figure(columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Any, folder: Path, name: str) -> None:
    """Write `name`.png and `name`.svg into `folder`/figures."""
    (folder / "figures").mkdir(exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(folder / "figures" / f"{name}.{ending}", dpi=150)
