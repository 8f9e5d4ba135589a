"""The loss that turns reward margins into gradients, as a pure function."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """−ln σ(r⁺ − r⁻) for each of P pairs (paper §3)."""
    return -F.logsigmoid(chosen_P - rejected_P)
