"""One training on Ray: Train runs a gang on the nodes that the gate granted, or this very process."""

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from orchestrator.artifacts import Store
from orchestrator.compute import TrainCall
from orchestrator.gate import Grant
from orchestrator.redaction import without_secrets
from orchestrator.rungs import Scored
from orchestrator.searches import GoesOn
from orchestrator.stages import TrainStage
from orchestrator.trial import Execution, Rows
from trainers.objects import ObjectPath
from trainers.specs import Placement

ASK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedTraining:
    """A training that may start: on the nodes of its grant, with whom to tell, and where Train may leave its files."""

    stage: TrainStage
    placement: Placement
    grant: Grant
    execution: Execution
    coordinator: ActorHandle
    scratch: Path


def run_gang(training: GrantedTraining) -> None:
    """Run it to its end. Raises what Train raises."""
    # Seconds of imports, which a process that evaluates, or only waits, does not need.
    from ray import tune
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from orchestrator.rendezvous import LoopbackTorchConfig

    placement, grant = training.placement, training.grant
    on_gpus = placement.device == "cuda"
    here = ray.get_runtime_context().get_node_id()
    in_process = not on_gpus and grant.nodes == (here,)
    if in_process:
        scaling = ScalingConfig(num_workers=0)
    else:
        scaling = ScalingConfig(
            num_workers=placement.world_size,
            use_gpu=on_gpus,
            resources_per_worker={"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1},
            label_selector=[{"ray.io/node-id": node} for node in grant.nodes],
        )
    # A name of its own each time: Train would go on from the state in which the last attempt failed.
    name = f"train-{training.stage.key}-{uuid.uuid4().hex[:8]}"
    provenance = {
        "backend": "ray",
        "tune_trial_id": tune.get_context().get_trial_id(),
        "train_run_name": name,
        "local_mode": in_process,
    }
    TorchTrainer(
        _train_rank,
        train_loop_config={
            "stage": training.stage,
            "placement": placement,
            "execution": training.execution,
            "coordinator": training.coordinator,
            "provenance": provenance,
        },
        torch_config=LoopbackTorchConfig(),
        scaling_config=scaling,
        run_config=RunConfig(
            name=name,
            **_train_storage(training.execution.store, training.scratch),
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=1
            ),
        ),
    ).fit()


def _train_storage(store: Store, scratch: Path) -> dict[str, Any]:
    """Where Train keeps what it writes of a run, which every node must see."""
    if not isinstance(store.root, ObjectPath):
        return {"storage_path": str(scratch)}
    place = store.root / "scratch" / scratch.name
    return {"storage_path": place.in_bucket, "storage_filesystem": place.filesystem()}


def _train_rank(config: dict[str, Any]) -> None:
    """One rank of the gang; rank 0 commits the artifact and reports at most once a second."""
    stage: TrainStage = config["stage"]
    execution: Execution = config["execution"]
    coordinator = config["coordinator"]
    execution.stages.prepare_process()

    def post(event: dict[str, Any]) -> None:
        coordinator.post.remote({"trial": stage.key, **event})

    post({"event": "stage", "stage": "train"})
    call = TrainCall(
        placement=config["placement"],
        checkpoint_steps=execution.checkpoint_steps,
        stop=_StopLeft(coordinator),
        goes_on=_ruled_by_tune(stage, coordinator),
        provenance=config["provenance"],
    )
    with without_secrets(), Rows(post).of("train") as report:
        execution.stages.train(stage, call, execution.store, report)


def _ruled_by_tune(stage: TrainStage, coordinator: ActorHandle) -> GoesOn | None:
    """Tune's ruling at the rungs of a search, waited for; None where the training is part of none."""
    validation = stage.validation
    if validation is None:
        return None

    def goes_on(epoch: int, accuracy: float) -> bool:
        if epoch not in validation.rungs:
            return True
        scored = Scored(epoch=epoch, accuracy=accuracy)
        ruling: bool = ray.get(coordinator.goes_on.remote(stage.key, scored))
        return ruling

    return goes_on


class _StopLeft:
    """Seconds that the coordinator leaves a training to stop in; asked at most once a second."""

    def __init__(self, coordinator: ActorHandle) -> None:
        self._coordinator = coordinator
        self._asked = 0.0

    def __call__(self) -> float | None:
        if time.monotonic() - self._asked < ASK_EVERY_S:
            return None
        self._asked = time.monotonic()
        left: float | None = ray.get(self._coordinator.stop_left.remote())
        return left
