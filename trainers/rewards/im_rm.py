"""IM-RM (paper §3): r = β [ln π(y|x) − ln π_ref(y|x)], summed over response tokens, not length-normalised.

The ablation `reference=False` leaves ln π_ref out.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainers.rewards import Read, RewardSpec, RewardType

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch


def log_ratios(
    model: Any, batch: "MicroBatch", spec: RewardSpec, hidden_ND: "Tensor | None" = None
) -> "Tensor":
    """Return ln π(y|x) of each response, [R], minus that under the reference model if `spec` has one."""
    from trainers.models.reward_parts import log_prob_sums

    sums_R = log_prob_sums(model, batch, hidden_ND).double()
    if spec.reference:
        assert batch.reference_R is not None, f"{spec.kind} was given a batch without reference log-probs"
        sums_R = sums_R - batch.reference_R
    return sums_R


def scaled(
    kind: str,
    value: "Callable[[Any, MicroBatch, RewardSpec], Tensor]",
    formula: str,
    *,
    options: frozenset[str] = frozenset({"beta", "reference"}),
    reads: Read = "log_probs",
) -> RewardType:
    """Return the type whose reward is β times `value`, [R], which a model card writes as `formula`."""

    def score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "tuple[Tensor, Tensor]":
        from trainers.models.reward_parts import by_pair

        assert spec.beta is not None
        return by_pair(spec.beta * value(model, batch, spec), batch)

    return RewardType(
        kind=kind, output="unembedding", score=score, formula=formula, options=options, reads=reads
    )


REWARD_TYPE = scaled("im_rm", log_ratios, "r = β [ln π(y|x) − ln π_ref(y|x)]")
