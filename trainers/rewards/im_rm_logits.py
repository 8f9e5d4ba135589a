"""A remedy for IM-RM: r = β Σ_t z_t(y_t), the logits of the response's tokens without the log-softmax around them.

Without the normaliser, a token's reward no longer depends on the probabilities of the tokens that were not said. Logits
stand for values as in a soft Q-function (Li et al., 2025, Generalist Reward Models). There is no reference:
what is cached of the base model is its log-probabilities.
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import RewardSpec, RewardType

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch


def _score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "tuple[Tensor, Tensor]":
    from trainers.models.reward_parts import by_pair, hidden_states, sum_by_response, token_logits

    assert spec.beta is not None
    hidden_ND = hidden_states(model, batch)
    logit_M = token_logits(model, hidden_ND[batch.predictor_M], batch.target_M)
    return by_pair(spec.beta * sum_by_response(logit_M.double(), batch), batch)


def _usage(spec: RewardSpec) -> str:
    return (
        f"Load it with `AutoModelForCausalLM`: the reward is {spec.beta} times the summed logit of the response's tokens, "
        "its end-of-turn token included."
    )


REWARD_TYPE = RewardType(
    kind="im_rm_logits", output="unembedding", score=_score, usage=_usage, options=frozenset({"beta"})
)
