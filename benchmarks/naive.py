"""The paper's recipe as a researcher would write it: padded rows, whole-vocabulary logits, a reference model in memory.

Shapes: P pairs of a step, R = 2P rows (chosen rows first), T tokens of the longest row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.data import pad_id_of, parameter_bytes
from benchmarks.turns import BETA, HEAD_SEED, LEARNING_RATE, Job, Kind
from trainers.models.loading import DTYPES, device, initialise_head
from trainers.pairs.tokens import TokenPair
from trainers.specs import Precision

# Where a trained model is scored, its weights differ from the reference's: margins of 0 would compare nothing.
_TRAINED = 1.001


def load_policy(model: str, kind: Kind, precision: Precision = "fp32") -> Any:
    """The model to train, with fused attention; every contender starts from these weights."""
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    options: dict[str, Any] = {"dtype": DTYPES[precision], "attn_implementation": "sdpa"}
    if kind == "im_rm":
        return AutoModelForCausalLM.from_pretrained(model, **options).to(device())
    policy = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **options)
    policy.config.pad_token_id = pad_id_of(model)
    initialise_head(policy, HEAD_SEED)
    return policy.to(device())


def pretend_trained(policy: Any) -> None:
    """Change the weights a little, the same way for every contender."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(_TRAINED)


def padded_rows(pairs: Sequence[TokenPair], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and response mask, [R, T], padded at the right to the longest row."""
    rows = [pair.prompt + pair.chosen for pair in pairs] + [pair.prompt + pair.rejected for pair in pairs]
    ids_RT = torch.full((len(rows), max(map(len, rows))), pad_id)
    mask_RT = torch.zeros_like(ids_RT)
    response_RT = torch.zeros_like(ids_RT)
    for number, row in enumerate(rows):
        ids_RT[number, : len(row)] = torch.tensor(row)
        mask_RT[number, : len(row)] = 1
        response_RT[number, len(pairs[number % len(pairs)].prompt) : len(row)] = 1
    return ids_RT.to(device()), mask_RT.to(device()), response_RT.to(device())


def log_prob_sums(model: Any, ids_RT: Tensor, mask_RT: Tensor, response_RT: Tensor) -> Tensor:
    """ln π(y|x) of each row, from the logits of every position over the whole vocabulary."""
    logits_RTV = model(input_ids=ids_RT, attention_mask=mask_RT, use_cache=False).logits
    log_probs_RTV = torch.log_softmax(logits_RTV[:, :-1].float(), dim=-1)
    log_prob_RT = log_probs_RTV.gather(2, ids_RT[:, 1:, None]).squeeze(2)
    return (log_prob_RT * response_RT[:, 1:]).sum(1)


class NaiveContender:
    """Trains `batch` pairs a step in one forward; scores in batches of as many, in the order given.

    In bf16 the weights themselves are bf16, as where a script loads the model so and trains it.
    """

    # The reference runs with every batch, so nothing is done beforehand.
    prepass_seconds = 0.0

    def __init__(self, job: Job, pairs: Sequence[TokenPair]) -> None:
        self._kind, self._batch = job.kind, job.batch
        self._pad_id = pad_id_of(job.model)
        self._policy = load_policy(job.model, job.kind, job.precision)
        self.parameter_bytes = parameter_bytes(self._policy)
        self._reference = None
        if job.kind == "im_rm":
            self._reference = load_policy(job.model, "im_rm", job.precision).eval().requires_grad_(False)
        if job.task == "train":
            self._policy.train()
            self._optimizer = torch.optim.AdamW(self._policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        else:
            self._policy.eval()
            pretend_trained(self._policy)

    def _rewards(self, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        ids_RT, mask_RT, response_RT = padded_rows(pairs, self._pad_id)
        if self._reference is None:
            output = self._policy(input_ids=ids_RT, attention_mask=mask_RT, use_cache=False)
            chosen_P, rejected_P = output.logits.squeeze(1).float().chunk(2)
            return chosen_P, rejected_P
        policy_R = log_prob_sums(self._policy, ids_RT, mask_RT, response_RT)
        with torch.no_grad():
            reference_R = log_prob_sums(self._reference, ids_RT, mask_RT, response_RT)
        chosen_P, rejected_P = (BETA * (policy_R - reference_R)).chunk(2)
        return chosen_P, rejected_P

    def step(self, pairs: Sequence[TokenPair]) -> float:
        """One optimiser step; its loss."""
        chosen_P, rejected_P = self._rewards(pairs)
        loss = -F.logsigmoid(chosen_P - rejected_P).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def naive_scores(self, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        """Rewards of (chosen, rejected) responses in the order of `pairs`."""
        with torch.no_grad():
            batches = [
                self._rewards(pairs[start : start + self._batch])
                for start in range(0, len(pairs), self._batch)
            ]
        return torch.cat([chosen for chosen, _ in batches]), torch.cat([rejected for _, rejected in batches])

    def mean_margin(self, pairs: Sequence[TokenPair]) -> float:
        """Score the pairs; the mean margin, for comparison with other contenders."""
        chosen, rejected = self.naive_scores(pairs)
        return (chosen - rejected).mean().item()
