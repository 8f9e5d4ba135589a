"""Building blocks of reward types: hidden states, log-probabilities, rewards and loss of a micro-batch.

Shapes: P pairs, R = 2P responses, N tokens of the batch, M response tokens, D hidden.
Heads, log-softmax and log-prob sums are computed in fp32 or wider whatever the model's precision.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainers.models.attention import hidden_states as hidden_states
from trainers.models.unembedding import token_log_probs as token_log_probs
from trainers.models.unembedding import token_logits as token_logits
from trainers.pairs.packing import MicroBatch
from trainers.rewards import BatchScores, RewardSpec
from trainers.rewards.losses import consistency, pair_loss
from trainers.specs import BRADLEY_TERRY, LossSpec


class RewardModule(nn.Module):
    """A model with its reward type and loss, for scoring and for DeepSpeed."""

    def __init__(self, model: Any, spec: RewardSpec, loss: LossSpec = BRADLEY_TERRY) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.loss = loss

    def forward(self, batch: MicroBatch) -> BatchScores:
        """Score the batch's pairs; a pair whose responses look the same to the model gets equal rewards.

        The rewards of rewritings only count in the loss of their pairs.
        """
        found = self.spec.type.score(self.model, batch, self.spec)
        assert isinstance(found, BatchScores) == self.spec.type.own_loss, "its own_loss says otherwise"
        if isinstance(found, BatchScores):
            scores = found
        else:
            scores = BatchScores(*found, pair_loss(*found, self.loss, batch.margin_P, batch.tie_P))
        if batch.rewritings:
            scores, others = (
                BatchScores(*part) for part in zip(*(all_P.chunk(2) for all_P in scores), strict=True)
            )
            apart_P = consistency(scores[:2], others[:2])
            scores = scores._replace(loss_P=scores.loss_P + self.loss.consistency * apart_P)
        same_P = batch.same_P[: len(scores.chosen_P)]
        if self.spec.type.rendering == "verification":
            # A pair that asks one question twice has only its answers left as responses.
            same_P = (batch.owner_M.bincount() == 1).view(2, -1).all(0)
        return scores._replace(rejected_P=torch.where(same_P, scores.chosen_P, scores.rejected_P))


def log_prob_sums(model: Any, batch: MicroBatch, hidden_ND: Tensor | None = None) -> Tensor:
    """Return ln π(y|x) of each response, summed over its tokens, [R]; no other position is unembedded."""
    hidden_ND = hidden_states(model, batch) if hidden_ND is None else hidden_ND
    log_prob_M = token_log_probs(model, hidden_ND[batch.predictor_M], batch.target_M)
    return sum_by_response(log_prob_M, batch)


def mean_by_response(value_M: Tensor, batch: MicroBatch) -> Tensor:
    """Return the mean of a value over the tokens of each response, [R]."""
    return sum_by_response(value_M, batch) / batch.owner_M.bincount()


def sum_by_response(value_M: Tensor, batch: MicroBatch) -> Tensor:
    """Return the sum of a value over the tokens of each response, [R]."""
    sums_R = torch.zeros(len(batch.last_R), dtype=value_M.dtype, device=value_M.device)
    return sums_R.index_add(0, batch.owner_M, value_M)


def by_pair(reward_R: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the rewards of the chosen and the rejected responses, [P] each.

    Identical responses get one reward: computed at two places of a batch, their rewards differ in the last bits, which
    would rank the pair and train on noise.
    """
    chosen_P, rejected_P = reward_R.chunk(2)
    return chosen_P, torch.where(batch.same_P, chosen_P, rejected_P)
