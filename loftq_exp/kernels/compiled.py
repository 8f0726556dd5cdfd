"""numba, and how this package has it compile: the one place that knows whether it is there."""

from __future__ import annotations

from typing import Any

try:
    import numba
except ImportError:  # said once, by loftq_exp.kernels.quantize
    numba = None  # type: ignore[assignment]


def compiled(function: Any) -> Any:
    """`function` as numba compiles it: on one thread, without Python's lock, every float32 operation as it is written."""
    # No NaN comes in, which lets the compiler take maxima lane by lane. Nothing else of fastmath: it would change bytes.
    return numba.njit(function, nogil=True, error_model="numpy", fastmath={"nnan"})
