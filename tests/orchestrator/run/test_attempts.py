"""What follows a failed attempt: again or not, after how long, with what placement."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.run.events import Retried
from orchestrator.run.failures import (
    LEAST_TOKENS,
    Failure,
    classify,
    describe_change,
    describe_fewer,
    next_attempt,
    on_fewer,
    with_less_memory,
)
from orchestrator.run.trial import Execution, complete_trial
from orchestrator.spec.trials import RetryPolicy
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import Leases
from tests.orchestrator.sweep_samples import plan, trial
from trainers.errors import OutOfMemory
from trainers.specs import Placement

POLICY = RetryPolicy(back_off_most_s=15.0)
ONE = Placement(forward_tokens=1)
placements = st.builds(
    Placement,
    world_size=st.integers(1, 4),
    forward_tokens=st.integers(1, 100_000),
    checkpointing=st.booleans(),
)


def failed(*causes):
    return [Failure(cause=cause, message="m") for cause in causes]


@given(placements)
def test_less_memory_is_fewer_tokens_a_forward_then_recomputation_and_ends(placement):
    seen, now = 0, placement
    while (smaller := with_less_memory(now)) is not None:
        assert smaller.world_size == now.world_size
        halved = smaller.forward_tokens == now.forward_tokens // 2
        assert halved or (smaller.checkpointing and not now.checkpointing)
        now, seen = smaller, seen + 1
    assert seen <= 9
    assert now.forward_tokens <= LEAST_TOKENS
    assert now.checkpointing


def test_on_gpus_the_training_then_spreads_over_more_of_them_and_offloads_last():
    """At the stage at which its checkpoint was written, but for none: nothing would be divided."""
    now, seen = Placement(forward_tokens=1024, device="cuda"), []
    while (smaller := with_less_memory(now, gpus=4)) is not None:
        now = smaller
        seen.append((now.world_size, now.zero_stage, now.checkpointing, now.offload_optimizer))
    assert seen == [
        *((1, 0, False, False), (1, 0, True, False)),
        *((2, 1, True, False), (4, 1, True, False)),
        (4, 1, True, True),
    ]
    alone = Placement(forward_tokens=1, zero_stage=3, checkpointing=True, device="cuda")
    offloaded = with_less_memory(alone, gpus=1)
    assert (offloaded.world_size, offloaded.zero_stage, offloaded.offload_optimizer) == (1, 3, True)


def test_how_the_next_attempt_differs_is_said():
    before = Placement(forward_tokens=1, checkpointing=True, device="cuda")
    wider = with_less_memory(before, gpus=2)
    assert describe_change(before, wider) == "on 2 GPUs with 1 tokens a forward, activations recomputed"
    offloaded = with_less_memory(before, gpus=1)
    said = "with 1 tokens a forward, activations recomputed, optimiser in the host's memory"
    assert describe_change(before, offloaded) == said


def test_a_training_that_knows_its_heaviest_forward_says_what_halves_it():
    """A budget far over what a step has would be halved for nothing, and one pair is not split."""
    large = Placement(forward_tokens=100_000)
    for known, expected in ((6000, (6000, False)), (0, (100_000, True)), (None, (50_000, False))):
        failure = classify(OutOfMemory("m", forward_tokens=known))
        next_one = next_attempt([failure], large, POLICY).placement
        assert (next_one.forward_tokens, next_one.checkpointing) == expected
    sent = pickle.loads(pickle.dumps(OutOfMemory("m", forward_tokens=6000)))
    assert (str(sent), sent.forward_tokens) == ("m", 6000)


def test_what_would_fail_again_is_not_tried_again():
    for cause in ("Diverged", "DataError", "KeyError", "ModelError"):
        assert next_attempt(failed(cause), ONE, POLICY) is None


def test_waits_double_up_to_the_most_and_end_with_the_limit():
    waits = []
    for times in range(1, 5):
        retry = next_attempt(failed(*["WorkerLost"] * times), ONE, POLICY)
        waits.append(retry and retry.wait_s)
    assert waits == [5.0, 10.0, 15.0, None]

    # Each cause has a count of its own.
    before = failed("StorageError", "WorkerLost", "WorkerLost", "Timeout")
    assert next_attempt([*before, *failed("WorkerLost")], ONE, POLICY).wait_s == 15.0
    assert next_attempt([*before, *failed("Timeout")], ONE, POLICY).wait_s == 10.0
    assert next_attempt([*before, *failed("StorageError")], ONE, POLICY) is None


def test_out_of_memory_is_tried_at_once_with_less_until_nothing_is_left():
    now, seen = Placement(forward_tokens=2000), []
    failures = []
    while True:
        failures += failed("OutOfMemory")
        retry = next_attempt(failures, now, POLICY)
        if retry is None:
            break
        assert retry.wait_s == 0
        now = retry.placement
        seen.append((now.forward_tokens, now.checkpointing))
    assert seen == [(1000, False), (500, False), (500, True)]
    # Another cause leaves the placement as it is.
    assert next_attempt(failed("OutOfMemory", "WorkerLost"), now, POLICY).placement == now


@given(
    world_size=st.sampled_from([2, 4, 8]),
    fewer=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 8000),
)
def test_on_fewer_devices_memory_given_up_stays_given_up(world_size: int, fewer: int, tokens: int):
    fresh = Placement(world_size=fewer, zero_stage=2, forward_tokens=4000, device="cuda")
    planned = Placement(
        world_size=world_size,
        zero_stage=3,
        forward_tokens=tokens,
        checkpointing=True,
        offload_optimizer=True,
        device="cuda",
    )
    found = on_fewer(planned, fresh)
    if fewer >= world_size:
        assert found is None
        return
    assert found is not None
    assert (found.world_size, found.zero_stage) == (fewer, 3)
    assert (found.checkpointing, found.offload_optimizer) == (True, True)
    assert found.forward_tokens == min(4000, tokens)
    said = describe_fewer(planned, found)
    assert f"planned for {world_size} GPUs" in said
    assert f"on {fewer}:" in said
    assert "effective batch as before" in said
    assert on_fewer(planned, Placement(forward_tokens=1)) is None, "not laid on CPUs"


@pytest.mark.parametrize("stage", [2, 3])
def test_on_fewer_devices_layers_stay_compiled_where_their_weights_stay_whole(stage: int):
    planned = Placement(world_size=4, zero_stage=2, forward_tokens=1, compile=True, device="cuda")
    found = on_fewer(planned, Placement(world_size=2, zero_stage=stage, forward_tokens=1, device="cuda"))
    assert found is not None
    assert found.compile == (stage == 2)


class OneGpuIsTooFew:
    """A cluster of two GPUs, on one of which the training runs out of memory however it is split."""

    def __init__(self) -> None:
        self.tried: list[tuple[int, int]] = []
        self.said: list[str] = []

    def shared(self, stages):
        pass

    def train(self, stage, placement):
        self.tried.append((placement.world_size, placement.forward_tokens))
        if placement.world_size == 1:
            raise RuntimeError("CUDA error: out of memory")

    def evaluate(self, plan, stages, placement):
        pass

    def gpus(self):
        return 2

    def pause(self, seconds):
        assert seconds == 0

    def post(self, event):
        if isinstance(event, Retried):
            self.said.append(event.how)


def test_a_trial_that_no_split_makes_fit_goes_on_with_more_of_the_clusters_gpus(tmp_path):
    backend, store = OneGpuIsTooFew(), Store(tmp_path)
    execution = Execution(store=store, leases=Leases(tmp_path, "me"))
    placement = Placement(forward_tokens=1000, device="cuda")
    complete_trial(plan(trial()), placement, backend, execution)
    assert backend.tried == [(1, 1000), (1, 500), (1, 500), (2, 500)]
    assert backend.said[-1] == "again on 2 GPUs with 500 tokens a forward, activations recomputed"


class ScoringFindsNoMemory(OneGpuIsTooFew):
    """Trains, and has room to score only at the third attempt."""

    def train(self, stage, placement):
        self.tried.append(placement)

    def evaluate(self, plan, stages, placement):
        if len(self.tried) < 3:
            raise OutOfMemory("9000 tokens do not fit in memory for scoring.")

    def pause(self, seconds):
        assert seconds > 0


def test_where_no_training_ran_out_of_memory_its_placement_stays(tmp_path):
    backend, execution = (
        ScoringFindsNoMemory(),
        Execution(store=Store(tmp_path), leases=Leases(tmp_path, "me")),
    )
    placement = Placement(forward_tokens=1000, device="cuda")
    complete_trial(plan(trial()), placement, backend, execution)
    assert backend.tried == [placement] * 3
    assert backend.said == ["again in 5 s", "again in 10 s"]
