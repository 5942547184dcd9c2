"""The matrix product that every network here spends its time in, on the fastest kernel the device has.

Also how many tokens to work on at once: a CPU wants intermediate results that stay in its cache, an accelerator
wants few and large kernels.
"""

from typing import Literal

import torch
from torch.nn import functional

Activation = Literal["none", "relu", "gelu"]

_CACHE_BYTES = 12 * 2**20
_ACCELERATOR_BYTES = 512 * 2**20
# The operator behind torch.compile's CPU linear layers; without it functional.linear gives the same product.
_HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "none"
) -> torch.Tensor:
    """activation(rows @ weight.T + bias): (…, inputs) and (outputs, inputs) to (…, outputs), in the dtype of both.

    `gelu` is the exact one, by the error function. There are no gradients.
    """
    whole = rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if _HAS_ONEDNN and whole and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        # functional.linear asks MKL here, which is a fifth slower on AMD's processors and no faster on others.
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, activation, [], "none")  # noqa: SLF001
        return product
    product = functional.linear(rows, weight, bias)
    if activation == "relu":
        return product.relu_()
    return functional.gelu(product) if activation == "gelu" else product


def rows_at_once(device: torch.device, bytes_per_row: int) -> int:
    """How many rows of `bytes_per_row` an intermediate result should have on `device`; at least 256."""
    budget = _CACHE_BYTES if device.type == "cpu" else _ACCELERATOR_BYTES
    return max(256, budget // bytes_per_row)
