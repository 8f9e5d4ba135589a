"""Operations, seconds, schedules: counted by hand, and bounded for random jobs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_samples import record

from orchestrator.cli import inspect
from orchestrator.plan import estimate
from orchestrator.plan.estimate import Job, Lengths, lower_bound_s, makespan_s, time_left_s
from orchestrator.plan.hardware import gpu_kind
from orchestrator.plan.memory import PairTokens, Training
from orchestrator.report.results import trial_result
from orchestrator.spec import catalog
from orchestrator.store.artifacts import Store
from orchestrator.store.records import TrialNote
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement

EX_RM, IM_RM = RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=0.01)
SHAPES = catalog.ARCHITECTURES["meta-llama/Llama-3.2-1B-Instruct"]
LENGTHS = Lengths(prompt=100, chosen=100, rejected=100)
TRAINING = Training(
    architecture=SHAPES,
    reward=EX_RM,
    optim=OptimSpec(),
    precision="fp32",
    pair=PairTokens(prompt=1024, chosen=1024, rejected=1024),
)
H100 = gpu_kind("H100")
PLACED = Placement(micro_batch=4, accumulation=8, device="cuda")
JOBS = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.floats(1, 10), st.booleans()), min_size=1, max_size=40
).map(
    lambda parts: [
        Job(id=str(i), width=width, seconds=seconds, after=(str(i - 1),) if chained and i else ())
        for i, (width, seconds, chained) in enumerate(parts)
    ]
)


def test_a_forward_is_two_operations_a_weight_and_token_and_the_attention():
    matrices = SHAPES.parameters - SHAPES.vocabulary * SHAPES.hidden
    attention = 4 * 2048 * 16 * (200**2 / 2 + 100 * 150)
    assert estimate.forward_flops(TRAINING, LENGTHS) == pytest.approx(2 * matrices * 300 + attention)


def test_only_log_probabilities_meet_the_unembedding_and_recomputation_adds_a_forward():
    assert estimate.unembedding_flops(TRAINING, LENGTHS) == 0
    assert estimate.unembedding_flops(replace(TRAINING, reward=IM_RM), LENGTHS) == 2 * 128_256 * 2048 * 200
    forward = estimate.forward_flops(TRAINING, LENGTHS)
    usual, more = (estimate.train_flops(TRAINING, LENGTHS, checkpointing=flag) for flag in (False, True))
    assert (usual, more) == (pytest.approx(3 * forward), pytest.approx(4 * forward))


def test_a_step_takes_its_operations_at_the_stated_utilisation():
    work = 32 * estimate.train_flops(TRAINING, LENGTHS, checkpointing=False)
    expected = work / (67e12 * 0.60) + 8 * 0.03
    assert estimate.step_s(TRAINING, LENGTHS, PLACED, H100) == pytest.approx(expected)
    halves = replace(TRAINING, precision="bf16")
    assert estimate.step_s(halves, LENGTHS, PLACED, H100) < expected


def test_a_chain_and_a_wide_job_are_scheduled_by_hand():
    jobs = [
        Job(id="wide", width=2, seconds=3),
        Job(id="a", width=1, seconds=4),
        Job(id="b", width=1, seconds=1),
        Job(id="after a", width=1, seconds=2, after=("a",)),
    ]
    # wide 0–3 · a 3–7 beside b 3–4 · after a 7–9
    assert makespan_s(jobs, 2) == 9
    assert lower_bound_s(jobs, 2) == pytest.approx(max((6 + 4 + 1 + 2) / 2, 4 + 2))
    assert makespan_s([], 2) == lower_bound_s([], 2) == 0


@pytest.mark.parametrize(
    "job", [Job(id="x", width=3, seconds=1), Job(id="x", width=1, seconds=1, after=("y",))]
)
def test_a_job_that_can_never_start_is_an_error(job: Job):
    with pytest.raises(ValueError, match="x can never start"):
        makespan_s([job], 2)


@given(jobs=JOBS, devices=st.integers(8, 24))
def test_a_schedule_lies_between_its_bound_and_one_job_after_the_other(jobs: list[Job], devices: int):
    made, bound = makespan_s(jobs, devices), lower_bound_s(jobs, devices)
    assert made >= bound - 1e-9
    assert made <= sum(job.seconds for job in jobs) + 1e-9


def test_time_left_goes_by_what_finished_trials_took():
    assert time_left_s({}, {"a": 3}, 2) is None
    assert time_left_s({"a": 10.0, "b": 30.0}, {"a": 3, "b": 1, "c": 1}, 2) == pytest.approx(
        (30 + 30 + 20) / 2
    )
    assert time_left_s({"a": 10.0}, {}, 2) == 0


def test_the_status_counts_what_runs_and_waits_by_what_is_trained(store: Store):
    trials = [record(reward=reward, seed=seed) for reward in ("ex_rm", "im_rm") for seed in (0, 1, 2)]
    results = [trial_result(trial, store) for trial in trials]
    done = {"ex_rm": 100.0, "im_rm": 300.0}
    results = [
        replace(result, trained=True, started=0.0, trained_at=done[result.record.reward])
        if result.record.seed == 0
        else result
        for result in results
    ]
    notes = {trial.key: TrialNote() for trial in trials}
    assert inspect.time_left_s(results, {}) == 0
    # Half of one is behind it, one has not started, and one has failed.
    notes[trials[1].key] = TrialNote(state="running", stage="train", step=5, total=10)
    notes[trials[4].key] = TrialNote(state="running", stage="prepare")
    notes[trials[5].key] = TrialNote(state="failed")
    assert inspect.time_left_s(results, notes) == pytest.approx((50 + 100 + 300) / 2)
