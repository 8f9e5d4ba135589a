"""How long stages take: by size where nothing was measured, by the mean of finished trainings where something was."""

import math
from dataclasses import replace

import pytest

from orchestrator.plan import durations
from orchestrator.plan.durations import (
    UNSEEN_LENGTHS,
    Durations,
    Rate,
    measured_rates,
    rate_name,
    slowest,
    time_left_s,
)
from orchestrator.plan.hardware import gpu_kind, read_cluster
from orchestrator.plan.memory import PairTokens, Training
from orchestrator.plan.placement import training_of
from orchestrator.plan.schedule import UNKNOWN_S
from orchestrator.spec import catalog
from orchestrator.spec.stages import SampleStage, TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.records import TrialNote
from tests.orchestrator.sweep_samples import base_model, plan, split, trial
from trainers.rewards import RewardSpec
from trainers.specs import (
    DrawSpec,
    LoraSpec,
    ModelSpec,
    OptimSpec,
    Placement,
    SamplingSpec,
)

H100, L4 = gpu_kind("H100"), gpu_kind("L4")
KNOWN = catalog.PAPER_MODELS[0]
EX_RM, IM_RM = RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=0.01)
SHAPES = catalog.ARCHITECTURES["meta-llama/Llama-3.2-1B-Instruct"]
LENGTHS = PairTokens(prompt=100, chosen=100, rejected=100)
TRAINING = Training(
    architecture=SHAPES,
    reward=EX_RM,
    optim=OptimSpec(),
    precision="fp32",
    pair=PairTokens(prompt=1024, chosen=1024, rejected=1024),
)
FP32_FLOPS = 67e12 * durations.UTILISATION["fp32"]
PLACED = Placement(forward_tokens=4 * 300, device="cuda")


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
    return Placement(world_size=world_size, forward_tokens=1, device="cuda")


def step_s(placement=PLACED, **changes) -> float:
    return sum(durations.step_parts(replace(TRAINING, **changes), LENGTHS, placement, H100).values())


def work_s(passes: float) -> float:
    """Seconds of so many forward passes of the step's pairs, without the unembedding, in fp32."""
    return 32 * passes * durations.forward_flops(TRAINING, LENGTHS) / FP32_FLOPS


def test_a_forward_is_two_operations_a_weight_and_token_and_the_attention():
    matrices = SHAPES.parameters - SHAPES.vocabulary * SHAPES.hidden
    attention = 4 * 2048 * 16 * (200**2 / 2 + 100 * 150)
    assert durations.forward_flops(TRAINING, LENGTHS) == pytest.approx(2 * matrices * 300 + attention)
    # Only log-probabilities meet the unembedding.
    assert durations.unembedding_flops(TRAINING, LENGTHS) == 0
    assert durations.unembedding_flops(replace(TRAINING, reward=IM_RM), LENGTHS) == 2 * 128_256 * 2048 * 200


def test_a_step_takes_its_operations_at_the_stated_utilisation_the_update_and_its_launches():
    parts = durations.step_parts(TRAINING, LENGTHS, PLACED, H100)
    assert parts == {
        "backbone": pytest.approx(work_s(3)),
        "head": 0,
        "optimiser": pytest.approx(28 * (SHAPES.parameters + 2048) / 3350e9),
        "communication": 0,
        "launches": pytest.approx(8 * 0.03),
    }
    usual = sum(parts.values())
    used = durations.utilisation(TRAINING, LENGTHS, PLACED, H100)
    assert used == pytest.approx(work_s(3) * FP32_FLOPS / usual / 67e12)
    # What is computed twice is no use; twice the work for one update is.
    assert durations.utilisation(TRAINING, LENGTHS, replace(PLACED, checkpointing=True), H100) < used
    assert durations.utilisation(replace(TRAINING, copies=2), LENGTHS, PLACED, H100) > used
    assert step_s(placement=replace(PLACED, checkpointing=True)) == pytest.approx(usual + work_s(1))
    # Blocks of logits are computed twice.
    head = 32 * 4 * 2 * 128_256 * 2048 * 200 / FP32_FLOPS
    more = 28 * (SHAPES.trained("unembedding") - SHAPES.trained("head")) / 3350e9
    assert step_s(reward=IM_RM) == pytest.approx(usual + head + more)
    # Weights of an adapter's model have no gradients, and few parameters are updated.
    assert step_s(lora=LoraSpec(rank=8)) == pytest.approx(work_s(2) + 8 * 0.03, rel=0.01)
    assert step_s(precision="bf16") < step_s(precision="tf32") < usual / 2


def test_ranks_send_gradients_once_or_after_each_forward_and_gather_partitioned_weights_for_each_pass():
    def sent(stage: int, tokens: int = 4 * 300) -> float:
        """Bytes a parameter, of all but the rank's own part."""
        laid = replace(PLACED, world_size=2, zero_stage=stage, forward_tokens=tokens)
        seconds = durations.step_parts(TRAINING, LENGTHS, laid, H100)["communication"]
        return seconds * 450e9 * 2 / (SHAPES.parameters + 2048)

    # Sixteen pairs a rank: four forwards, or one.
    expected = [4, 4 + 4, 4 + 4 * 4, 4 * 4 * 2 + 4 * 4]
    assert [sent(stage) for stage in (0, 1, 2, 3)] == pytest.approx(expected)
    assert [sent(stage, 16 * 300) for stage in (1, 2, 3)] == pytest.approx([8, 8, 12])


def test_the_gate_expects_what_the_plan_says(store: Store):
    """The set-up, and steps at the rate that the size of the model gives."""
    item = sized(pairs=64, epochs=3)
    rows, training = min(64, item.train.prepared.split.rows), training_of(item.spec)
    seconds = sum(durations.step_parts(training, UNSEEN_LENGTHS, laid(), H100).values())
    found = Durations(store=store, kind=H100).train_s(item, laid())
    assert found == pytest.approx(durations.SET_UP_S["cuda"] + 3 * math.ceil(rows / 32) * seconds)
    # Once it is prepared, the set says how many pairs it has and how long.
    with store.write("prepare", item.train.prepared.key) as attempt:
        attempt.info.update(pairs=320, mean_tokens={"prompt": 10.0, "chosen": 5.0, "rejected": 5.0})
    lengths = PairTokens(prompt=10, chosen=5, rejected=5)
    seconds = sum(durations.step_parts(training, lengths, laid(), H100).values())
    after = Durations(store=store, kind=H100).train_s(item, laid())
    assert after == pytest.approx(durations.SET_UP_S["cuda"] + 3 * 10 * seconds)


def test_drawing_takes_forwards_and_a_pass_over_the_weights_for_each_token_of_a_batch(store: Store):
    asked, prompts = SamplingSpec(samples=128, max_new_tokens=10), split("tiny_world", "test")
    stage = SampleStage(base=base_model(), prompts=prompts, draw=DrawSpec(max_pairs=6), sampling=asked)
    table = SHAPES.vocabulary * SHAPES.hidden
    tokens = (SHAPES.parameters - table) * (UNSEEN_LENGTHS.prompt + 10) + table * 10
    work = 2 * 6 * 128 * tokens / FP32_FLOPS
    # Two prompts a batch.
    seconds = 90 + work + 3 * 10 * (4 * SHAPES.parameters / 3350e9 + 0.03)
    times = Durations(store=store, kind=H100)
    assert times.sample_s(stage, SHAPES, laid()) == pytest.approx(seconds)
    assert times.sample_s(stage, None, laid()) == UNKNOWN_S


def test_a_model_of_unknown_size_gets_the_gates_own_guess(store: Store):
    unknown = sized(model=ModelSpec(name="hub", source="some/model"))
    here = Durations(store=store, kind=H100)
    sets = [stage.prepared for stage in unknown.evaluations]
    assert here.train_s(unknown, laid()) == here.scoring_s(unknown, sets, laid()) == UNKNOWN_S


def test_finished_trainings_replace_the_guess_for_those_that_are_alike_by_their_mean(store: Store):
    item, other, old = sized(pairs=32, epochs=4), sized(pairs=32), sized(pairs=16)
    guessed = Durations(store=store, kind=H100)
    placement = {name: getattr(laid(), name) for name in Placement.__slots__}
    for one, step, fields in ((item, 1.0, placement), (other, 3.0, placement), (old, 9.0, {"of": "earlier"})):
        with store.write("train", one.key) as attempt:
            attempt.info.update(perf={"step_s": step, "set_up_s": 8.0}, placement=fields)
    names = {one.key: (one.spec.model.name, one.spec.reward_name) for one in (item, other, old)}
    name = rate_name(item, laid())
    found = guessed.having(measured_rates(names, store))
    assert found.measured == {name: Rate(step_s=2.0, set_up_s=8.0, trainings=2)}
    assert found.train_s(item, laid()) == pytest.approx(8 + 4 * 2)
    more = found.having({name: Rate(step_s=5.0, set_up_s=38.0)})
    assert more.train_s(item, laid()) == pytest.approx(18 + 4 * 3)
    # Laid out otherwise nothing is known of it.
    assert found.train_s(item, laid(2)) == guessed.train_s(item, laid(2))


def test_a_gang_may_get_the_slowest_gpus_there_are():
    assert slowest(read_cluster("1x8xH100,1x8xL4"))[2:7] == L4[2:7]
    # In bf16 the A10G is slower, in fp32 the A100.
    mixed = slowest(read_cluster("1x8xA10G,1x8xA100"))
    assert (mixed.bf16_tflops, mixed.fp32_tflops) == (70, gpu_kind("A100").fp32_tflops)
    assert slowest([]) is None


def test_time_left_goes_by_what_trainings_of_a_kind_took():
    kinds = {"a": "ex", "b": "ex", "c": "ex", "d": "im", "e": "im", "f": "other"}
    notes = {key: TrialNote() for key in kinds}
    assert time_left_s(notes, kinds) is None
    notes["a"] = TrialNote(state="complete", train_s=100.0)
    notes["d"] = TrialNote(state="running", stage="evaluate", train_s=300.0)
    # Half of one is behind it, one prepares, one has failed, and of one's kind nobody knows.
    notes["b"] = TrialNote(state="running", stage="train", step=5, total=10)
    notes["c"] = TrialNote(state="running", stage="prepare")
    notes["e"] = TrialNote(state="failed")
    assert time_left_s(notes, kinds) == pytest.approx(50 + 100 + 200)
    notes["c"] = TrialNote(state="running", stage="train", step=0, total=10)
    assert time_left_s(notes, kinds) == pytest.approx((50 + 100 + 200) / 2)
