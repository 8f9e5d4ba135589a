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


def gpus(count: int, gb: float = 80.0) -> tuple[Node, ...]:
    return (Node(id="g", cpus=16, gpus=count, gpu_gb=gb),)


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


def test_the_fewest_gpus_that_hold_it_and_then_the_most_tokens_a_forward():
    spec = paper_trial("llama-3.1-8b")
    placement = place(spec, gpus(8))
    assert (placement.world_size, placement.zero_stage) == (4, 3)
    assert not placement.checkpointing
    halved = replace(placement, world_size=2, forward_tokens=1)
    assert peak_gb(spec, halved) > 80
    assert placement.forward_tokens > LONGEST
    longer = replace(placement, forward_tokens=placement.forward_tokens + 128)
    assert peak_gb(spec, longer) > 80
    # A step that fits in one forward is one, and holds pairs with their rewritings.
    small = paper_trial("llama-3.2-1b", optim=OptimSpec(effective_batch=2))
    assert place(small, gpus(1, 141.0)).forward_tokens == 2 * LONGEST
    rewritten = replace(small, loss=LossSpec(consistency=1.0))
    assert place(rewritten, gpus(1, 141.0)).forward_tokens == 4 * LONGEST


def test_activations_are_recomputed_before_the_optimiser_is_offloaded():
    small, smaller = paper_trial("llama-3.2-1b"), paper_trial("llama-3.2-3b")
    first = place(small, gpus(1, 30.0))
    assert (first.checkpointing, first.offload_optimizer) == (True, False)
    second = place(smaller, gpus(1, 40.0))
    assert (second.checkpointing, second.offload_optimizer) == (True, True)


def test_an_offloaded_optimiser_needs_host_memory():
    spec = paper_trial("llama-3.2-3b")
    (node,) = gpus(1, 40.0)
    # Masters, moments and gradients in fp32 of 3.2 billion weights.
    assert place(spec, [replace(node, host_gb=64.0)]).offload_optimizer
    with pytest.raises(
        PlanError, match="51 GB of host memory a GPU, for its optimiser or its layers, not 50"
    ):
        place(spec, [replace(node, host_gb=50.0)])
    # Two GPUs of a node share its memory, and each holds half.
    assert place(spec, [replace(node, gpus=2, gpu_gb=24.0, host_gb=64.0)]).world_size == 2


@pytest.mark.parametrize("reward", [EX_RM, IM_RM])
def test_cards_that_hold_a_training_together_but_alone_never_the_model_score_it_layer_by_layer(reward):
    model = replace(catalog.MODELS["llama-3.1-8b"], precision="fp32")
    spec, small = trial(model=model, reward=reward), gpus(8, 24.0)
    assert place(spec, small).zero_stage == 3
    assert place(spec, read_cluster("1x4xA10G-24GB")).world_size == 4
    with pytest.raises(PlanError, match=r"35 GB of host memory a GPU, .* not 30\."):
        place(spec, [replace(node, host_gb=8 * 30.0) for node in small])
    with pytest.raises(PlanError, match=r"GB on one GPU to be scored, even layer by layer, .* have 6 GB\."):
        place(spec, gpus(32, 6.0))


def test_a_model_of_unknown_size_gets_one_gpu_and_no_forward_longer_than_a_pair():
    placement = place(trial(model=HUB), gpus(8))
    assert (placement.world_size, placement.forward_tokens) == (1, LONGEST)
    # One that may need padded rows has room for the prompt twice.
    for family, longest in (("qwen2", LONGEST), ("unheard_of", LONGEST + 1024)):
        shapes = replace(catalog.ARCHITECTURES["Qwen/Qwen2.5-3B-Instruct"], family=family)
        assert training_of(trial(model=HUB), shapes).pair.total == longest


def test_a_model_that_fits_nowhere_is_refused_with_what_would_hold_it():
    with pytest.raises(PlanError) as raised:
        place(paper_trial("llama-3.1-8b"), gpus(1, 24.0))
    said = str(raised.value)
    for part in (
        "llama-3.1-8b · im_rm needs",
        "GPUs of 24 GB",
        "training state",
        "on 2 GPUs",
        "1 × A100-40GB",
    ):
        assert part in said
    wide = paper_trial("llama-3.1-8b")
    assert place(wide, gpus(2, 24.0)).world_size == 2
    assert place(wide, gpus(1, 40.0)).world_size == 1


def test_a_gang_is_a_power_of_two_or_all_there_is_and_need_not_divide_the_batch():
    spec = paper_trial("llama-3.1-8b", reward=EX_RM)
    widths = [place(spec, gpus(count, 60.0)).world_size for count in (3, 4, 5, 6, 7, 9)]
    assert widths == [3, 4, 5, 6, 7, 8]
    odd = paper_trial("llama-3.1-8b", optim=OptimSpec(effective_batch=5))
    assert place(odd, gpus(2, 24.0)).world_size == 2


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


def test_an_8b_ex_rm_with_an_adapter_is_placed_on_one_card_of_24_gb_in_bf16():
    model = replace(catalog.MODELS["llama-3.1-8b"], precision="bf16")
    whole = trial(model=model, reward=EX_RM)
    adapted = place(replace(whole, lora=LoraSpec(rank=16)), gpus(1, 24.0))
    assert (adapted.world_size, adapted.offload_optimizer) == (1, False)
    # Whole, it fits only because the host's memory takes the optimiser and the gradients.
    assert place(whole, gpus(1, 24.0)).offload_optimizer
