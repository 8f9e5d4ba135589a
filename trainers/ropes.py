"""Rotary position embeddings that depend on how long a row is ("dynamic", "longrope"): each row as if it were alone.

transformers takes the frequencies of the longest row of a forward for all of them, and "dynamic" ones keep those of
the longest row that they have seen.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def separate_rows(model: nn.Module) -> None:
    """Make such embeddings compute each row alone: what stands from one position 0 to the next."""
    for module in _by_length(model):
        module.forward = MethodType(_each_row_alone, module)  # type: ignore[method-assign]


def shared_tokens(model: nn.Module) -> int | None:
    """Tokens up to which rows have the same frequencies and can share what they begin with; None where all have."""
    return min((length for lengths in _by_length(model).values() for length in lengths), default=None)


def _by_length(model: nn.Module) -> dict[Any, list[int]]:
    """Such embeddings, and of each the lengths up to which it stays as it is."""
    found = {}
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        of_layers = kinds if isinstance(kinds, dict) else {None: kinds}
        lengths = [_unchanged(module, kind, layer) for layer, kind in of_layers.items() if _changes(kind)]
        if lengths:
            found[module] = lengths
    return found


def _changes(kind: Any) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _unchanged(module: Any, kind: Any, layer: str | None) -> int:
    if "dynamic" in kind:
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    return int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])


def _each_row_alone(self: Any, x: Tensor, position_ids: Tensor, *others: Any, **named: Any) -> Any:
    compute = type(self).forward
    found = []
    for position_1T in position_ids.split(1):
        begins = (position_1T[0, 1:] == 0) & (position_1T[0, :-1] > 0)
        parts = []
        for position_1L in position_1T.tensor_split((begins.nonzero()[:, 0] + 1).tolist(), dim=1):
            # A row of one token makes it forget longer ones.
            compute(self, x, torch.zeros_like(position_1L[:, :1]), *others, **named)
            parts.append(compute(self, x, position_1L, *others, **named))
        found.append(_joined(parts, -2))
    return _joined(found, 0)


def _joined(parts: list[Any], dim: int) -> Any:
    """Cosines and sines, or one tensor of both."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim)
    return tuple(torch.cat(some, dim) for some in zip(*parts, strict=True))
