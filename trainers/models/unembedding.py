"""Log-probabilities of given tokens, without a [tokens × vocabulary] tensor.

The unembedding is applied in blocks of the vocabulary, and again in the backward pass: memory does not grow with the
vocabulary, and the weight's gradient is written once. Logits are summed in fp32 or wider whatever the model's precision:
half precision is widened first, except bf16 on a GPU, for which tensor cores give the same products. There the logits'
gradient is rounded to the weight's precision, as their product requires.

Shapes: M response tokens, D hidden, V vocabulary, C vocabulary entries of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits held at a time, in fp32: 64 MB on a GPU; 8 MB on a CPU, whose allocator maps anything large afresh each time.
_BLOCK_ELEMENTS = 1 << 24
_BLOCK_ELEMENTS_ON_CPU = 1 << 21
_SMALLEST_BLOCK = 256


class Unembedding(nn.Linear):
    """A language model's output layer that returns the log-probabilities (or logits) of given targets.

    It is called once per forward, so that ZeRO-3 gathers its weight once. Without targets it is a linear layer. The
    model's logits are c·tanh(s·Wh / c), with the scale s and the soft-cap c, or s·Wh without a cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def forward(self, input: Tensor, target_M: Tensor | None = None, *, normalised: bool = True) -> Tensor:
        """[M, D] hidden states and [M] token ids → [M] log-probabilities, or logits, fp32 or wider."""
        if target_M is None:
            return super().forward(input)
        hidden_MD = input if self.scale == 1 else input * self.scale
        if not normalised:
            logit_M = (widened(hidden_MD) * widened(self.weight[target_M])).sum(1)
            logit_M = logit_M if self.bias is None else logit_M + widened(self.bias[target_M])
            return logit_M if self.softcap is None else self.softcap * (logit_M / self.softcap).tanh()
        log_prob_M: Tensor = _TokenLogProbs.apply(hidden_MD, self.weight, self.bias, target_M, self.softcap)
        return log_prob_M


def token_log_probs(model: Any, hidden_MD: Tensor, target_M: Tensor) -> Tensor:
    """Return ln π of each target token after its hidden state, [M]."""
    log_prob_M: Tensor = model.get_output_embeddings()(hidden_MD, target_M)
    return log_prob_M


def token_logits(model: Any, hidden_MD: Tensor, target_M: Tensor) -> Tensor:
    """Return the logit of each target token after its hidden state, [M]; no other logit is computed."""
    logit_M: Tensor = model.get_output_embeddings()(hidden_MD, target_M, normalised=False)
    return logit_M


def widened(values: Tensor) -> Tensor:
    """Return half precision as fp32, and fp32 and fp64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _on_tensor_cores(values: Tensor) -> bool:
    """Return whether to multiply on tensor cores, which sum in fp32: bf16 on NVIDIA's GPUs (fp16 would lose gradients)."""
    return values.is_cuda and values.dtype == torch.bfloat16 and torch.version.hip is None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, summed and given in fp32 or wider."""
    if _on_tensor_cores(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return widened(left) @ widened(right)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_M: Tensor, softcap: float | None
    ) -> Tensor:
        hidden_MD = hidden if _on_tensor_cores(hidden) else widened(hidden)
        highest_M = torch.full_like(
            target_M, -torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        total_M = torch.zeros_like(highest_M)
        of_target_M = torch.zeros_like(highest_M)
        for block in _blocks(hidden_MD, len(weight)):
            logits_MC = _logits(hidden_MD, weight, bias, softcap, block)
            inside_M, column_M = _of_targets(target_M, block)
            picked_M = logits_MC.gather(1, column_M[:, None])[:, 0]
            of_target_M = torch.where(inside_M, picked_M, of_target_M)
            higher_M = torch.maximum(highest_M, logits_MC.amax(1))
            sums_M = logits_MC.sub_(higher_M[:, None]).exp_().sum(1)
            total_M = total_M * (highest_M - higher_M).exp() + sums_M
            highest_M = higher_M
            # So that only one block is alive at a time.
            del logits_MC, picked_M
        normaliser_M = highest_M + total_M.log()
        ctx.save_for_backward(hidden, weight, bias, target_M, normaliser_M)
        ctx.softcap = softcap
        return of_target_M - normaliser_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_M, normaliser_M = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        rounds = _on_tensor_cores(hidden)
        hidden_MD = hidden if rounds else widened(hidden)
        to_hidden_MD = torch.zeros_like(hidden, dtype=gradient_M.dtype) if wants_hidden else None
        to_weight = torch.empty_like(weight) if wants_weight else None
        to_bias = torch.empty_like(bias) if wants_bias else None
        for block in _blocks(hidden_MD, len(weight)):
            logits_MC = _logits(hidden_MD, weight, bias, ctx.softcap, block)
            slope_MC = None if ctx.softcap is None else 1 - (logits_MC / ctx.softcap).square()
            # d log π(target) / d logits is one-hot(target) − π.
            inside_M, column_M = _of_targets(target_M, block)
            to_logits_MC = logits_MC.sub_(normaliser_M[:, None]).exp_().mul_(-gradient_M[:, None])
            # One entry a row, without a search, which would make the CPU wait for the GPU.
            to_logits_MC.scatter_add_(1, column_M[:, None], (gradient_M * inside_M)[:, None])
            if slope_MC is not None:
                to_logits_MC.mul_(slope_MC)
            if to_bias is not None:
                to_bias[block].copy_(to_logits_MC.sum(0))
            if rounds:
                to_logits_MC = to_logits_MC.to(hidden.dtype)
            if to_hidden_MD is not None:
                if rounds:
                    to_hidden_MD += _product(to_logits_MC, weight[block])
                else:
                    to_hidden_MD.addmm_(to_logits_MC, widened(weight[block]))
            if to_weight is not None:
                to_weight[block].copy_(_product(to_logits_MC.T, hidden_MD))
            del logits_MC, to_logits_MC, slope_MC
        to_hidden = None if to_hidden_MD is None else to_hidden_MD.to(hidden.dtype)
        return to_hidden, to_weight, to_bias, None, None


def _blocks(hidden_MD: Tensor, vocabulary: int) -> Iterator[slice]:
    """Divide the vocabulary into blocks that are as large as the limit on logits allows."""
    held = _BLOCK_ELEMENTS_ON_CPU if hidden_MD.device.type == "cpu" else _BLOCK_ELEMENTS
    size = max(_SMALLEST_BLOCK, held // max(1, len(hidden_MD)))
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))


def _of_targets(target_M: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return which targets are in a block of the vocabulary, and their columns in it (any column for the others)."""
    inside_M = (target_M >= block.start) & (target_M < block.stop)
    return inside_M, (target_M - block.start).clamp(0, block.stop - block.start - 1)


def _logits(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, block: slice
) -> Tensor:
    """Return the logits of a block of the vocabulary, [M, C]."""
    logits_MC = _product(hidden_MD, weight_VD[block].T)
    if bias_V is not None:
        logits_MC += widened(bias_V[block])
    if softcap is not None:
        logits_MC.div_(softcap).tanh_().mul_(softcap)
    return logits_MC
