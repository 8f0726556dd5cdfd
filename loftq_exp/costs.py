"""What a stage costs: its seconds, those of compiling kernels apart, and its peak memory."""

from __future__ import annotations

import time
from typing import Any

from loftq_exp.device import PeakMemory
from loftq_exp.kernels.compiled import compile_seconds


class Stopwatch:
    """Measures seconds from its creation on, those of compiling kernels apart."""

    def __init__(self) -> None:
        self._compiled, self._began = compile_seconds(), time.perf_counter()

    @property
    def compile_seconds(self) -> float:
        """The time since the start in which kernels were compiled or loaded from disk, on any thread."""
        return compile_seconds() - self._compiled

    @property
    def seconds(self) -> float:
        """The time since the start without `compile_seconds`, which only a machine's first run spends."""
        return time.perf_counter() - self._began - self.compile_seconds


class StageWatch(Stopwatch):
    """Measures a stage from its creation on. One stage of a process is measured at a time."""

    def __init__(self) -> None:
        self._memory = PeakMemory()
        super().__init__()

    def costs(self) -> dict[str, Any]:
        """Return the entries of a stage's record: seconds, compile_seconds and peak_memory, see `PeakMemory.read`."""
        return {"seconds": self.seconds, "compile_seconds": self.compile_seconds, "peak_memory": self._memory.read()}
