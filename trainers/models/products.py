"""How products of fp32 matrices are rounded on a GPU: not at all, or to TF32 for a model that was loaded in it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from trainers.errors import SpecError
from trainers.specs import Precision


def settle_products(precision: Precision) -> None:
    """Multiply fp32 as fp32 from here on: some images tell CUDA's libraries to round it to TF32. Raises SpecError.

    tf32 is taken back here, too, and asked for by `products_of`; it needs a GPU.
    """
    if precision == "tf32" and not torch.cuda.is_available():
        raise SpecError("--precision tf32: only a GPU has TF32, and there is none here; give fp32 or bf16.")
    # Read by them at their first product; 0 would forbid what torch asks for.
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)
    # FlexAttention's kernels ask for the first, too.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def products_of(model: Any) -> Iterator[None]:
    """Round fp32 products to TF32 inside the block where load_model marked the model `tf32`, and as before after it."""
    before = torch.get_float32_matmul_precision()
    if getattr(model, "tf32", False):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
