"""numba and its compiler options; the one module that checks whether numba is installed."""

from __future__ import annotations

from typing import Any

import torch

try:
    import numba
except ImportError:  # loftq_exp.kernels.quantize warns once
    numba = None  # type: ignore[assignment]
else:
    from loftq_exp.kernels import kept

CPU_TYPES = (torch.float32, torch.bfloat16)
"""Types of values that the compiled passes read and write."""

CHUNK_VALUES = 1024
"""Approximate values per chunk. What one loop writes to a chunk is still in the L1 cache for the next loop."""

LANES = 16
"""Values compared or added in parallel within a block. The order of a block's sums is defined by it, see `search`."""

SMALLEST_ABSMAX = 1e-38
"""Smallest divisor, as in bitsandbytes, so that a block of zeros stays finite."""


def compiled(function: Any) -> Any:
    """Return `function` compiled by numba: single-threaded, without the GIL, with float32 operations in the given order."""
    # Inputs have no NaN, so "nnan" is safe; it lets the compiler vectorise maxima. Other fastmath flags would change bytes.
    return compiled_with(function, {"nnan"})


def compiled_with(function: Any, fastmath: set[str]) -> Any:
    """As `compiled`, with these fastmath flags of LLVM."""
    name = kept.named_by_content(function)
    dispatcher: Any = numba.njit(function, nogil=True, error_model="numpy", fastmath=fastmath)
    if hasattr(dispatcher, "_cache"):  # a plain function with NUMBA_DISABLE_JIT
        dispatcher._cache = kept.Kept(name, {"fastmath": sorted(fastmath)})
    return dispatcher


def compile_seconds() -> float:
    """Return the time that this process has spent in compiling kernels or loading them from disk, in seconds."""
    return kept.clock.seconds if numba is not None else 0.0
