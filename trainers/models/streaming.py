"""Score with a model that a GPU does not hold: its layers stay in host memory, each is on the GPU while it computes.

One layer is there at a time. The values are those of the whole model.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from trainers.models.architecture import scoring_gb, widest
from trainers.models.memory import device_gb


def to_score(model: Any, place: str) -> Any:
    """Move a loaded model to the device that scores with it: whole, or layer by layer where its GPU does not hold it."""
    held = sum(item.nbytes for item in (*model.parameters(), *model.buffers()))
    config, width = model.config, next(model.parameters()).element_size()
    if scoring_gb(held, config.hidden_size, widest(config), width) > device_gb(place):
        return stream_layers(model, place)
    return model.to(place)


def stream_layers(model: Any, place: str) -> Any:
    """Move everything but the layers to `place`, and each layer while it computes; a model without known layers whole."""
    layers = layers_of(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for item in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                item.data = item.data.to(place)
    for layer in layers:
        held = [(item, _pinned(item.data, place)) for item in (*layer.parameters(), *layer.buffers())]
        # The first copies, which a GPU does not read by itself, take no more room.
        _leave(held)
        layer.register_forward_pre_hook(functools.partial(_enter, held, place))
        layer.register_forward_hook(functools.partial(_leave, held), always_call=True)
    return model


# The tensors of a layer, each with its values in host memory.
_Held = list[tuple[Tensor, Tensor]]


def _enter(held: _Held, place: str, *_: Any) -> None:
    # A weight cannot take the place of one that was made in another mode.
    with torch.inference_mode(False), torch.no_grad():
        for item, host in held:
            item.data = host.to(place, non_blocking=True, copy=True)


def _leave(held: _Held, *_: Any) -> None:
    for item, host in held:
        item.data = host


def _pinned(tensor: Tensor, place: str) -> Tensor:
    """Return the tensor in memory that a GPU reads by itself, where the system gives such; otherwise as it is."""
    if torch.device(place).type == "cuda":
        with contextlib.suppress(RuntimeError):
            return tensor.pin_memory()
    return tensor


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers computes one after another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
