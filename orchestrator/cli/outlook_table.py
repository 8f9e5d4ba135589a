"""The outlook of a sweep for people: a row for each model and reward type, then what it all comes to."""

import math

from rich.console import Console
from rich.table import Table

from orchestrator.cli.layout import fitting
from orchestrator.plan.outlook import Cell, Outlook
from trainers.errors import SpecError
from trainers.specs import Placement

_COLUMNS = (
    "model · reward",
    "trials",
    "parameters",
    "devices",
    "ZeRO",
    "batch",
    "memory saved by",
    "peak GB",
    "step s",
    "hours",
    "missing",
)
_LEFT = ("model · reward", "memory saved by", "missing")


def checked_price(price: float | None) -> float | None:
    """The value of --price. Raises SpecError."""
    if price is not None and not 0 <= price < math.inf:
        raise SpecError(f"--price {price}: give $ per GPU-hour, 0 or more.")
    return price


def say(console: Console, found: Outlook, trials: int) -> None:
    """Print it."""
    table = Table(title=f"{found.sweep}: {trials} trials on {found.cluster}", title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in _LEFT else "right", overflow="fold")
    for cell in found.cells:
        table.add_row(*_row(cell))
    console.print(fitting(table, console))
    for line in _lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for cell in found.cells:
        if cell.why:
            console.print(f"does not fit: {cell.why}", style="yellow", markup=False, soft_wrap=True)


def _row(cell: Cell) -> tuple[str, ...]:
    placed = cell.placement
    head = (f"{cell.model} · {cell.reward}", str(cell.trials), _count(cell.parameters))
    if placed is None:
        return (*head, "none", "", f"= {cell.effective_batch}", "does not fit", "", "", "", _missing(cell))
    peak = "?" if cell.peak_gb is None else _gb(cell.peak_gb)
    limit = f" of {cell.gpu_gb:g}" if cell.gpu_gb and cell.peak_gb is not None else ""
    step = "?" if cell.step_s is None else f"{cell.step_s:.2g}{'' if cell.measured else ' ~'}"
    return (
        *head,
        str(placed.world_size),
        str(placed.zero_stage),
        f"{placed.micro_batch} × {placed.accumulation} × {placed.world_size} = {placed.effective_batch}",
        _savings(placed),
        peak + limit,
        step,
        "?" if cell.device_hours is None else _hours(cell.device_hours),
        _missing(cell),
    )


def _missing(cell: Cell) -> str:
    """Its own stages; those that it shares with others stand in the line below the table."""
    own = [f"{cell.missing[kind]} {kind}" for kind in ("train", "evaluate") if cell.missing.get(kind)]
    return ", ".join(own) or ("shared stages" if cell.missing else "nothing")


def _savings(placed: Placement) -> str:
    words = ["recomputation"] if placed.checkpointing else []
    words += ["offload"] if placed.offload_optimizer else []
    return ", ".join(words) or "–"


def _lines(found: Outlook) -> list[str]:
    counts = ", ".join(
        f"{kind} {count['missing']} to do, {count['cached']} cached" for kind, count in found.stages.items()
    )
    lines = [f"stages, shared ones once: {counts}"]
    at = f"{found.devices} {found.unit}{'s' if found.devices > 1 else ''}"
    lines.append(
        f"{_hours(found.device_hours)} {found.unit}-hours on {at}: about {_hours(found.makespan_h)} h from start to end, "
        f"never under {_hours(found.lower_bound_h)} h; steps with ~ are estimated, the others measured"
    )
    if found.price is not None and found.price_held is not None:
        lines.append(
            f"price: ${found.price:,.2f} for the work, ${found.price_held:,.2f} with the whole cluster held to the end, at "
            f"${found.price_per_hour:,.2f} per GPU-hour ({found.price_is})"
        )
    if found.unknown:
        lines.append(f"of unknown size, so on one GPU and in no total: {', '.join(found.unknown)}")
    if found.not_fetched:
        lines.append(f"not fetched: {', '.join(found.not_fetched)}")
    return lines


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "?"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {letter}"
    return str(parameters)


def _gb(gb: float) -> str:
    return f"{gb:.1f}" if gb >= 1 else f"{gb:.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
