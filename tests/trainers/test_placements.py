"""However a training is laid out, it is plain AdamW: ZeRO × ranks × forwards × recomputation × offload × precision."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import gang, naive
from tests.trainers.gang import Job
from tests.trainers.trainings import load
from trainers.pairs.packing import epoch_order, steps_of_epoch
from trainers.specs import OptimSpec

# Two steps an epoch, the second of one pair; ten in all.
PAIRS = 17
EFFECTIVE_BATCH = 16
OPTIM = OptimSpec(lr=1e-3, epochs=5, effective_batch=EFFECTIVE_BATCH)
FP32_TOLERANCE, BF16_TOLERANCE = 1e-5, 2e-3

FACTORS = {
    "zero_stage": (0, 1, 2, 3),
    "world_size": (1, 2),
    # Of a step of about 900 tokens in pairs of 16 and 106: a pair each, some, half of them, all at once.
    "forward_tokens": (1, 300, 600, 4000),
    "checkpointing": (False, True),
    "offload_optimizer": (False, True),
    "precision": ("fp32", "bf16"),
    "reward": ("ex_rm", "im_rm"),
}
Run = dict[str, object]
REWARDS = {"ex_rm": gang.EX_RM, "im_rm": gang.IM_RM}


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
    reward = REWARDS[str(run["reward"])]
    placement = {key: run[key] for key in FACTORS if key not in ("precision", "reward")}
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


def naive_training(folder: Path, kind: str):
    """Losses, gradient norms and final weights of plain AdamW, one row at a time."""
    pairs, spec = gang.pairs_for(folder, PAIRS), REWARDS[kind]
    model = naive.plain(load(folder, spec.type.output, head_seed=gang.SEED))
    reference = naive.reference(model, pairs) if spec.uses_reference else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, weight_decay=0)
    losses, norms = [], []
    for epoch in range(OPTIM.epochs):
        for step in steps_of_epoch(epoch_order(PAIRS, gang.SEED, epoch), EFFECTIVE_BATCH):
            optimizer.zero_grad()
            total = 0.0
            for position in step:
                _, _, loss = naive.rewards(model, spec, [pairs[position]], reference)
                (loss / len(step)).sum().backward()
                total += loss.item() / len(step)
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            optimizer.step()
            losses.append(total)
    return losses, norms, dict(model.named_parameters())


@pytest.fixture(scope="module")
def truth(tiny_model):
    return {kind: naive_training(tiny_model, kind) for kind in FACTORS["reward"]}


def check(runs: Sequence[Run], found: dict[str, dict], truth, folder: Path) -> None:
    """Every run against plain AdamW; bf16 runs against each other, and not far from it."""
    first_bf16: dict[object, list[float]] = {}
    for run in runs:
        losses, norms, weights = truth[run["reward"]]
        log = found[name_of(run)]["log"]
        here = [row["loss"] for row in log]
        if run["precision"] == "bf16":
            own = first_bf16.setdefault(run["reward"], here)
            assert here == pytest.approx(own, abs=BF16_TOLERANCE), run
            assert here == pytest.approx(losses, abs=5 * BF16_TOLERANCE), run
            continue
        assert here == pytest.approx(losses, abs=FP32_TOLERANCE), run
        assert [row["grad_norm"] for row in log] == pytest.approx(norms, rel=1e-4), run
        saved = load_file(folder / name_of(run) / "model" / "model.safetensors")
        assert set(saved) == set(weights)
        for name, weight in weights.items():
            assert (saved[name] - weight).norm() <= 1e-4 * weight.norm(), (run, name)


def test_every_two_settings_together_train_as_plain_adamw(truth, tiny_model, tmp_path):
    runs = all_pairs_cover()
    check(runs, run_all(runs, tiny_model, tmp_path), truth, tmp_path)


def test_ranks_that_do_not_divide_the_batch_train_as_plain_adamw(truth, tiny_model, tmp_path):
    """Steps of 16 pairs and of one on three ranks: two of them then compute for nothing."""
    runs = [
        dict(zip(FACTORS, (stage, 3, tokens, False, False, "fp32", "im_rm"), strict=True))
        for stage, tokens in ((1, 300), (3, 600))
    ]
    jobs = [job(run, tiny_model, tmp_path) for run in runs]
    check(runs, gang.launch(jobs, tmp_path / "gang", 3), truth, tmp_path)


def test_validation_between_steps_leaves_partitioned_weights_trainable(truth, tiny_model, tmp_path):
    runs = [
        dict(zip(FACTORS, (3, 2, 600, checkpointing, False, "fp32", "ex_rm"), strict=True))
        for checkpointing in (False, True)
    ]
    jobs = [
        dataclasses.replace(job(run, tiny_model, tmp_path), validation=5, partitions_all=True) for run in runs
    ]
    found = gang.launch(jobs, tmp_path / "gang", 2)
    check(runs, found, truth, tmp_path)
    validated = [[row["validation_accuracy"] for row in found[name_of(run)]["log"]] for run in runs]
    assert [accuracy is None for accuracy in validated[0]] == [True, False] * OPTIM.epochs
    assert validated[0] == validated[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("zero_stage", FACTORS["zero_stage"])
def test_all_settings_train_as_plain_adamw(truth, tiny_model, tmp_path, zero_stage):
    runs = [run for run in full_product() if run["zero_stage"] == zero_stage]
    check(runs, run_all(runs, tiny_model, tmp_path), truth, tmp_path)


def test_the_cover_shows_every_two_settings_together():
    cover = all_pairs_cover()
    assert len(cover) <= 24
    assert set().union(*map(pairs_of, cover)) == set().union(*map(pairs_of, full_product()))
    assert {(run["zero_stage"], run["world_size"]) for run in cover} == set(
        itertools.product((0, 1, 2, 3), (1, 2))
    )
