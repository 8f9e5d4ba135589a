"""EX-RM (paper §3): r = ⟨u, h⟩, a bias-free linear head u on a hidden state h of the last layer.

h is that of the last token of the whole sequence; the ablation `pooling="mean"` takes the mean of the head's output
over the response's tokens.
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import RewardSpec, RewardType

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch


def _score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "tuple[Tensor, Tensor]":
    from trainers.models.reward_parts import by_pair, hidden_states, mean_by_response

    hidden_ND = hidden_states(model, batch)
    if spec.pooling == "last":
        reward_R = model.score(hidden_ND[batch.last_R]).squeeze(-1)
    else:
        reward_R = mean_by_response(model.score(hidden_ND[batch.response_M]).squeeze(-1), batch)
    return by_pair(reward_R, batch)


REWARD_TYPE = RewardType(
    kind="ex_rm",
    output="head",
    score=_score,
    formula="r = ⟨u, h⟩, the one logit of a sequence classifier",
    options=frozenset({"pooling"}),
)
