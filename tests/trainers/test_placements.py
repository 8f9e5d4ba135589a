"""However a training is laid out, it is plain AdamW: ZeRO × ranks × micro-batch × recomputation × offload × precision."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.trainers import gang
from tests.trainers.gang import Job
from trainers.batching import epoch_order, steps_of_epoch
from trainers.models import HEAD_STD
from trainers.specs import OptimSpec

# Three steps an epoch, the last of them of one pair.
PAIRS = 33
EFFECTIVE_BATCH = 16
OPTIM = OptimSpec(lr=1e-3, epochs=4, effective_batch=EFFECTIVE_BATCH)
FP32_TOLERANCE, BF16_TOLERANCE = 1e-5, 2e-3

FACTORS = {
    "zero_stage": (0, 1, 2, 3),
    "world_size": (1, 2),
    "micro_batch": (1, 2, 4, 8),
    "checkpointing": (False, True),
    "offload_optimizer": (False, True),
    "precision": ("fp32", "bf16"),
    "reward": ("ex_rm", "im_rm"),
}
Run = dict[str, object]


def possible(run: Run) -> bool:
    """Without ZeRO there is no state to offload."""
    return not (run["zero_stage"] == 0 and run["offload_optimizer"])


def full_product() -> list[Run]:
    runs = (dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values()))
    return [run for run in runs if possible(run)]


def pairs_of(run: Run) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    return set(itertools.combinations(sorted(run.items()), 2))


def all_pairs_cover() -> list[Run]:
    """Greedily, the runs that between them show every two settings together that can be together."""
    candidates = full_product()
    missing = set().union(*map(pairs_of, candidates))
    cover = []
    while missing:
        best = max(candidates, key=lambda run: len(pairs_of(run) & missing))
        cover.append(best)
        missing -= pairs_of(best)
    return cover


def name_of(run: Run) -> str:
    return "-".join(str(value) for value in run.values())


def job(run: Run, model: Path, folder: Path) -> Job:
    rewards = {"ex_rm": gang.EX_RM, "im_rm": gang.IM_RM}
    reward = rewards[str(run["reward"])]
    placement = {
        key: run[key]
        for key in ("zero_stage", "world_size", "micro_batch", "checkpointing", "offload_optimizer")
    }
    placement["accumulation"] = EFFECTIVE_BATCH // (int(run["world_size"]) * int(run["micro_batch"]))
    return Job(
        name=name_of(run),
        model=str(model),
        out=str(folder / name_of(run)),
        reward={"kind": reward.kind, "beta": reward.beta},
        placement=placement,
        optim={"lr": OPTIM.lr, "epochs": OPTIM.epochs, "effective_batch": EFFECTIVE_BATCH},
        pairs=PAIRS,
        precision=str(run["precision"]),
    )


def run_all(runs: Iterable[Run], model: Path, folder: Path) -> dict[str, dict]:
    found = {}
    for world_size in (1, 2):
        jobs = [job(run, model, folder) for run in runs if run["world_size"] == world_size]
        found |= gang.launch(jobs, folder / f"world{world_size}", world_size)
    return found


def naive_log_prob(model, prompt, response):
    """Full logits of one row; the sum over its response tokens."""
    row = torch.tensor([prompt + response])
    log_probs = model(input_ids=row).logits[0].log_softmax(-1)
    positions = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(log_probs[position, row[0, position + 1]] for position in positions)


def naive_training(folder: Path, kind: str):
    """Losses, gradient norms and final weights of plain AdamW, one row at a time."""
    pairs = gang.pairs_for(folder, PAIRS)
    if kind == "ex_rm":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(gang.SEED))
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
            return gang.IM_RM.beta * log_ratio

    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, weight_decay=0)
    losses, norms = [], []
    for epoch in range(OPTIM.epochs):
        for step in steps_of_epoch(epoch_order(PAIRS, gang.SEED, epoch), EFFECTIVE_BATCH):
            optimizer.zero_grad()
            total = 0.0
            for pair in (pairs[position] for position in step):
                loss = -F.logsigmoid(score(pair, pair.chosen) - score(pair, pair.rejected)) / len(step)
                loss.backward()
                total += loss.item()
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            optimizer.step()
            losses.append(total)
    return losses, norms, dict(model.named_parameters())


@pytest.fixture(scope="module")
def naive(tiny_model):
    return {kind: naive_training(tiny_model, kind) for kind in FACTORS["reward"]}


def curve(found: dict[str, dict], run: Run) -> list[float]:
    return [row["loss"] for row in found[name_of(run)]["log"]]


def check(runs: Sequence[Run], found: dict[str, dict], naive, folder: Path) -> None:
    """Every run against plain AdamW; bf16 runs against each other, and not far from it."""
    first_bf16: dict[object, list[float]] = {}
    for run in runs:
        losses, norms, weights = naive[run["reward"]]
        here = curve(found, run)
        if run["precision"] == "bf16":
            own = first_bf16.setdefault(run["reward"], here)
            assert here == pytest.approx(own, abs=BF16_TOLERANCE), run
            assert here == pytest.approx(losses, abs=5 * BF16_TOLERANCE), run
            continue
        assert here == pytest.approx(losses, abs=FP32_TOLERANCE), run
        assert [row["grad_norm"] for row in found[name_of(run)]["log"]] == pytest.approx(norms, rel=1e-4), run
        saved = load_file(folder / name_of(run) / "model" / "model.safetensors")
        assert set(saved) == set(weights)
        for name, weight in weights.items():
            assert (saved[name] - weight).norm() <= 1e-4 * weight.norm(), (run, name)


def test_the_cover_shows_every_two_settings_together():
    cover = all_pairs_cover()
    assert len(cover) <= 24
    assert set().union(*map(pairs_of, cover)) == set().union(*map(pairs_of, full_product()))
    assert {(run["zero_stage"], run["world_size"]) for run in cover} == set(
        itertools.product((0, 1, 2, 3), (1, 2))
    )


def test_every_two_settings_together_train_as_plain_adamw(naive, tiny_model, tmp_path):
    runs = all_pairs_cover()
    check(runs, run_all(runs, tiny_model, tmp_path), naive, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("zero_stage", FACTORS["zero_stage"])
def test_all_settings_train_as_plain_adamw(naive, tiny_model, tmp_path, zero_stage):
    runs = [run for run in full_product() if run["zero_stage"] == zero_stage]
    check(runs, run_all(runs, tiny_model, tmp_path), naive, tmp_path)


def test_losses_differ_between_reward_types_and_fall(naive):
    ex_rm, im_rm = naive["ex_rm"][0], naive["im_rm"][0]
    assert im_rm[0] == pytest.approx(0.6931, abs=1e-4)
    assert abs(ex_rm[0] - im_rm[0]) > 1e-3
    assert ex_rm[-1] < ex_rm[0]
    assert im_rm[-1] < im_rm[0]
