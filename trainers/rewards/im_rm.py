"""IM-RM (paper §3): r = β [ln π(y|x) − ln π_ref(y|x)], summed over response tokens, not length-normalised.

The ablation `reference=False` leaves ln π_ref out.
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import BatchScores, RewardSpec, RewardType

if TYPE_CHECKING:
    from trainers.pairs.packing import MicroBatch


def _score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> BatchScores:
    from trainers.models.reward_parts import bradley_terry, by_pair, log_prob_sums

    assert spec.beta is not None
    sums_R = log_prob_sums(model, batch).double()
    if spec.reference:
        assert batch.reference_R is not None, "im_rm was given a batch without reference log-probs"
        sums_R = sums_R - batch.reference_R
    return bradley_terry(*by_pair(spec.beta * sums_R, batch))


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
