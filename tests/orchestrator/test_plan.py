"""Placements keep the effective batch."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_samples import LLAMA, trial

from orchestrator import catalog
from orchestrator.plan import (
    STATE_SHARE,
    Node,
    fits_gpus,
    gpu_state_gb,
    local_capacity,
    place,
    require_fit,
)
from orchestrator.spec import PlacementRule
from trainers.errors import PlanError
from trainers.specs import ModelSpec, OptimSpec

BATCHES = st.integers(1, 96)
SMALL, MEDIUM, LARGE = 100_000_000, 1_500_000_000, 8_000_000_000
HUB = ModelSpec(name="hub", source="some/model", parameters=SMALL)
NO_GPU = (Node(id="a", cpus=2),)


def gpus(count: int, gb: float = 80.0) -> tuple[Node, ...]:
    return (Node(id="g", cpus=16, gpus=count, gpu_gb=gb),)


def rule(world_size: int, zero_stage: int = 2) -> PlacementRule:
    return PlacementRule(match=(("model", "*"),), world_size=world_size, zero_stage=zero_stage)


@given(
    batch=BATCHES, world_size=st.integers(1, 16), cpus=st.integers(1, 16), model=st.sampled_from([LLAMA, HUB])
)
def test_on_cpus_the_effective_batch_is_exact(batch: int, world_size: int, cpus: int, model: ModelSpec):
    spec = trial(model=model, optim=OptimSpec(effective_batch=batch))
    placement = place(spec, [Node(id="a", cpus=cpus)], [rule(world_size)])
    assert placement.effective_batch == batch
    assert placement.world_size in (1, world_size)
    assert placement.world_size <= cpus
    assert placement.device == "cpu"


@given(
    batch=BATCHES,
    counts=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    gb=st.sampled_from([24.0, 80.0, 141.0]),
    parameters=st.sampled_from([None, SMALL, MEDIUM, LARGE]),
)
def test_on_gpus_the_effective_batch_is_exact_and_the_state_fits(
    batch: int, counts: list[int], gb: float, parameters: int | None
):
    nodes = [Node(id=f"n{i}", cpus=8, gpus=count, gpu_gb=gb) for i, count in enumerate(counts)]
    model = ModelSpec(name="hub", source="some/model", parameters=parameters)
    try:
        placement = place(trial(model=model, optim=OptimSpec(effective_batch=batch)), nodes)
    except PlanError:
        assert gpu_state_gb(parameters or 0) > gb * STATE_SHARE, "a model that fits one GPU is always placed"
        return
    assert placement.effective_batch == batch
    assert placement.world_size <= sum(counts)
    assert gpu_state_gb(parameters or 0) / placement.world_size <= gb * STATE_SHARE
    assert placement.device == "cuda"


def test_a_rule_lays_its_trials_on_a_gang_and_leaves_the_others_alone():
    rules = [PlacementRule(match=(("reward", "im_rm"), ("model", "llama*")), world_size=2, zero_stage=3)]
    gang = place(trial(), NO_GPU, rules)
    assert (gang.world_size, gang.zero_stage) == (2, 3)
    alone = place(trial(model=replace(LLAMA, name="other")), NO_GPU, rules)
    assert (alone.world_size, alone.zero_stage) == (1, 0)


def test_a_rule_wider_than_the_machine_or_the_batch_falls_back_to_one_process():
    assert place(trial(), NO_GPU, [rule(4)]).world_size == 1
    assert place(trial(optim=OptimSpec(effective_batch=7)), NO_GPU, [rule(2)]).world_size == 1


def test_a_large_model_is_divided_over_gpus_under_zero_3():
    large = ModelSpec(name="hub", source="some/model", parameters=LARGE)
    placement = place(trial(model=large), gpus(8))
    assert (placement.world_size, placement.zero_stage) == (4, 3)


def test_a_model_too_large_for_the_gpus_is_refused_and_named():
    large = ModelSpec(name="giant", source="some/model", parameters=LARGE)
    with pytest.raises(PlanError, match="giant"):
        place(trial(model=large), gpus(1, 24.0))


def test_a_batch_that_no_wide_enough_gang_divides_is_said_to_be_the_fault():
    large = ModelSpec(name="giant", source="some/model", parameters=LARGE)
    assert place(trial(model=large), gpus(8)).world_size == 4
    with pytest.raises(PlanError, match="batch"):
        place(trial(model=large, optim=OptimSpec(effective_batch=5)), gpus(8))


def test_every_cell_of_the_laptop_profile_is_placed_on_two_cores():
    laptop = catalog.LAPTOP
    for model in laptop.models:
        for dataset in laptop.train_sets:
            spec = trial(model=model, train_set=dataset, optim=catalog.recipe(model, dataset))
            assert place(spec, NO_GPU, laptop.placements).effective_batch == spec.optim.effective_batch


def test_without_a_gpu_models_of_known_size_are_refused_all_in_one_message():
    with pytest.raises(PlanError) as raised:
        require_fit([*catalog.PAPER_MODELS, LLAMA], NO_GPU)
    for model in catalog.PAPER_MODELS:
        assert model.name in str(raised.value)
    assert LLAMA.name not in str(raised.value)


def test_without_a_gpu_models_of_unknown_size_are_let_through():
    require_fit([LLAMA, ModelSpec(name="mine", source="/models/mine")], NO_GPU)


def test_with_gpus_only_the_models_that_do_not_fit_are_refused():
    require_fit(catalog.PAPER_MODELS, gpus(8))
    with pytest.raises(PlanError, match=r"8b \(128 GB") as raised:
        require_fit(catalog.PAPER_MODELS, gpus(1))
    assert "llama-3.2-1b" not in str(raised.value)


def test_no_gpu_fits_nothing():
    assert not fits_gpus([LLAMA], NO_GPU)


def test_the_local_machine_has_at_least_one_cpu():
    (node,) = local_capacity()
    assert node.cpus >= 1
