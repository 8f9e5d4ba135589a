"""How long stages take: by size where nothing was measured, by the mean of finished trainings where something was."""

import dataclasses
import math

import pytest
from sweep_samples import LLAMA, plan, trial

from orchestrator.plan import estimate
from orchestrator.plan.durations import (
    UNSEEN_LENGTHS,
    Durations,
    expected_s,
    measured_rates,
    rate_name,
    slowest,
)
from orchestrator.plan.estimate import Lengths, Rate
from orchestrator.plan.hardware import GpuKind, NodeGroup, gpu_kind
from orchestrator.plan.placement import need_of
from orchestrator.plan.schedule import UNKNOWN_S
from orchestrator.spec import catalog
from orchestrator.spec.trial_plan import TrialPlan
from orchestrator.store.artifacts import Store
from trainers.specs import DrawSpec, ModelSpec, OptimSpec, Placement

H100, L4 = gpu_kind("H100"), gpu_kind("L4")
KNOWN = catalog.PAPER_MODELS[0]


def sized(pairs: int = 64, epochs: int = 1, model: ModelSpec = KNOWN) -> TrialPlan:
    return plan(
        trial(
            model=model,
            optim=OptimSpec(epochs=epochs),
            train_draw=DrawSpec(max_pairs=pairs),
            eval_draw=DrawSpec(max_pairs=pairs),
        )
    )


def laid(world_size: int = 1) -> Placement:
    return Placement(world_size=world_size, micro_batch=1, accumulation=32 // world_size, device="cuda")


def test_the_gate_expects_what_the_plan_says(store: Store):
    """Both go by estimate.py, a step and a set-up at a time."""
    item = sized(pairs=64, epochs=3)
    training = need_of(item.spec).training
    rows = min(64, item.train.prepared.split.rows)
    step_s = estimate.step_s(training, UNSEEN_LENGTHS, laid(), H100)
    expected = estimate.SET_UP_S["cuda"] + 3 * math.ceil(rows / 32) * step_s
    found = expected_s(item, "train", laid(), Durations(store=store, kind=H100))
    assert found == pytest.approx(expected)


def test_more_epochs_take_longer_and_more_or_faster_gpus_shorter(store: Store):
    fast, slow = (Durations(store=store, kind=kind) for kind in (H100, L4))
    once = expected_s(sized(), "train", laid(), fast)
    assert expected_s(sized(epochs=2), "train", laid(), fast) > once
    assert expected_s(sized(), "train", laid(2), fast) < once
    assert expected_s(sized(), "train", laid(), slow) > once
    largest = max(catalog.PAPER_MODELS, key=lambda model: model.parameters or 0)
    larger = dataclasses.replace(largest, precision=KNOWN.precision)
    assert expected_s(sized(model=larger), "train", laid(), fast) > once
    alone = Placement(micro_batch=1, accumulation=32)
    tiny = plan(trial(model=LLAMA))
    on_cpu = Durations(store=store)
    assert expected_s(tiny, "evaluate", alone, on_cpu) < expected_s(tiny, "train", alone, on_cpu) < 60


def test_a_prepared_set_says_how_many_pairs_it_has_and_how_long(store: Store):
    item = sized()
    before = expected_s(item, "train", laid(), Durations(store=store, kind=H100))
    with store.write("prepare", item.train.prepared.key) as attempt:
        attempt.info.update(pairs=320, mean_tokens={"prompt": 10.0, "chosen": 5.0, "rejected": 5.0})
    step_s = estimate.step_s(
        need_of(item.spec).training, Lengths(prompt=10, chosen=5, rejected=5), laid(), H100
    )
    after = expected_s(item, "train", laid(), Durations(store=store, kind=H100))
    assert after == pytest.approx(estimate.SET_UP_S["cuda"] + 10 * step_s)
    assert after != before


def test_a_model_of_unknown_size_gets_the_gates_own_guess(store: Store):
    unknown = sized(model=ModelSpec(name="hub", source="some/model"))
    for kind in ("train", "evaluate"):
        assert expected_s(unknown, kind, laid(), Durations(store=store, kind=H100)) == UNKNOWN_S


def test_finished_trainings_of_one_name_replace_the_guess_by_their_mean(store: Store):
    item = sized(pairs=32, epochs=4)
    name = rate_name(item, laid())
    guessed = Durations(store=store, kind=H100)
    once = guessed.having({name: Rate(step_s=2.0, set_up_s=10.0)})
    assert expected_s(item, "train", laid(), once) == pytest.approx(10 + 4 * 2)
    more = once.having({name: Rate(step_s=5.0, set_up_s=40.0, trainings=2)})
    assert expected_s(item, "train", laid(), more) == pytest.approx(30 + 4 * 4)
    # Laid out otherwise nothing is known of it.
    assert expected_s(item, "train", laid(2), more) == expected_s(item, "train", laid(2), guessed)


def test_rates_are_read_of_what_the_store_has(store: Store):
    items = [plan(trial(seed=seed)) for seed in (0, 1, 2)]
    for item, step_s in zip(items[:2], (1.0, 3.0), strict=True):
        with store.write("train", item.key) as attempt:
            placement = {name: getattr(laid(), name) for name in Placement.__slots__}
            attempt.info.update(perf={"step_s": step_s, "set_up_s": 8.0}, placement=placement)
    named = {item.key: (item.spec.model.name, item.spec.reward_name) for item in items}
    found = measured_rates(named, store)
    assert found == {rate_name(items[0], laid()): Rate(step_s=2.0, set_up_s=8.0, trainings=2)}


def test_a_gang_may_get_the_slowest_gpus_there_are():
    groups = [NodeGroup(count=1, cpus=8, gpus=8, kind=kind) for kind in (H100, L4)]
    assert isinstance(slowest(groups), GpuKind)
    assert slowest(groups) == L4
    assert slowest([NodeGroup(count=1, cpus=8)]) is None
