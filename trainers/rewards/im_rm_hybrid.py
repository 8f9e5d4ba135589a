"""A remedy for IM-RM: r = ⟨u, h⟩ + β [ln π(y|x) − ln π_ref(y|x)], EX-RM's head and IM-RM's log-ratio in one reward.

GRM (Yang et al., 2024, arXiv 2406.10216) also keeps the language model's output layer beside a reward head, but only as
a regulariser: its reward is the head's. The sum is our own.
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import RewardSpec, RewardType
from trainers.rewards.im_rm import log_ratios

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch


def _score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> "tuple[Tensor, Tensor]":
    from trainers.models.reward_parts import by_pair, hidden_states

    assert spec.beta is not None
    hidden_ND = hidden_states(model, batch)
    head_R = model.score(hidden_ND[batch.last_R]).squeeze(-1)
    return by_pair(head_R + spec.beta * log_ratios(model, batch, spec, hidden_ND), batch)


REWARD_TYPE = RewardType(
    kind="im_rm_hybrid",
    output="both",
    score=_score,
    formula="r = ⟨u, h⟩ + β [ln π(y|x) − ln π_ref(y|x)], the one logit that `AutoModelForSequenceClassification` gives at a "
    "conversation's last token, and the log-ratio summed over the response's tokens",
    options=frozenset({"beta", "reference"}),
)
