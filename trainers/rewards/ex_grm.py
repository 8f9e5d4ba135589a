"""EX-GRM (paper §3): r = π("Yes") after the question whether the response is correct.

Trained on the negative log-likelihood of "Yes" for the chosen and "No" for the rejected response, their mean.
In a prepared pair the chosen response ends in the token "Yes", the rejected one in "No" (trainers/pairs).
"""

from typing import TYPE_CHECKING, Any

from trainers.rewards import BatchScores, RewardSpec, RewardType

if TYPE_CHECKING:
    from trainers.pairs.packing import MicroBatch


def _score(model: Any, batch: "MicroBatch", spec: RewardSpec) -> BatchScores:
    from torch import cat

    from trainers.models.reward_parts import hidden_states, token_log_probs

    final_R = batch.owner_M.bincount().cumsum(0) - 1
    chosen_P, rejected_P = batch.predictor_M[final_R].chunk(2)
    yes_P, no_P = batch.target_M[final_R].chunk(2)
    hidden_ND = hidden_states(model, batch)
    at_A, answer_A = cat([chosen_P, rejected_P, rejected_P]), cat([yes_P, yes_P, no_P])
    log_probs = token_log_probs(model, hidden_ND[at_A], answer_A)
    chosen_yes_P, rejected_yes_P, rejected_no_P = log_probs.chunk(3)
    loss_P = -(chosen_yes_P + rejected_no_P) / 2
    return BatchScores(chosen_yes_P.exp(), rejected_yes_P.exp(), loss_P)


REWARD_TYPE = RewardType(
    kind="ex_grm",
    output="unembedding",
    score=_score,
    formula='r = π("Yes") after the user turn `Question: {prompt}\\nAnswer: {response}\\nVerification: '
    "Is the answer correct (Yes/No)?`",
    rendering="verification",
    own_loss=True,
)
