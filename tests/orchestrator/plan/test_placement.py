"""Placements keep the effective batch and the limit; what fits nowhere is refused with what would make it fit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.hardware import Node, read_cluster
from orchestrator.plan.memory import footprint
from orchestrator.plan.placement import fits_gpus, place, require_fit, training_of
from orchestrator.spec import catalog
from orchestrator.spec.trials import PlacementRule, TrialSpec
from tests.orchestrator.sweep_samples import EX_RM, IM_RM, LLAMA, trial
from trainers.errors import PlanError, SpecError
from trainers.models import tiny
from trainers.specs import DrawSpec, LoraSpec, LossSpec, ModelSpec, OptimSpec, Placement

BATCHES = st.integers(1, 96)
# Tokens of the longest pair that the usual limits let through.
LONGEST = 1024 + 2 * 1024
HUB = ModelSpec(name="hub", source="some/model")
NO_GPU = (Node(id="a", cpus=2),)
PAPER = st.sampled_from(catalog.PAPER_MODELS)
REWARDS = st.sampled_from([EX_RM, IM_RM])
SIZES = st.sampled_from([24.0, 40.0, 80.0, 141.0])
LIMITS = st.sampled_from([128, 512, 1024])


def gpus(count: int, gb: float = 80.0, **more: float) -> tuple[Node, ...]:
    return (Node(id="g", cpus=16, gpus=count, gpu_gb=gb, **more),)


def rule(world_size: int, zero_stage: int = 2) -> PlacementRule:
    return PlacementRule(match=(("model", "*"),), world_size=world_size, zero_stage=zero_stage)


def peak_gb(spec: TrialSpec, placement: Placement) -> float:
    training = training_of(spec)
    assert training is not None
    return footprint(training, placement).total


def paper_trial(name: str, **changes) -> TrialSpec:
    return trial(model=catalog.MODELS[name], **changes)


@given(
    batch=BATCHES, world_size=st.integers(1, 16), cpus=st.integers(1, 16), model=st.sampled_from([LLAMA, HUB])
)
def test_on_cpus_a_rule_gives_the_ranks_where_there_are_cpus_and_pairs_for_them(
    batch: int, world_size: int, cpus: int, model: ModelSpec
):
    spec = trial(model=model, optim=OptimSpec(effective_batch=batch))
    placement = place(spec, [Node(id="a", cpus=cpus)], [rule(world_size)])
    assert placement.world_size == (world_size if world_size <= min(cpus, batch) else 1)
    at_once = 3 * (tiny.MAX_POSITIONS // 2) * -(-batch // placement.world_size)
    assert placement.forward_tokens == (LONGEST if model == HUB else at_once)
    assert placement.device == "cpu"


@given(
    model=PAPER,
    reward=REWARDS,
    batch=BATCHES,
    counts=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    sizes=st.lists(SIZES, min_size=4, max_size=4),
    tokens=LIMITS,
)
def test_on_gpus_every_rank_has_pairs_and_the_smallest_gpu_holds_it(
    model, reward, batch, counts, sizes, tokens
):
    nodes = [
        Node(id=f"n{i}", cpus=8, gpus=count, gpu_gb=gb)
        for i, (count, gb) in enumerate(zip(counts, sizes, strict=False))
    ]
    draw = DrawSpec(max_prompt_tokens=tokens, max_response_tokens=tokens)
    spec = trial(model=model, reward=reward, train_draw=draw, optim=OptimSpec(effective_batch=batch))
    try:
        placement = place(spec, nodes)
    except PlanError:
        with pytest.raises(PlanError, match=f"^{model.name} "):
            require_fit([spec], nodes)
        return
    assert placement.world_size <= sum(counts)
    assert placement.world_size <= batch
    assert placement.forward_tokens >= 3 * tokens
    assert peak_gb(spec, placement) <= min(node.gpu_gb for node in nodes)
    assert placement.device == "cuda"


@given(
    model=PAPER,
    reward=REWARDS,
    batch=BATCHES,
    gb=SIZES,
    counts=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    kept=st.integers(0, 3),
)
def test_a_smaller_cluster_never_needs_more_gpus(model, reward, batch, gb, counts, kept):
    spec = trial(model=model, reward=reward, optim=OptimSpec(effective_batch=batch))
    whole = [Node(id=f"n{i}", cpus=8, gpus=count, gpu_gb=gb) for i, count in enumerate(counts)]
    part = whole[: kept + 1]
    try:
        smaller = place(spec, part)
    except PlanError:
        return
    assert place(spec, whole).world_size >= smaller.world_size
    assert smaller.world_size <= sum(node.gpus for node in part)


BF16 = replace(catalog.MODELS["llama-3.1-8b"], precision="bf16")
FP32 = replace(BF16, precision="fp32")
SMALL = paper_trial("llama-3.2-1b")
THREE = paper_trial("llama-3.2-3b")
EIGHT = paper_trial("llama-3.1-8b")
TWO_PAIRS = OptimSpec(effective_batch=2)


@pytest.mark.parametrize(
    ("spec", "nodes", "expected"),
    [
        (EIGHT, gpus(8), {"world_size": 4, "zero_stage": 3, "checkpointing": False}),
        # Activations are recomputed before the optimiser is offloaded.
        (SMALL, gpus(1, 30.0), {"checkpointing": True, "offload_optimizer": False}),
        (THREE, gpus(1, 40.0), {"checkpointing": True, "offload_optimizer": True}),
        # Masters, moments and gradients in fp32 of 3.2 billion weights; two GPUs share the host's memory.
        (THREE, gpus(1, 40.0, host_gb=64.0), {"offload_optimizer": True}),
        (THREE, gpus(2, 24.0, host_gb=64.0), {"world_size": 2}),
        # A step that fits in one forward is one, and holds pairs with their rewritings.
        (replace(SMALL, optim=TWO_PAIRS), gpus(1, 141.0), {"forward_tokens": 2 * LONGEST}),
        (
            replace(SMALL, optim=TWO_PAIRS, loss=LossSpec(consistency=1.0)),
            gpus(1, 141.0),
            {"forward_tokens": 4 * LONGEST},
        ),
        # Cards that hold a training together, but alone never the model, score it layer by layer.
        (trial(model=FP32, reward=EX_RM), gpus(8, 24.0), {"zero_stage": 3}),
        (trial(model=FP32, reward=IM_RM), read_cluster("1x4xA10G-24GB"), {"world_size": 4}),
        # Each process takes a CPU.
        (EIGHT, (Node(id="g", cpus=3, gpus=8, gpu_gb=80.0),), {"world_size": 3}),
        # Of unknown size.
        (trial(model=HUB), gpus(8), {"world_size": 1, "forward_tokens": LONGEST}),
        # A gang is a power of two or all there is, and need not divide the batch.
        (trial(model=catalog.MODELS["llama-3.1-8b"], reward=EX_RM), gpus(7, 60.0), {"world_size": 7}),
        (trial(model=catalog.MODELS["llama-3.1-8b"], reward=EX_RM), gpus(9, 60.0), {"world_size": 8}),
        (replace(EIGHT, optim=OptimSpec(effective_batch=5)), gpus(2, 24.0), {"world_size": 2}),
        # With an adapter it fits on a card that holds it whole only with the host's memory.
        (
            trial(model=BF16, reward=EX_RM, lora=LoraSpec(rank=16)),
            gpus(1, 24.0),
            {"offload_optimizer": False},
        ),
        (trial(model=BF16, reward=EX_RM), gpus(1, 24.0), {"offload_optimizer": True}),
    ],
)
def test_a_training_is_placed_on_the_fewest_gpus_that_hold_it(spec: TrialSpec, nodes, expected):
    placement = place(spec, nodes)
    assert {name: getattr(placement, name) for name in expected} == expected


def test_a_smaller_gang_or_a_longer_forward_would_not_fit():
    placement = place(EIGHT, gpus(8))
    assert peak_gb(EIGHT, replace(placement, world_size=2, forward_tokens=1)) > 80
    assert placement.forward_tokens > LONGEST
    assert peak_gb(EIGHT, replace(placement, forward_tokens=placement.forward_tokens + 128)) > 80


@pytest.mark.parametrize(
    ("spec", "nodes", "said"),
    [
        (EIGHT, gpus(1, 24.0), "llama-3.1-8b · im_rm needs .* GPUs of 24 GB .* training state"),
        (EIGHT, gpus(1, 24.0), "on 2 GPUs of 24 GB, or on 1 × A100-40GB"),
        (EIGHT, gpus(1, 24.0, host_gb=20.0), "26 GB on each of at most 1 GPUs"),
        (THREE, gpus(1, 40.0, host_gb=50.0), "51 GB of host memory a GPU, .* not 50"),
        (trial(model=FP32), gpus(8, 24.0, host_gb=240.0), r"35 GB of host memory a GPU, .* not 30"),
        (trial(model=FP32), gpus(32, 6.0), "on one GPU to be scored, even layer by layer, .* have 6 GB"),
    ],
)
def test_a_model_that_fits_nowhere_is_refused_with_what_would_hold_it(spec: TrialSpec, nodes, said: str):
    with pytest.raises(PlanError, match=said):
        place(spec, nodes)


def test_an_architecture_that_may_need_padded_rows_has_room_for_the_prompt_twice():
    for family, longest in (("qwen2", LONGEST), ("unheard_of", LONGEST + 1024)):
        shapes = replace(catalog.ARCHITECTURES["Qwen/Qwen2.5-3B-Instruct"], family=family)
        assert training_of(trial(model=HUB), shapes).pair.total == longest


def test_a_rule_lays_its_trials_on_a_gang_and_leaves_the_others_alone():
    rules = [PlacementRule(match=(("reward", "im_rm"), ("model", "llama*")), world_size=2, zero_stage=3)]
    gang = place(trial(), NO_GPU, rules)
    assert (gang.world_size, gang.zero_stage) == (2, 3)
    alone = place(trial(model=replace(LLAMA, name="other")), NO_GPU, rules)
    assert (alone.world_size, alone.zero_stage) == (1, 0)


def test_all_models_that_fit_nowhere_are_refused_in_one_message():
    own = trial(model=ModelSpec(name="mine", source="/models/mine"))
    trials = [own, *(trial(model=model) for model in (*catalog.PAPER_MODELS, LLAMA))]
    with pytest.raises(PlanError) as raised:
        require_fit(trials, NO_GPU)
    for model in catalog.PAPER_MODELS:
        assert model.name in str(raised.value)
    assert LLAMA.name not in str(raised.value)
    require_fit([own, trial()], NO_GPU)
    require_fit(trials, gpus(8))
    with pytest.raises(PlanError, match=r"llama-3\.1-8b · im_rm needs") as raised:
        require_fit(trials, gpus(1, 24.0))
    assert "llama-3.2-1b" not in str(raised.value)


def test_the_paper_needs_gpus_and_enough_of_them():
    assert not fits_gpus([LLAMA], NO_GPU)
    assert fits_gpus(catalog.PAPER_MODELS, gpus(4))
    assert not fits_gpus(catalog.PAPER_MODELS, gpus(1, 24.0))
    assert not fits_gpus([HUB], gpus(8))


def test_tf32_without_a_gpu_is_refused_and_with_one_takes_the_memory_of_fp32():
    llama = catalog.MODELS["llama-3.2-1b"]
    rounded = trial(model=replace(llama, precision="tf32"))
    assert place(rounded, gpus(1)) == place(trial(model=llama), gpus(1))
    for refuse in (place, lambda spec, nodes: require_fit([spec], nodes)):
        with pytest.raises(SpecError, match=r"llama-3\.2-1b in tf32: only GPUs have it"):
            refuse(rounded, NO_GPU)
