"""The engine's own promises, on a module of one weight matrix: what its gradients are summed in."""

import contextlib
from datetime import timedelta

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.trainers import gang
from trainers.errors import Interrupted
from trainers.specs import OptimSpec, Placement
from trainers.train.engine import make_engine, process_group, share_of_cpus

FORWARDS, WIDTH = 8, 4
# Half of the last place of 1 in bf16: added to 1 in bf16 it is lost.
SMALL = 2.0**-9


class Product(nn.Module):
    """Its gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (self.weight * values).float().sum()


def gradients() -> dict[str, float]:
    """Gradient of a step by ZeRO stage and offload: over forwards the sum, over ranks the mean.

    It is 1 in the first forward of the first rank, else SMALL.
    """
    with process_group():
        return {
            f"{stage}{'-offload' * offload}": _gradient(stage, offload)
            for stage in (0, 1, 2, 3)
            for offload in (False, True)[: 1 + (stage > 0)]
        }


def _gradient(stage: int, offload: bool) -> float:
    placed = {"zero_stage": stage, "offload_optimizer": offload, "forward_tokens": 1}
    placement = Placement(world_size=dist.get_world_size(), **placed)
    engine = make_engine(Product(), optim=OptimSpec(), placement=placement, precision="bf16")
    for forward in range(FORWARDS):
        value = 1.0 if forward == 0 and dist.get_rank() == 0 else SMALL
        engine.set_gradient_accumulation_boundary(forward == FORWARDS - 1)
        engine.backward(engine(torch.full((WIDTH, WIDTH), value, dtype=torch.bfloat16)))
    engine.step()
    return float(engine.get_global_grad_norm()) / WIDTH


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_bf16_weights_are_summed_in_fp32(tmp_path, world_size):
    found = gang.together(gradients, tmp_path, world_size)
    count = FORWARDS * world_size
    expected = (1 + (count - 1) * SMALL) / world_size
    assert found == {name: pytest.approx(expected, rel=1e-6) for name in found}
    assert len(found) == 7


class Begun(Exception):
    pass


@pytest.mark.parametrize("world_size", ["1", "2"])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_group_knows_its_device_and_outlasts_an_upload(monkeypatch, gpu, world_size):
    begun, chosen = [], []

    def begin(backend, **options):
        begun.append((backend, options))
        raise Begun

    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(deepspeed.comm.torch, "build_shm_op", None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", begin)
    with pytest.raises(Begun), process_group():
        pass
    ((backend, options),) = begun
    assert options["timeout"] >= timedelta(minutes=30)
    third = torch.device("cuda", 3)
    assert (backend, options.get("device_id"), chosen) == (
        ("nccl", third, [third]) if gpu else ("gloo", None, [])
    )


@pytest.mark.parametrize(
    ("world_size", "error", "left"),
    [(2, None, True), (2, Interrupted("asked"), True), (2, MemoryError(), False), (1, MemoryError(), True)],
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others_to_leave(monkeypatch, world_size, error, left):
    done = []
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(deepspeed.comm.torch, "build_shm_op", None, raising=False)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: None)
    monkeypatch.setattr(deepspeed.comm.comm, "destroy_process_group", lambda: done.append("left"))
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **options: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), process_group():
        if error:
            raise error
    assert done == ["left"] * left


def test_offloaded_state_is_updated_by_a_gpus_share_of_the_cpus():
    assert [share_of_cpus(*machine) for machine in ((208, 8), (4, 1), (2, 4), (8, 0))] == [26, 4, 1, 8]


@pytest.mark.parametrize(
    ("gpu", "offload", "threads"), [(True, True, 13), (True, False, 1), (False, True, 1)]
)
def test_only_offload_on_a_gpu_takes_more_threads(monkeypatch, gpu, offload, threads):
    used = [1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("trainers.train.engine._gpus_of_this_machine", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(26))
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(deepspeed, "initialize", lambda **options: (None,))
    placement = Placement(zero_stage=1, forward_tokens=1, offload_optimizer=offload)
    make_engine(Product(), optim=OptimSpec(), placement=placement, precision="bf16")
    assert used[-1] == threads
