"""The machine: the device of a run, its compute dtype, and its peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

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


def compute_dtype(device: torch.device, bf16: bool | None, fp16: bool = False) -> torch.dtype:
    """Return float16 if `fp16`, bfloat16 if `bf16` or if it is None and the device supports bfloat16; else float32.

    A CPU without bfloat16 instructions emulates it, about a hundred times slower than float32. Raises UserError for float16 on
    a CPU: accelerate would neither compute in it nor scale the loss there, without a word.
    """
    if fp16:
        if device.type == "cpu":
            raise UserError(
                "train.fp16=true: float16 is trained and scored on a GPU only; use train.bf16=true, or leave both out"
            )
        return torch.float16
    if bf16 is None:
        bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if bf16 else torch.float32


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def release_memory() -> None:
    """Return freed memory to the system. glibc keeps it in pieces, which over many jobs become more; other C libraries have no call."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class PeakMemory:
    """The peak memory of this process from the creation of this object on. Objects do not overlap: one resets the other's peak."""

    def __init__(self) -> None:
        self._reset = _reset_peak()
        self._before = _peak_resident_bytes()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int | str | None]:
        """Return the peak in bytes: `resident_bytes` (with file-backed pages), and `cuda_bytes` (allocated) if there is CUDA.

        `resident_bytes` is None if the peak is unknown, and `resident_reason` is then why.
        """
        peak: dict[str, int | str | None] = _known_or_why(self._reset, self._before, _peak_resident_bytes())
        if torch.cuda.is_available():
            peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
        return peak


def _known_or_why(reset: bool, before: int | None, after: int | None) -> dict[str, int | str | None]:
    if after is None:
        return {"resident_bytes": None, "resident_reason": "this system does not report a process's peak"}
    # A peak that was not reset is this stage's only if it has grown since the stage began.
    if reset or before is None or after > before:
        return {"resident_bytes": after}
    return {"resident_bytes": None, "resident_reason": f"this system cannot reset the peak, and earlier work of this process reached {before} bytes"}  # fmt: skip


def _reset_peak() -> bool:
    """Set the kernel's record of this process's peak to its present memory, as Linux can. Return whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident_bytes() -> int | None:
    """Return the peak resident memory in bytes; None if the system does not report it (Windows)."""
    try:  # on Linux getrusage also has peaks from before the reset
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in bytes on macOS, in KiB elsewhere
