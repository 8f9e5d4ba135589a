"""IM-RM (paper §3): r = β [ln π(y|x) − ln π_ref(y|x)], summed over response tokens, not length-normalised.

The ablation `reference=False` leaves ln π_ref out.
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import RewardSpec, RewardType

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch


def _score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "tuple[Tensor, Tensor]":
    from trainers.models.reward_parts import by_pair

    assert spec.beta is not None
    return by_pair(spec.beta * log_ratios(model, batch, spec), batch)


def log_ratios(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "Tensor":
    """Return ln π(y|x) of each response, [R], less that under the reference model where `spec` has one."""
    from trainers.models.reward_parts import log_prob_sums

    sums_R = log_prob_sums(model, batch).double()
    if spec.reference:
        assert batch.reference_R is not None, f"{spec.kind} was given a batch without reference log-probs"
        sums_R = sums_R - batch.reference_R
    return sums_R


def _usage(spec: RewardSpec) -> str:
    minus = ", minus that under the base model" if spec.reference else ""
    return (
        f"Load it with `AutoModelForCausalLM`: the reward is {spec.beta} times the summed log-probability of the "
        f"response's tokens, its end-of-turn token included{minus}."
    )


REWARD_TYPE = RewardType(
    kind="im_rm",
    output="unembedding",
    score=_score,
    usage=_usage,
    options=frozenset({"beta", "reference"}),
)
