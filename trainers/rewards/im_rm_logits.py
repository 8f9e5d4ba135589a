"""A remedy for IM-RM: r = β Σ_t z_t(y_t), the logits of the response's tokens without the log-softmax around them.

Without the normaliser, a token's reward does not depend on the probabilities of other tokens. Logits are read as values
of a soft Q-function (Li et al., 2025, Generalist Reward Models). There is no reference, since only log-probabilities of
the base model are cached.
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import RewardSpec
from trainers.rewards.im_rm import scaled

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch


def _logit_sums(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "Tensor":
    from trainers.models.reward_parts import hidden_states, sum_by_response, token_logits

    hidden_ND = hidden_states(model, batch)
    logit_M = token_logits(model, hidden_ND[batch.predictor_M], batch.target_M)
    return sum_by_response(logit_M.double(), batch)


REWARD_TYPE = scaled(
    "im_rm_logits",
    _logit_sums,
    "r = β Σ_t z_t(y_t), the logits of the response's tokens",
    options=frozenset({"beta"}),
    reads="logits",
)
