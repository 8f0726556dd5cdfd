"""Whether a device runs the Triton kernels for packed weights, and these kernels. Does not import Triton until then."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

Parts = Mapping[str, torch.Tensor]

GPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of values that the kernels read and write."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability that has bfloat16."""


class GpuKernels(NamedTuple):
    """See `loftq_exp.kernels.triton_unpack` and `loftq_exp.kernels.triton_product`."""

    unpack: Callable[[Parts, Quantizer, tuple[int, int], torch.Tensor], None]
    multiplies: Callable[[Quantizer, tuple[int, int], int, torch.dtype], bool]
    multiply: Callable[[Parts, Quantizer, tuple[int, int], torch.Tensor, torch.Tensor], None]


@functools.cache
def gpu_kernels(device: torch.device) -> GpuKernels | None:
    """Return the kernels for this device; None if it is not a CUDA device of `LEAST_CAPABILITY`, or Triton is missing."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return None
    from loftq_exp.kernels import triton_product, triton_unpack

    return GpuKernels(triton_unpack.unpack, triton_product.multiplies, triton_product.multiply)
