"""Small cells with real training, run on a Ray that is up, in this process."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from orchestrator.run.compute import checkpoint_folder
from orchestrator.run.events import Event
from orchestrator.run.ray.sweep import run_on_ray
from orchestrator.run.trial import Execution
from orchestrator.spec.resolve import resolve
from orchestrator.spec.stages import TrialPlan
from orchestrator.spec.trials import RetryPolicy, Sweep, grid
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import Leases
from trainers.rewards import RewardSpec
from trainers.specs import DatasetSpec, DrawSpec, ModelSpec, OptimSpec, Placement
from trainers.train.stopping import StopRequest

Told = TypeVar("Told", bound=Event)

EX_RM = RewardSpec(kind="ex_rm")
IM_RM = RewardSpec(kind="im_rm", beta=0.01)
ALONE = Placement(forward_tokens=4096)
GANG = Placement(world_size=2, zero_stage=2, forward_tokens=1)
RETRIES = RetryPolicy(back_off_s=0.5)


def cells(
    storage: Path,
    model: Path,
    rewards: Sequence[RewardSpec] = (EX_RM,),
    *,
    epochs: int,
    lr: float = 1e-4,
    seeds: Sequence[int] = (0,),
) -> tuple[TrialPlan, ...]:
    """One trial per reward type and seed: 16 pairs of the tiny world, four a step, evaluated on eight."""
    world = DatasetSpec(name="tiny_world", source="builtin:tiny_world")
    trials = grid(
        models=[ModelSpec(name="tiny", source=str(model))],
        rewards=rewards,
        train_sets=[world],
        eval_sets=[world],
        seeds=seeds,
        recipe=lambda *_: OptimSpec(lr=lr, epochs=epochs, effective_batch=4),
        train_draw=DrawSpec(max_pairs=16),
        eval_draw=DrawSpec(max_pairs=8),
    )
    return resolve(Sweep(name="faults", trials=trials), Store(storage)).plans


class Run:
    """A sweep run to its end on the Ray that is up; `inject` does its harm from a thread meanwhile."""

    def __init__(
        self,
        storage: Path,
        plans: Sequence[TrialPlan],
        placement: Placement,
        inject: Callable[["Run"], None] | None = None,
        **changes: Any,
    ) -> None:
        self.store = Store(storage)
        self.plans = plans
        self.events: list[Event] = []
        self.ended = False
        self._fault: BaseException | None = None
        self._inject = inject
        values = {"leases": Leases(storage, "test"), "retries": RETRIES, "checkpoint_steps": 5}
        execution = Execution(store=self.store, **{**values, **changes})
        scratch = storage / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        thread = threading.Thread(target=self._harm, daemon=True)
        if inject is not None:
            thread.start()
        placements = {plan.key: placement for plan in plans}
        self.stop = StopRequest(30)
        try:
            run_on_ray(plans, placements, self.events.append, execution, scratch, self.stop)
        finally:
            self.ended = True
            if inject is not None:
                thread.join()
        if self._fault is not None:
            raise self._fault

    def _harm(self) -> None:
        try:
            self._inject(self)
        except BaseException as error:
            self._fault = error

    def of(self, kind: type[Told]) -> list[Told]:
        """Events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def wait_for(self, found: Callable[[], Any], seconds: float = 900) -> Any:
        """Poll until something is found."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.ended:
            if value := found():
                return value
            time.sleep(0.05)
        raise AssertionError(f"nothing within {seconds} s, or the run had ended; events: {self.events}")

    def wait_for_checkpoint(self) -> None:
        """Until the first trial has a complete checkpoint."""
        folder = checkpoint_folder(self.store, self.plans[0].key)
        self.wait_for(lambda: list(folder.glob("step*.json")))

    def manifest(self) -> dict[str, Any]:
        """Of the first trial's training."""
        manifest = self.store.manifest("train", self.plans[0].key)
        assert manifest is not None
        return manifest

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the first trial's training."""
        return weights_of(self.store, self.plans[0])


def weights_of(store: Store, plan: TrialPlan) -> dict[str, torch.Tensor]:
    """What its training came to."""
    return load_file(store.read("weights", plan.key) / "model" / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
