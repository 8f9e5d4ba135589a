"""What reward types are made of: hidden states, log-probabilities and the Bradley–Terry loss of a micro-batch.

Shapes: P pairs, R = 2P responses, N tokens of the batch, M response tokens, D hidden.
Heads, log-softmax and log-prob sums are computed in fp32 or wider whatever the model's precision.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.packing import MicroBatch
from trainers.rewards import PairScores, Rendering, RewardSpec
from trainers.ropes import shared_tokens


class RewardModule(nn.Module):
    """A model with its reward type: what DeepSpeed wraps, and what scores."""

    def __init__(self, model: Any, spec: RewardSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec

    def forward(self, batch: MicroBatch) -> PairScores:
        """Rewards and losses of the batch's pairs; a pair of the same tokens twice is a tie, whatever its type."""
        scores = self.spec.type.score(self.model, batch, self.spec)
        same_P = _same_input(batch, self.spec.type.rendering)
        return scores._replace(rejected_P=torch.where(same_P, scores.chosen_P, scores.rejected_P))


def _same_input(batch: MicroBatch, rendering: Rendering) -> Tensor:
    """Say for each pair whether the model reads the same tokens for both responses, [P].

    A question that is asked twice leaves nothing of a response but the answer after it.
    """
    if rendering == "response":
        return batch.same_P
    return (batch.owner_M.bincount() == 1).view(2, -1).all(0)


def hidden_states(model: Any, batch: MicroBatch) -> Tensor:
    """Last layer's normalised hidden states of all tokens of the batch, [N, D]."""
    layout = {} if batch.layout is None else {"pair_layout": batch.layout}
    position_ids_BT = batch.position_ids_BT
    if batch.attention_mask_BT is not None and shared_tokens(model) is not None:
        # Padding stands at a row's last position: it makes no row longer.
        position_ids_BT = batch.attention_mask_BT.cumsum(1) - 1
    output = model.base_model(
        input_ids=batch.input_ids_BT,
        position_ids=position_ids_BT,
        attention_mask=batch.attention_mask_BT,
        use_cache=False,
        **layout,
    )
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD.flatten(0, 1)


def token_log_probs(model: Any, hidden_MD: Tensor, target_M: Tensor) -> Tensor:
    """ln π of each target token after its hidden state, [M]."""
    softcap = getattr(model.config, "final_logit_softcapping", None)
    log_prob_M: Tensor = model.get_output_embeddings()(hidden_MD, target_M, softcap)
    return log_prob_M


def log_prob_sums(model: Any, batch: MicroBatch) -> Tensor:
    """ln π(y|x) of each response, summed over its tokens, [R]; no other position meets the unembedding."""
    hidden_ND = hidden_states(model, batch)
    log_prob_M = token_log_probs(model, hidden_ND[batch.predictor_M], batch.target_M)
    return _sum_by_response(log_prob_M, batch)


def mean_by_response(value_M: Tensor, batch: MicroBatch) -> Tensor:
    """Mean of a value over the tokens of each response, [R]."""
    return _sum_by_response(value_M, batch) / batch.owner_M.bincount()


def _sum_by_response(value_M: Tensor, batch: MicroBatch) -> Tensor:
    sums_R = torch.zeros(len(batch.last_R), dtype=value_M.dtype, device=value_M.device)
    return sums_R.index_add(0, batch.owner_M, value_M)


def by_pair(reward_R: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and rejected responses, [P] each; of a pair of the same tokens twice one reward serves both.

    Computed at two places of a batch they differ in their last bits, which would rank the pair and train on noise.
    """
    chosen_P, rejected_P = reward_R.chunk(2)
    return chosen_P, torch.where(batch.same_P, chosen_P, rejected_P)


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor) -> PairScores:
    """The rewards with the loss −ln σ(r⁺ − r⁻) of each pair (paper §3)."""
    return PairScores(chosen_P, rejected_P, -F.logsigmoid(chosen_P - rejected_P))
