"""Reward types as modules that map a micro-batch to rewards (paper §3).

Shapes: P pairs, R = 2P rows (chosen rows first), T tokens, N response tokens of all rows, D hidden, V vocabulary.
The EX-RM head, log-softmax and log-prob sums are computed in fp32 or wider whatever the model's precision.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.pairs import MicroBatch
from trainers.specs import RewardSpec


class PairRewards(NamedTuple):
    """Rewards of the preferred and the dispreferred responses of P pairs."""

    chosen_P: Tensor
    rejected_P: Tensor


def _hidden(model: Any, batch: MicroBatch) -> Tensor:
    """Last layer's normalised hidden states, [R, T, D]."""
    backbone = model.base_model
    output = backbone(input_ids=batch.input_ids_RT, attention_mask=batch.attention_mask_RT, use_cache=False)
    hidden_RTD: Tensor = output.last_hidden_state
    return hidden_RTD


def _widened(values: Tensor) -> Tensor:
    """Half precision as fp32; fp32 and fp64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _by_response(reward_R: Tensor) -> PairRewards:
    return PairRewards(*reward_R.chunk(2))


class ExplicitReward(nn.Module):
    """r = ⟨u, h⟩: a bias-free linear head on the hidden state of the last token of the whole sequence."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> PairRewards:
        """Rewards of the batch's pairs."""
        hidden_RTD = _hidden(self.model, batch)
        rows = torch.arange(len(batch.last_R), device=hidden_RTD.device)
        reward_R = _widened(self.model.score(hidden_RTD[rows, batch.last_R])).squeeze(-1)
        return _by_response(reward_R)


class ImplicitReward(nn.Module):
    """r = β [ln π(y|x) − ln π_ref(y|x)], summed over response tokens, not length-normalised."""

    def __init__(self, model: Any, beta: float) -> None:
        super().__init__()
        self.model = model
        self.beta = beta

    def forward(self, batch: MicroBatch) -> PairRewards:
        """Rewards of the batch's pairs; the batch carries the reference's log-prob sums."""
        assert batch.reference_R is not None, "im_rm was given a batch without reference log-probs"
        log_ratio_R = log_prob_sums(self.model, batch).double() - batch.reference_R
        return _by_response(self.beta * log_ratio_R)


def log_prob_sums(model: Any, batch: MicroBatch) -> Tensor:
    """ln π(y|x) of each row, summed over its response tokens: [R].

    Only positions that predict a response token meet the unembedding.
    """
    hidden_RTD = _hidden(model, batch)
    predicts_RT = batch.response_mask_RT[:, 1:]
    logits_NV = _widened(model.get_output_embeddings()(hidden_RTD[:, :-1][predicts_RT]))
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    targets_N = batch.input_ids_RT[:, 1:][predicts_RT]
    log_prob_N = -F.cross_entropy(logits_NV, targets_N, reduction="none")
    row_N = predicts_RT.nonzero()[:, 0]
    sums_R = torch.zeros(len(batch.last_R), dtype=log_prob_N.dtype, device=log_prob_N.device)
    return sums_R.index_add(0, row_N, log_prob_N)


def reward_module(spec: RewardSpec, model: Any) -> nn.Module:
    """The module that computes `spec` on `model` (a sequence classifier for ex_rm, else a causal LM)."""
    if spec.kind == "ex_rm":
        return ExplicitReward(model)
    assert spec.beta is not None
    return ImplicitReward(model, spec.beta)
