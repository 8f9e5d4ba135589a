"""The outlook of a sweep in words: a row for each model and reward type, then what it all comes to."""

import math

from rich.console import Console
from rich.table import Table

from orchestrator.cli.layout import fitting
from orchestrator.plan.outlook import Outlook, TrialGroup
from trainers.errors import SpecError

_LEFT = ("model · reward", "memory saved by", "missing")


def checked_price(price: float | None) -> float | None:
    """Return the value of --price. Raises SpecError."""
    if price is not None and not 0 <= price < math.inf:
        raise SpecError(f"--price {price}: give $ per GPU-hour, 0 or more.")
    return price


def say(console: Console, found: Outlook, trials: int) -> None:
    """Print it."""
    table = Table(title=f"{found.sweep}: {trials} trials on {found.cluster}", title_justify="left")
    rows = [_row(group) for group in found.cells]
    for column in rows[0] if rows else ():
        table.add_column(column, justify="left" if column in _LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console.print(fitting(table, console))
    for line in _lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for why in filter(None, (group.why for group in found.cells)):
        console.print(f"does not fit: {why}", style="yellow", markup=False, soft_wrap=True)


def _row(group: TrialGroup) -> dict[str, str]:
    """One row of the table by column. A `~` marks an estimated time, a `?` what is not known."""
    placed = group.placement
    row = {
        "model · reward": f"{group.model} · {group.reward}",
        "trials": str(group.trials),
        "parameters": _count(group.parameters),
    }
    if placed is None:
        row |= {"devices": "none", "ZeRO": "", "batch": f"= {group.effective_batch}"}
        row |= {"memory saved by": "does not fit", "peak GB": "", "step s": "", "hours": ""}
    else:
        sizes = f"{placed.micro_batch} × {placed.accumulation} × {placed.world_size}"
        saved = [("recomputation", placed.checkpointing), ("offload", placed.offload_optimizer)]
        peak = "?" if group.peak_gb is None else f"{group.peak_gb:.{1 if group.peak_gb >= 1 else 2}f}"
        limit = f" of {group.gpu_gb:g}" if group.gpu_gb and group.peak_gb is not None else ""
        row |= {
            "devices": str(placed.world_size),
            "ZeRO": str(placed.zero_stage),
            "batch": f"{sizes} = {placed.effective_batch}",
            "memory saved by": ", ".join(word for word, is_used in saved if is_used) or "–",
            "peak GB": peak + limit,
            "step s": "?" if group.step_s is None else f"{group.step_s:.2g}{'' if group.measured else ' ~'}",
            "hours": "?" if group.device_hours is None else _hours(group.device_hours),
        }
    # Its own stages; those that it shares with others stand in the line below the table.
    own = [f"{group.missing[kind]} {kind}" for kind in ("train", "evaluate") if group.missing.get(kind)]
    return row | {"missing": ", ".join(own) or ("shared stages" if group.missing else "nothing")}


def _lines(found: Outlook) -> list[str]:
    counts = ", ".join(
        f"{kind} {count['missing']} to do, {count['cached']} cached" for kind, count in found.stages.items()
    )
    at = f"{found.devices} {found.unit}{'s' if found.devices > 1 else ''}"
    lines = [
        f"stages, shared ones once: {counts}",
        f"{_hours(found.device_hours)} {found.unit}-hours on {at}: about {_hours(found.makespan_h)} h from start to end, "
        f"never under {_hours(found.lower_bound_h)} h; steps with ~ are estimated, the others measured",
    ]
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


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
