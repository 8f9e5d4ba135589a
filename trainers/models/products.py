"""Precision of fp32 matrix products on a GPU: full fp32, or TF32 for a model that was loaded in tf32."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from trainers.errors import SpecError
from trainers.specs import Precision


def settle_products(precision: Precision) -> None:
    """Make full fp32 the default: some images tell CUDA's libraries to use TF32. Raises SpecError for tf32 without a GPU.

    A tf32 model turns TF32 on by `products_of`.
    """
    if precision == "tf32" and not torch.cuda.is_available():
        raise SpecError("--precision tf32: only a GPU has TF32, and there is none here; give fp32 or bf16.")
    # CUDA's libraries read it at their first product; 0 would overrule torch.
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)
    # FlexAttention's kernels read the first setting, too.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def products_of(model: Any) -> Iterator[None]:
    """Use TF32 for fp32 products inside the block if load_model marked the model `tf32`; restore the setting after."""
    before = torch.get_float32_matmul_precision()
    if getattr(model, "tf32", False):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
