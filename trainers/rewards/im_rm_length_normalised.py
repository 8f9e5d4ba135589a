"""A remedy for IM-RM: r = β/|y| [ln π(y|x) − ln π_ref(y|x)], the mean over the response's tokens in the place of the sum.

Length-normalised DPO (Lambert et al., 2024, Tülu 3); without the reference it is SimPO's reward (Meng et al., 2024).
A mean is some hundred times smaller than the sum, so β should be larger than IM-RM's.
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import RewardSpec, RewardType
from trainers.rewards.im_rm import log_ratios

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch


def _score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "tuple[Tensor, Tensor]":
    from trainers.models.reward_parts import by_pair

    assert spec.beta is not None
    return by_pair(spec.beta * log_ratios(model, batch, spec) / batch.owner_M.bincount(), batch)


def _usage(spec: RewardSpec) -> str:
    minus = ", minus that under the base model" if spec.reference else ""
    return (
        f"Load it with `AutoModelForCausalLM`: the reward is {spec.beta} times the mean log-probability of the response's "
        f"tokens, its end-of-turn token included{minus}."
    )


REWARD_TYPE = RewardType(
    kind="im_rm_length_normalised",
    output="unembedding",
    score=_score,
    usage=_usage,
    options=frozenset({"beta", "reference"}),
)
