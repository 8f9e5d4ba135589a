"""DeepSpeed around a reward module: the process group, the optimiser, the engine. Private interfaces: versions.py."""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.errors import Interrupted, ModelError
from trainers.models.attention import PACKED_PAIRS, pair_attention
from trainers.specs import OptimSpec, Placement, Precision
from trainers.train.checkpoints import on_first, together

# Ranks wait in a collective while rank 0 writes an epoch's model; NCCL's default is ten minutes.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
COMPILER = "inductor"


def import_deepspeed() -> None:
    """Import DeepSpeed without MLflow, which its autotuner would import: a second of each process that only trains.

    In a process with a thread that may import MLflow meanwhile, leave this to process_group.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed  # noqa: F401
    finally:
        if hidden:
            del sys.modules["mlflow"]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of the launcher, or make one of this process alone, for the duration of the block."""
    import deepspeed
    from deepspeed.comm import comm

    # DeepSpeed would compile this (45–100 s).
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    backend, options = "gloo", dict[str, Any](timeout=COLLECTIVE_TIMEOUT)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        # Before any collective: else NCCL guesses a rank's device, and refuses two ranks on one.
        torch.cuda.set_device(device)
        backend, options["device_id"] = "nccl", device
    own = not dist.is_initialized()
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if own and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, **options)
    elif own:
        gloo_on_loopback()
        hook = sys.excepthook
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)  # type: ignore[attr-defined]
        # Tracebacks of a script that continues after this block must not name a rank.
        sys.excepthook = hook
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, auto_mpi_discovery=False)
    try:
        yield
    except Exception as error:
        # If only this rank failed, the others are in a collective, and to leave the group would wait for them.
        own = own and (dist.get_world_size() == 1 or isinstance(error, Interrupted))
        raise
    finally:
        if own:
            # So that a reused process can start its next training.
            comm.destroy_process_group()
            comm.cdb = None
            if named is None:
                os.environ.pop("GLOO_SOCKET_IFNAME", None)


def gloo_on_loopback() -> None:
    """Make gloo use the loopback interface, since all ranks run on this machine."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")


def make_engine(
    module: nn.Module,
    *,
    optim: OptimSpec,
    placement: Placement,
    precision: Precision,
    universal: bool = False,
) -> Any:
    """Make the DeepSpeed engine that trains `module`; `universal` says that it will load a universal checkpoint."""
    import deepspeed

    # In evaluation mode: a dropout would make the result depend on rank, placement and process.
    module.eval()
    if placement.checkpointing:
        _checkpoint_activations(module, zero_stage=placement.zero_stage)
    if placement.compile:
        _compile_layers(module)
    zero: dict[str, Any] = {"stage": effective_zero_stage(placement, precision)}
    if placement.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
        if torch.cuda.is_available():
            torch.set_num_threads(share_of_cpus(len(os.sched_getaffinity(0)), _gpus_of_this_machine()))
    config = {
        # The loop weights each forward, and tells DeepSpeed which is the last of a step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW serves offloaded state; DeepSpeed's own would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's default clips to norm 1.
        "gradient_clipping": optim.clip or 0.0,
        "bf16": {"enabled": precision == "bf16"},
        # DeepSpeed's default is the weights' precision: in bf16, small gradients are lost from the sum of many forwards.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**9,
    }
    if placement.zero_stage == 3:
        _partition(module, config, precision)
    engine, *_ = deepspeed.initialize(model=module, optimizer=_optimizer(module, optim), config=config)
    return engine


def _partition(module: nn.Module, config: dict[str, Any], precision: Precision) -> None:
    """Send each rank its part of rank 0's weights, tensor by tensor; DeepSpeed would first move all to each GPU."""
    import deepspeed

    for parameter in module.parameters() if precision == "bf16" else ():
        parameter.data = parameter.data.bfloat16()
    deepspeed.zero.Init(module=module, config_dict_or_path=config)
    # Buffers stay whole.
    module.to(deepspeed.get_accelerator().current_device_name())


def load_once(load: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Load a model of which rank 0 alone reads the weights; other ranks allocate it. A collective.

    `load` is given what is known of the config, nothing on rank 0. make_engine sends the weights to the other ranks; until
    then their allocation takes no memory. A SweepError of one rank is raised on all of them.
    """
    first, loaded = dist.get_rank() == 0, list[Any]()

    def read() -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        loaded.append(load({}))
        config = loaded[0].config
        known = {name: getattr(config, name) for name in ("vocab_size", "tie_word_embeddings")}
        return known, dict(loaded[0].named_buffers())

    def make_room() -> list[Any] | None:
        # A rank that cannot build the same model reads it.
        with contextlib.suppress(ModelError):
            loaded[:] = loaded or [load(known)]
            for name, buffer in loaded[0].named_buffers():
                buffer.copy_(buffers[name])
            return [
                (name, item.shape, item.dtype, item.requires_grad)
                for name, item in loaded[0].named_parameters()
            ]
        return None

    known, buffers = on_first(read)
    alike = together(make_room)
    if any(found != alike[0] for found in alike) and not first:
        loaded[:] = [load({})]
    return loaded[0]


def share_of_cpus(cpus: int, gpus: int) -> int:
    """Return the threads for a rank that updates offloaded state on the CPU; its launcher gave it one."""
    return max(1, cpus // max(1, gpus))


def _gpus_of_this_machine() -> int:
    """Count the machine's GPUs; CUDA may show this process only its own."""
    listed = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return max(listed, torch.cuda.device_count())


def effective_zero_stage(placement: Placement, precision: Precision) -> int:
    """Return the ZeRO stage for DeepSpeed: in bf16 at least 1, since without ZeRO it keeps no fp32 master weights."""
    return max(placement.zero_stage, 1) if precision == "bf16" else placement.zero_stage


def _optimizer(module: nn.Module, optim: OptimSpec) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "adamw": (torch.optim.AdamW, {"betas": optim.betas, "eps": optim.eps, "fused": True}),
        "sgd": (torch.optim.SGD, {"momentum": optim.momentum, "fused": True}),
        "rmsprop": (torch.optim.RMSprop, {"momentum": optim.momentum, "eps": optim.eps}),
    }
    kind, options = kinds[optim.optimizer]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=optim.lr, weight_decay=optim.weight_decay, **options
    )
    return optimizer


def learning_rate(optim: OptimSpec, step: int, steps: int) -> float:
    """Return the learning rate of optimiser step `step` (from 0) of `steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.lr * (1 - done)
    return optim.lr * (1 + math.cos(math.pi * done)) / 2


def _checkpoint_activations(module: nn.Module, *, zero_stage: int) -> None:
    """Recompute each layer in the backward pass. Only layers are in training mode, and not while they compute."""
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = next(found for found in module.modules() if isinstance(found, PreTrainedModel))
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"a {type(model).__name__} cannot recompute its activations; train it without checkpointing."
        )
    if zero_stage == 3 and getattr(model.config, "num_kv_shared_layers", None):
        raise ModelError(
            f"layers of a {type(model).__name__} take keys and values from others, whose gradients recomputing loses "
            "under ZeRO 3; train it without checkpointing, or with ZeRO 2."
        )
    # ZeRO-3 partitions weights between forward and backward, which the newer kind of checkpoint refuses.
    model.activation_checkpointing_enable({"use_reentrant": zero_stage == 3})
    if zero_stage == 3 and not any(item.requires_grad for item in model.get_input_embeddings().parameters()):
        # The older kind computes no gradient for a layer whose input needs none.
        model.enable_input_require_grads()
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            layer._gradient_checkpointing_func = functools.partial(
                _checkpoint_evaluating, layer, layer._gradient_checkpointing_func
            )


def _compile_layers(module: nn.Module) -> None:
    """Compile each layer around its attention, for any number of tokens; layers of one kind share their graphs."""
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Attention has a kernel of its own, which depends on the lengths of pairs.
    AttentionInterface.register(PACKED_PAIRS, torch.compiler.disable(pair_attention))
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(backend=COMPILER, dynamic=True)


def _checkpoint_evaluating(layer: nn.Module, checkpoint: Any, forward: Any, *inputs: Any) -> Any:
    """Run `checkpoint` with the layer in evaluation mode: in training mode OPT drops out, and others skip layers."""

    def evaluate(*again: Any) -> Any:
        layer.training = False
        try:
            return forward(*again)
        finally:
            layer.training = True

    return checkpoint(evaluate, *inputs)
