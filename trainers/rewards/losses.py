"""Losses of a preference pair: functions of its margin Δ = r⁺ − r⁻, for any reward type.

Shapes: P pairs. Importing this imports no torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.errors import DataError
from trainers.specs import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry(delta_P: "Tensor") -> "Tensor":
    """−ln σ(Δ) (paper §3)."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(delta_P)


def hinge(delta_P: "Tensor") -> "Tensor":
    """max(0, 1 − Δ), as SLiC has it (Zhao et al., 2023)."""
    return (1 - delta_P).clamp(min=0)


def ipo(delta_P: "Tensor") -> "Tensor":
    """(Δ − ½)²: if Δ is β times a log-ratio, β² times the loss of IPO at τ = β (Azar et al., 2023)."""
    return (delta_P - 0.5).square()


def pair_loss(
    chosen_P: "Tensor",
    rejected_P: "Tensor",
    spec: LossSpec,
    margin_P: "Tensor | None" = None,
    tie_P: "Tensor | None" = None,
) -> "Tensor":
    """Return the loss of each pair, [P]; `margin_P` holds the pairs' own margins if the loss needs them.

    Smoothed, it is (1 − s) f(Δ) + s f(−Δ), the expected loss if a label is wrong with probability s. For a tie s is ½.
    """
    delta_P = chosen_P - rejected_P
    if spec.margin:
        assert margin_P is not None, "a loss with a margin was given a batch without margins"
        # Δ must exceed the pair's own margin (Touvron et al., 2023).
        delta_P = delta_P - spec.margin * margin_P
    of_margin = {"bradley_terry": bradley_terry, "hinge": hinge, "ipo": ipo}[spec.kind]
    wrong_P = delta_P.new_full(delta_P.shape, spec.label_smoothing)
    if tie_P is not None:
        wrong_P = wrong_P.masked_fill(tie_P, 0.5)
    loss_P = (1 - wrong_P) * of_margin(delta_P) + wrong_P * of_margin(-delta_P)
    if spec.centring:
        # It keeps rewards around 0 (Eisenstein et al., 2023).
        loss_P = loss_P + spec.centring * (chosen_P + rejected_P).square()
    return loss_P


def consistency(rewards: "Sequence[Tensor]", rewritten: "Sequence[Tensor]") -> "Tensor":
    """(r⁺ − r̃⁺)² + (r⁻ − r̃⁻)², [P], of responses and their rewritings.

    reWordBench (Wu et al., 2025, arXiv 2503.11751) has the idea to score both alike; the squares are our own choice.
    """
    chosen_P, rejected_P = (one - other for one, other in zip(rewards, rewritten, strict=True))
    return chosen_P.square() + rejected_P.square()


def require_columns(
    spec: LossSpec, where: str, rows: int, *, without_margin: int, without_rewriting: int
) -> None:
    """Raise DataError if the loss needs the pairs' own margins or rewritings, and some rows have none."""
    if spec.margin and without_margin:
        raise DataError(
            f"{where}: {without_margin} of {rows} rows have no margin, which --margin {spec.margin} needs; give each a number "
            "in the column margin, name the column that holds it (--columns margin=NAME), or leave --margin out."
        )
    if spec.consistency and without_rewriting:
        raise DataError(
            f"{where}: {without_rewriting} of {rows} rows have no rewriting, which --consistency {spec.consistency} needs; "
            "give each the columns rewritten_chosen and rewritten_rejected, name those that hold them (--columns "
            "rewritten_chosen=NAME rewritten_rejected=NAME), or leave --consistency out."
        )
