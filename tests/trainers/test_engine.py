"""The engine's own promises, on a module of one weight matrix: what its gradients are summed in."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.trainers import gang
from trainers.specs import OptimSpec, Placement
from trainers.train.engine import make_engine, process_group

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
    """Mean gradient of a step by ZeRO stage and offload: 1 in the first forward of the first rank, else SMALL."""
    with process_group():
        return {
            f"{stage}{'-offload' * offload}": _gradient(stage, offload)
            for stage in (0, 1, 2, 3)
            for offload in (False, True)[: 1 + (stage > 0)]
        }


def _gradient(stage: int, offload: bool) -> float:
    placement = Placement(
        world_size=dist.get_world_size(),
        zero_stage=stage,
        micro_batch=1,
        accumulation=FORWARDS,
        checkpointing=False,
        offload_optimizer=offload,
    )
    engine = make_engine(Product(), optim=OptimSpec(), placement=placement, precision="bf16")
    for forward in range(FORWARDS):
        value = 1.0 if forward == 0 and dist.get_rank() == 0 else SMALL
        engine.backward(engine(torch.full((WIDTH, WIDTH), value, dtype=torch.bfloat16)))
        engine.step()
    return float(engine.get_global_grad_norm()) / WIDTH


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_bf16_weights_are_summed_in_fp32(tmp_path, world_size):
    found = gang.together(functools.partial(gradients), tmp_path, world_size)
    count = FORWARDS * world_size
    expected = (1 + (count - 1) * SMALL) / count
    assert found == {name: pytest.approx(expected, rel=1e-6) for name in found}
    assert len(found) == 7
