"""The machine: the device of a run, its compute dtype, and its peak memory."""

from __future__ import annotations

import sys

import torch

from loftq_exp import ranks
from loftq_exp.errors import UserError


def compute_device(name: str) -> torch.device:
    """Return the torch device of the setting `device`. Raise UserError if it is not available.

    With several ranks, each has the CUDA device of its local rank.
    """
    if name == "auto":
        return compute_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: not a device; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: torch sees no CUDA device here; use device=cpu or device=auto")
    if device.type == "cuda" and ranks.count() > 1:
        return _own_device(name, device)
    return device


def _own_device(name: str, device: torch.device) -> torch.device:
    if device.index is not None:
        raise UserError(f"device={name}: each of {ranks.count()} processes needs a device of its own; use device=cuda")
    if ranks.local_rank() >= torch.cuda.device_count():
        raise UserError(f"device={name}: there are fewer CUDA devices ({torch.cuda.device_count()}) than processes; "
                        "start at most as many, or use device=cpu")  # fmt: skip
    return torch.device("cuda", ranks.local_rank())


def compute_dtype(device: torch.device, bf16: bool | None) -> torch.dtype:
    """Return bfloat16 if `bf16` is true, or if it is None and the device supports bfloat16; else float32.

    A CPU without bfloat16 instructions emulates it, about a hundred times slower than float32.
    """
    if bf16 is None:
        bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if bf16 else torch.float32


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def peak_memory() -> dict[str, int]:
    """Return this process's peak memory so far, in bytes: resident (with file-backed pages), and allocated on CUDA."""
    peak = {"resident_bytes": _peak_resident_bytes()}
    if torch.cuda.is_available():
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident_bytes() -> int:
    """Return the peak resident memory in bytes; 0 if the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in bytes on macOS, in KiB elsewhere
