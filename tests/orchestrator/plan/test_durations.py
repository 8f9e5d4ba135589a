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
from orchestrator.plan.hardware import GpuKind, gpu_kind, read_cluster
from orchestrator.plan.memory import PairTokens, Training
from orchestrator.plan.placement import training_of
from orchestrator.plan.schedule import UNKNOWN_S
from orchestrator.spec import catalog
from orchestrator.spec.stages import ConvertStage, SampleStage, TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.records import TrialNote
from tests.orchestrator.sweep_samples import LLAMA, base_model, plan, split, trial
from trainers.data.records import Pair, user_prompt, write_pairs
from trainers.rewards import RewardSpec
from trainers.specs import (
    DrawSpec,
    LoraSpec,
    ModelSpec,
    OptimSpec,
    Placement,
    SamplingSpec,
    ValidationSpec,
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


def test_a_forward_is_two_operations_a_weight_and_token_and_the_attention():
    matrices = SHAPES.parameters - SHAPES.vocabulary * SHAPES.hidden
    attention = 4 * 2048 * 16 * (200**2 / 2 + 100 * 150)
    assert durations.forward_flops(TRAINING, LENGTHS) == pytest.approx(2 * matrices * 300 + attention)


def step_s(training, lengths, placement=PLACED, kind=H100) -> float:
    return sum(durations.step_parts(training, lengths, placement, kind).values())


def test_only_log_probabilities_meet_the_unembedding_and_recomputation_adds_a_forward():
    assert durations.unembedding_flops(TRAINING, LENGTHS) == 0
    assert durations.unembedding_flops(replace(TRAINING, reward=IM_RM), LENGTHS) == 2 * 128_256 * 2048 * 200
    usual, more = (
        durations.step_parts(TRAINING, LENGTHS, replace(PLACED, checkpointing=flag), H100)
        for flag in (False, True)
    )
    assert more["backbone"] == pytest.approx(usual["backbone"] * 4 / 3)
    assert usual["head"] == 0
    head = durations.step_parts(replace(TRAINING, reward=IM_RM), LENGTHS, PLACED, H100)["head"]
    assert head * 67e12 * durations.UTILISATION["fp32"] == pytest.approx(32 * 4 * 2 * 128_256 * 2048 * 200)


def test_a_step_takes_its_operations_at_the_stated_utilisation_the_update_and_its_launches():
    work = 32 * 3 * durations.forward_flops(TRAINING, LENGTHS)
    parts = durations.step_parts(TRAINING, LENGTHS, PLACED, H100)
    assert parts == {
        "backbone": pytest.approx(work / (67e12 * durations.UTILISATION["fp32"])),
        "head": 0,
        "optimiser": pytest.approx(28 * (SHAPES.parameters + 2048) / 3350e9),
        "communication": 0,
        "launches": pytest.approx(8 * 0.03),
    }
    used = durations.utilisation(TRAINING, LENGTHS, PLACED, H100)
    assert used == pytest.approx(work / sum(parts.values()) / 67e12)
    # What is computed twice is no use.
    recomputed = replace(PLACED, checkpointing=True)
    assert durations.utilisation(TRAINING, LENGTHS, recomputed, H100) < used
    # Twice the work for one update.
    assert durations.utilisation(replace(TRAINING, copies=2), LENGTHS, PLACED, H100) > used
    halves, rounded = (replace(TRAINING, precision=precision) for precision in ("bf16", "tf32"))
    times = [
        step_s(made, LENGTHS, replace(PLACED, forward_tokens=9600)) for made in (halves, rounded, TRAINING)
    ]
    assert times == sorted(times)
    assert times[1] < times[2] / 3


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


def test_an_adapter_has_no_gradients_of_weights_to_compute_and_little_to_update_and_send():
    def parts(lora: LoraSpec | None, stage: int) -> dict[str, float]:
        laid = replace(PLACED, world_size=2, zero_stage=stage)
        return durations.step_parts(replace(TRAINING, reward=IM_RM, lora=lora), LENGTHS, laid, H100)

    adapter = LoraSpec(rank=8)
    whole, small = parts(None, 1), parts(adapter, 1)
    assert small["backbone"] == pytest.approx(whole["backbone"] * 2 / 3)
    assert small["head"] == pytest.approx(whole["head"] * 3 / 4)
    assert small["optimiser"] < whole["optimiser"] / 50
    assert small["communication"] < whole["communication"] / 50
    # Partitioned weights are gathered whether they are trained or not.
    assert parts(adapter, 3)["communication"] > parts(None, 3)["communication"] / 2


def test_the_gate_expects_what_the_plan_says(store: Store):
    """The set-up, and steps at the rate that the size of the model gives."""
    item = sized(pairs=64, epochs=3)
    training = training_of(item.spec)
    rows = min(64, item.train.prepared.split.rows)
    expected = durations.SET_UP_S["cuda"] + 3 * math.ceil(rows / 32) * step_s(
        training, UNSEEN_LENGTHS, laid()
    )
    found = Durations(store=store, kind=H100).train_s(item, laid())
    assert found == pytest.approx(expected)


def test_more_epochs_take_longer_and_more_or_faster_gpus_shorter(store: Store):
    fast, slow = (Durations(store=store, kind=kind) for kind in (H100, L4))
    once = fast.train_s(sized(), laid())
    assert fast.train_s(sized(epochs=2), laid()) > once
    assert fast.train_s(sized(), laid(2)) < once
    assert slow.train_s(sized(), laid()) > once
    largest = max(catalog.PAPER_MODELS, key=lambda model: model.parameters or 0)
    larger = replace(largest, precision=KNOWN.precision)
    assert fast.train_s(sized(model=larger), laid()) > once
    alone = Placement(forward_tokens=1)
    tiny = plan(trial(model=LLAMA))
    on_cpu = Durations(store=store)
    sets = [stage.prepared for stage in tiny.evaluations]
    assert on_cpu.scoring_s(tiny, sets, alone) < on_cpu.train_s(tiny, alone) < 60


def test_a_prepared_set_says_how_many_pairs_it_has_and_how_long(store: Store):
    item = sized()
    before = Durations(store=store, kind=H100).train_s(item, laid())
    with store.write("prepare", item.train.prepared.key) as attempt:
        attempt.info.update(pairs=320, mean_tokens={"prompt": 10.0, "chosen": 5.0, "rejected": 5.0})
    seconds = step_s(training_of(item.spec), PairTokens(prompt=10, chosen=5, rejected=5), laid())
    after = Durations(store=store, kind=H100).train_s(item, laid())
    assert after == pytest.approx(durations.SET_UP_S["cuda"] + 10 * seconds)
    assert after != before


def test_what_is_held_out_takes_no_steps_and_is_scored_after_each_epoch(store: Store):
    times, optim = Durations(store=store, kind=H100), OptimSpec(epochs=2, effective_batch=2)
    whole, part = (
        plan(trial(model=KNOWN, optim=optim, validation=validation))
        for validation in (None, ValidationSpec(share=0.5))
    )
    rate, rows = times.rate(whole, PLACED), whole.train.prepared.split.rows
    assert rate is not None
    of_all_s = times.scoring_s(whole, [whole.train.prepared], PLACED) - durations.SET_UP_S["cuda"]
    assert times.train_s(whole, PLACED) == pytest.approx(rate.set_up_s + 2 * rows / 2 * rate.step_s)
    assert times.train_s(part, PLACED) == pytest.approx(
        rate.set_up_s + 2 * (rows / 4 * rate.step_s + of_all_s / 2)
    )


def test_layers_that_are_copied_to_a_gpu_in_each_forward_take_time(store: Store):
    wide = sized(pairs=2000, model=replace(catalog.MODELS["llama-3.1-8b"], precision="fp32"))
    sets, fast = [wide.train.prepared], gpu_kind("A100-80GB")
    whole, part = (
        Durations(store=store, kind=fast._replace(gb=gb)).scoring_s(wide, sets, laid()) for gb in (80.0, 24.0)
    )
    forwards = math.ceil(min(2000, wide.train.prepared.split.rows) * UNSEEN_LENGTHS.total / 4096)
    # 28 GB of layers at 20 GB/s.
    assert part - whole == pytest.approx(1.4 * forwards, rel=0.02)


def test_drawing_takes_forwards_and_a_pass_over_the_weights_for_each_token_of_a_batch(store: Store):
    asked = SamplingSpec(samples=128, max_new_tokens=10)
    draw, prompts = DrawSpec(max_pairs=6), split("tiny_world", "test")
    stage = SampleStage(base=base_model(), prompts=prompts, draw=draw, sampling=asked)
    times, item = Durations(store=store, kind=H100), sized()
    table = SHAPES.vocabulary * SHAPES.hidden

    def seconds(prompts: int) -> float:
        tokens = (SHAPES.parameters - table) * (UNSEEN_LENGTHS.prompt + 10) + table * 10
        work = 2 * prompts * 128 * tokens / (67e12 * durations.UTILISATION["fp32"])
        # Two prompts a batch.
        return 90 + work + prompts / 2 * 10 * (4 * SHAPES.parameters / 3350e9 + 0.03)

    assert times.sample_s(item, stage, SHAPES, laid()) == pytest.approx(seconds(6))
    # Eight rows, of which two ask the same.
    pairs = [Pair(prompt=user_prompt(str(at // 2)), chosen="a", rejected="b") for at in range(8)]
    with store.write("dataset", prompts.digest) as attempt:
        write_pairs(pairs, attempt.directory / "pairs.jsonl")
    assert times.sample_s(item, stage, SHAPES, laid()) == pytest.approx(seconds(4))
    assert times.sample_s(item, stage, None, laid()) == UNKNOWN_S


def test_a_gguf_file_is_no_tiny_model(store: Store):
    converted = sized()
    origin = ConvertStage(file="/m.gguf", digest="d", name="m")
    prepared = replace(
        converted.train.prepared, base=replace(converted.train.base, origin=origin, location="")
    )
    converted = replace(converted, train=replace(converted.train, prepared=prepared))
    assert Durations(store=store).lengths(converted) == UNSEEN_LENGTHS


def test_a_model_of_unknown_size_gets_the_gates_own_guess(store: Store):
    unknown = sized(model=ModelSpec(name="hub", source="some/model"))
    here = Durations(store=store, kind=H100)
    sets = [stage.prepared for stage in unknown.evaluations]
    assert here.train_s(unknown, laid()) == here.scoring_s(unknown, sets, laid()) == UNKNOWN_S


def test_finished_trainings_of_one_name_replace_the_guess_by_their_mean(store: Store):
    item = sized(pairs=32, epochs=4)
    name = rate_name(item, laid())
    guessed = Durations(store=store, kind=H100)
    once = guessed.having({name: Rate(step_s=2.0, set_up_s=10.0)})
    assert once.train_s(item, laid()) == pytest.approx(10 + 4 * 2)
    more = once.having({name: Rate(step_s=5.0, set_up_s=40.0, trainings=2)})
    assert more.train_s(item, laid()) == pytest.approx(30 + 4 * 4)
    # Laid out otherwise, or on other pairs, nothing is known of it.
    assert more.train_s(item, laid(2)) == guessed.train_s(item, laid(2))
    other = plan(replace(item.spec, train_set=replace(item.spec.train_set, name="longer")))
    assert more.train_s(other, laid()) == guessed.train_s(other, laid())


def test_rates_are_read_of_what_the_store_has(store: Store):
    items = [plan(trial(seed=seed)) for seed in (0, 1, 2)]
    for item, step_s in zip(items[:2], (1.0, 3.0), strict=True):
        with store.write("train", item.key) as attempt:
            placement = {name: getattr(laid(), name) for name in Placement.__slots__}
            attempt.info.update(perf={"step_s": step_s, "set_up_s": 8.0}, placement=placement)
    named = {item.key: rate_name(item, laid())[:3] for item in items}
    found = measured_rates(named, store)
    assert found == {rate_name(items[0], laid()): Rate(step_s=2.0, set_up_s=8.0, trainings=2)}


def test_a_gang_may_get_the_slowest_gpus_there_are():
    assert isinstance(H100, GpuKind)
    assert slowest(read_cluster("1x8xH100,1x8xL4"))[1:7] == L4[1:7]
    # In bf16 the A10G is slower, in fp32 the A100.
    mixed, a100 = slowest(read_cluster("1x8xA10G,1x8xA100")), gpu_kind("A100")
    assert isinstance(a100, GpuKind)
    assert mixed is not None
    assert (mixed.bf16_tflops, mixed.fp32_tflops) == (70, a100.fp32_tflops)
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
