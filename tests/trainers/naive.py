"""What rewards and gradients are by definition: one row at a time, transformers' own attention, full logits."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.models.attention import backbone
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec


def plain(model: Any) -> Any:
    """A copy of `model` with an attention of transformers."""
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    plain_model = copy.deepcopy(model)
    plain_model.set_attn_implementation("eager" if capped else "sdpa")
    return plain_model


def log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """ln π of each token of the response."""
    return _of_tokens(_all_logits(model, prompt, response).log_softmax(-1), prompt, response)


def logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """The logit of each token of the response."""
    return _of_tokens(_all_logits(model, prompt, response), prompt, response)


def _all_logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]


def _of_tokens(every: Tensor, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    places = enumerate(response, len(prompt) - 1)
    return torch.stack([every[place, token] for place, token in places])


def log_prob_sum(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """ln π(response | prompt)."""
    return log_probs(model, prompt, response).sum()


def log_prob_sums(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """Of all chosen, then all rejected responses."""
    sums = [log_prob_sum(model, pair.prompt, pair.chosen) for pair in pairs]
    return torch.stack(sums + [log_prob_sum(model, pair.prompt, pair.rejected) for pair in pairs])


def reference(model: Any, pairs: Sequence[TokenPair]) -> dict[int, tuple[float, float]]:
    """Index of each pair → (chosen, rejected) log-prob sums."""
    with torch.no_grad():
        chosen, rejected = log_prob_sums(model, pairs).chunk(2)
    return {pair.index: (float(c), float(r)) for pair, c, r in zip(pairs, chosen, rejected, strict=True)}


def rewards(
    model: Any,
    spec: RewardSpec,
    pairs: Sequence[TokenPair],
    reference: dict[int, tuple[float, float]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen rewards, rejected rewards, losses."""
    chosen, rejected, losses = [], [], []
    for pair in pairs:
        if spec.kind == "ex_grm":
            yes, no = pair.chosen[-1], pair.rejected[-1]
            answers = [
                log_prob_sum(model, pair.prompt + response[:-1], [answer])
                for response, answer in ((pair.chosen, yes), (pair.rejected, yes), (pair.rejected, no))
            ]
            found = [answers[0].exp(), answers[1].exp()]
            losses.append(-(answers[0] + answers[2]) / 2)
        else:
            halves = enumerate((pair.chosen, pair.rejected))
            found = [
                _reward(model, spec, pair, response, reference and reference[pair.index][side])
                for side, response in halves
            ]
            losses.append(-F.logsigmoid(found[0] - found[1]))
        chosen.append(found[0])
        rejected.append(found[1])
    return torch.stack(chosen), torch.stack(rejected), torch.stack(losses)


def _reward(
    model: Any, spec: RewardSpec, pair: TokenPair, response: list[int], reference: float | None
) -> Tensor:
    if spec.kind == "im_rm_logits":
        return spec.beta * logits(model, pair.prompt, response).sum()
    if spec.kind == "im_rm_hybrid":
        kinds = RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=spec.beta, reference=spec.reference)
        return sum(_reward(model, kind, pair, response, reference) for kind in kinds)
    if spec.kind.startswith("im_rm"):
        log_ratio = log_prob_sum(model, pair.prompt, response) - (reference if spec.reference else 0)
        return spec.beta * log_ratio / (1 if spec.kind == "im_rm" else len(response))
    row = torch.tensor([pair.prompt + response])
    output_T = backbone(model)(input_ids=row, use_cache=False).last_hidden_state[0] @ model.score.weight[0]
    return output_T[-1] if spec.pooling == "last" else output_T[len(pair.prompt) :].mean()
