"""Score with a model that a GPU does not hold: its layers stay in host memory, each is on the GPU while it computes.

The next layer is copied while one computes, so that two are on the GPU at most. The values are those of the whole model.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from trainers.models.architecture import scoring_gb, widest
from trainers.models.memory import device_gb


def to_score(model: Any, device: str) -> Any:
    """Move a loaded model to the device that scores with it: whole, or layer by layer where its GPU does not hold it."""
    held = sum(item.nbytes for item in (*model.parameters(), *model.buffers()))
    config, width = model.config, next(model.parameters()).element_size()
    if scoring_gb(held, config.hidden_size, widest(config), width) > device_gb(device):
        return stream_layers(model, device)
    return model.to(device)


def stream_layers(model: Any, device: str) -> Any:
    """Move everything but the layers to the device, and each layer while it computes; a model without known layers whole."""
    layers = layers_of(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for item in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                item.data = item.data.to(device)
    copying = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    computed: list[torch.cuda.Event] = []
    after: _Streamed | None = None
    for layer in reversed(layers):
        after = _Streamed(layer, torch.device(device), after, copying, computed)
        layer.register_forward_pre_hook(after.enter)
        layer.register_forward_hook(after.leave, always_call=True)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers computes one after another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class _Streamed:
    """A layer's tensors in host memory, their copies on the device, and the layer after it.

    All layers share the stream in which they are copied, and the ends of those that compute.
    """

    def __init__(
        self,
        layer: nn.Module,
        device: torch.device,
        after: "_Streamed | None",
        copying: torch.cuda.Stream | None,
        computed: list[torch.cuda.Event],
    ) -> None:
        self.device, self.after, self.copying, self.computed = device, after, copying, computed
        self.held = [(item, _pinned(item.data, device)) for item in (*layer.parameters(), *layer.buffers())]
        for item, host in self.held:
            item.data = host
        self.copies: list[Tensor] = []

    def fetch(self) -> None:
        """Begin to copy the layer to the device."""
        beside = torch.cuda.stream(self.copying) if self.copying else contextlib.nullcontext()
        # A weight cannot take the place of one that was made in another mode.
        with beside, torch.inference_mode(False), torch.no_grad():
            self.copies = [host.to(self.device, non_blocking=True, copy=True) for _, host in self.held]

    def enter(self, *_: Any) -> None:
        if not self.copies:
            self.fetch()
        if self.copying:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.copying)
            for copy in self.copies:
                copy.record_stream(computing)
        for (item, _host), copy in zip(self.held, self.copies, strict=True):
            item.data = copy

    def leave(self, *_: Any) -> None:
        for item, host in self.held:
            item.data = host
        self.copies = []
        if self.copying:
            self.computed.append(torch.cuda.current_stream(self.device).record_event())
            # The host is ahead of the GPU: if it did not wait for the layer before, all of them would be copied at once.
            if len(self.computed) > 1:
                self.computed.pop(0).synchronize()
        if self.after:
            self.after.fetch()


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in memory that a GPU reads by itself, where the system gives such; otherwise as it is."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return tensor.pin_memory()
    return tensor
