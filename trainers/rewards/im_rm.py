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
    """Return ln π(y|x) of each response, [R], less that under the reference model where `spec` has one."""
    from trainers.models.reward_parts import log_prob_sums

    sums_R = log_prob_sums(model, batch, hidden_ND).double()
    if spec.reference:
        assert batch.reference_R is not None, f"{spec.kind} was given a batch without reference log-probs"
        sums_R = sums_R - batch.reference_R
    return sums_R


def scaled(
    kind: str,
    value: "Callable[[Any, MicroBatch, RewardSpec], Tensor]",
    called: str,
    *,
    options: frozenset[str] = frozenset({"beta", "reference"}),
    reads: Read = "log_probs",
) -> RewardType:
    """Return the type whose reward is β times `value`, [R], which a model card calls `called`."""

    def score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "tuple[Tensor, Tensor]":
        from trainers.models.reward_parts import by_pair

        assert spec.beta is not None
        return by_pair(spec.beta * value(model, batch, spec), batch)

    def usage(spec: RewardSpec) -> str:
        minus = ", minus that under the base model" if "reference" in options and spec.reference else ""
        return (
            f"Load it with `AutoModelForCausalLM`: the reward is {spec.beta} times the {called} of the response's "
            f"tokens, its end-of-turn token included{minus}."
        )

    return RewardType(kind=kind, output="unembedding", score=score, usage=usage, options=options, reads=reads)


REWARD_TYPE = scaled("im_rm", log_ratios, "summed log-probability")
