"""Rotary position embeddings that depend on how long a row is ("dynamic", "longrope"): each row as if it were alone.

transformers takes the frequencies of the longest row of a forward for all of them, and "dynamic" ones keep those of
the longest row that they have seen.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def separate_rows(model: nn.Module) -> None:
    """Make such embeddings compute each row of positions alone."""
    for module in _by_length(model):
        module.forward = MethodType(_each_row_alone, module)  # type: ignore[method-assign]


def by_length(model: nn.Module) -> bool:
    """Whether the model has such embeddings."""
    return bool(_by_length(model))


def _by_length(model: nn.Module) -> list[nn.Module]:
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names):
            found.append(module)
    return found


def _each_row_alone(self: Any, x: Tensor, position_ids: Tensor, *others: Any, **named: Any) -> Any:
    compute = type(self).forward
    found = []
    for position_1L in position_ids.split(1):
        # A row of one token makes it forget longer ones.
        compute(self, x, torch.zeros_like(position_1L[:, :1]), *others, **named)
        found.append(compute(self, x, position_1L, *others, **named))
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
