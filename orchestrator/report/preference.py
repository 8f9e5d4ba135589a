"""When to prefer which reward type: one paragraph, computed from EX−IM and its controls."""

from collections.abc import Sequence

from orchestrator.report.controls import Controlled
from orchestrator.report.statistics import Estimate
from orchestrator.report.summary import COMPARED, reward_title

EXPLICIT, IMPLICIT = map(reward_title, COMPARED)
TITLE = "When to prefer which"
_CONTROLS = (("length", "at matched lengths"), ("leak_free", "on pairs that training has not seen"))


def preference(found: Sequence[Controlled]) -> str:
    """What these numbers advise, where they advise nothing, and what is not known."""
    asked = [item for item in found if item.category != "training pairs"]
    if not asked:
        return (
            f"Nothing can be advised: no model and seed has learned with both {EXPLICIT} and {IMPLICIT} "
            "and was evaluated with both."
        )
    return " ".join(_advice(item) for item in asked) + (
        " Brackets are 95 % intervals over test pairs, given these models and seeds."
    )


def _advice(item: Controlled) -> str:
    where = f"Trained on {item.train_set}, {_under(item.category)}"
    numbers = f"EX−IM {_shown(item.plain)}"
    if not item.plain.excludes_zero:
        return f"{where}: neither is to be preferred ({numbers}){_masked(item)}."
    winner = EXPLICIT if item.plain.value > 0 else IMPLICIT
    return f"{where}: prefer {winner} ({numbers}); {_survives(item)}."


def _survives(item: Controlled) -> str:
    """Whether the lead is still there without what length and leaks lend to it."""
    parts = []
    for name, title in _CONTROLS:
        value: Estimate | None = getattr(item, name)
        if value is None:
            parts.append(f"{title} it cannot be told")
        elif value.excludes_zero and value.value * item.plain.value > 0:
            parts.append(f"{title} the lead stays ({_shown(value)})")
        elif value.excludes_zero:
            parts.append(f"{title} the other one leads ({_shown(value)}), so the lead is not one of quality")
        else:
            parts.append(f"{title} no lead can be told ({_shown(value)})")
    return ", ".join(parts)


def _masked(item: Controlled) -> str:
    """A lead that only a control shows."""
    shown = [
        f"{title} {EXPLICIT if value.value > 0 else IMPLICIT} leads ({_shown(value)})"
        for name, title in _CONTROLS
        if (value := getattr(item, name)) is not None and value.excludes_zero
    ]
    return f"; {', '.join(shown)}" if shown else ""


def _under(category: str) -> str:
    return category if category == "in-distribution" else f"under {category}"


def _shown(value: Estimate) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
