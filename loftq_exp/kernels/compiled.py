"""numba, and how this package has it compile: the one place that knows whether it is there."""

from __future__ import annotations

from typing import Any

import torch

try:
    import numba
except ImportError:  # said once, by loftq_exp.kernels.quantize
    numba = None  # type: ignore[assignment]

CPU_TYPES = (torch.float32, torch.bfloat16)
"""Types of values that the compiled passes read and write."""

CHUNK_VALUES = 1024
"""About as many values go through one loop after the other: what a loop writes is in the nearest cache for the next."""


def compiled(function: Any) -> Any:
    """`function` as numba compiles it: on one thread, without Python's lock, every float32 operation as it is written."""
    # No NaN comes in, which lets the compiler take maxima lane by lane. Nothing else of fastmath: it would change bytes.
    return numba.njit(function, nogil=True, error_model="numpy", fastmath={"nnan"})
