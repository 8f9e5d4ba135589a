"""ZeRO stages 0–3 at world size 1 and 2 are plain AdamW at world size 1, written out here the naive way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.trainers import zero_rank
from trainers.models import HEAD_STD
from trainers.pairs import epoch_order, steps_of_epoch
from trainers.specs import RewardSpec

TOLERANCE = 1e-5


def naive_log_prob(model, prompt, response):
    """Full logits of one row; the sum over its response tokens."""
    row = torch.tensor([prompt + response])
    log_probs = model(input_ids=row).logits[0].log_softmax(-1)
    positions = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(log_probs[position, row[0, position + 1]] for position in positions)


def naive_training(folder: Path, reward: RewardSpec):
    """Losses, gradient norms and final weights of plain AdamW, one row at a time."""
    pairs, optim = zero_rank.pairs_for(folder), zero_rank.OPTIM
    if reward.kind == "ex_rm":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(zero_rank.SEED))
        model.score.weight.data = head * HEAD_STD

        def score(pair, response):
            hidden = model.model(input_ids=torch.tensor([pair.prompt + response])).last_hidden_state
            return (model.score.weight @ hidden[0, -1]).squeeze()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        frozen = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)

        def score(pair, response):
            log_ratio = naive_log_prob(model, pair.prompt, response) - naive_log_prob(
                frozen, pair.prompt, response
            )
            return reward.beta * log_ratio

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0
    )
    losses, norms = [], []
    for epoch in range(optim.epochs):
        for step in steps_of_epoch(epoch_order(len(pairs), zero_rank.SEED, epoch), optim.effective_batch):
            margins = torch.stack(
                [score(pairs[i], pairs[i].chosen) - score(pairs[i], pairs[i].rejected) for i in step]
            )
            loss = -F.logsigmoid(margins).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            optimizer.step()
            losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


@pytest.fixture(scope="module")
def naive(tiny_model):
    return {reward.kind: naive_training(tiny_model, reward) for reward in zero_rank.REWARDS}


@pytest.fixture(scope="module", params=[1, 2], ids=["world1", "world2"])
def trained(request, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"world{request.param}")
    launcher = [sys.executable]
    if request.param > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    command = [*launcher, zero_rank.__file__, str(tiny_model), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_trajectory_and_weights_are_those_of_plain_adamw(trained, naive, zero_stage, kind):
    out, found = trained
    losses, norms, weights = naive[kind]
    run = found[f"zero{zero_stage}-{kind}"]
    assert run["loss"] == pytest.approx(losses, abs=TOLERANCE)
    assert run["grad_norm"] == pytest.approx(norms, rel=1e-4)
    saved = load_file(out / f"zero{zero_stage}-{kind}" / "model" / "model.safetensors")
    assert set(saved) == set(weights)
    for name, weight in weights.items():
        assert (saved[name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_losses_differ_between_reward_types_and_fall(naive):
    ex_rm, im_rm = naive["ex_rm"][0], naive["im_rm"][0]
    assert im_rm[0] == pytest.approx(0.6931, abs=1e-3)
    assert abs(ex_rm[0] - im_rm[0]) > 1e-3
    assert ex_rm[-1] < ex_rm[0]
    assert im_rm[-1] < im_rm[0]
