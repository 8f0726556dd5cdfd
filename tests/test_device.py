"""Device, compute type and memory of the machine."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest

from loftq_exp import device
from loftq_exp.device import PeakMemory

MIB = 1 << 20


def resident(watch: PeakMemory) -> int:
    found = watch.read()["resident_bytes"]
    assert isinstance(found, int)
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system cannot reset the peak")
def test_each_stage_has_its_own_peak() -> None:
    before = resident(PeakMemory())
    large = PeakMemory()
    block = bytearray(256 * MIB)
    del block
    assert resident(large) > before + 200 * MIB
    assert resident(PeakMemory()) < before + 100 * MIB, "the earlier stage's block is gone"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_without_a_reset_a_peak_is_known_only_if_it_grew(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    peaks = iter([3 << 20, 5 << 20, 5 << 20, 5 << 20])
    unit = 1 if platform == "darwin" else 1024

    class Usage:
        @property
        def ru_maxrss(self) -> int:
            return next(peaks)

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(resource, "getrusage", lambda who: Usage())
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("read_text", "write_text"):
        monkeypatch.setattr(Path, name, missing)
    first = PeakMemory()
    assert first.read() == {"resident_bytes": (5 << 20) * unit}
    second = PeakMemory().read()
    assert second["resident_bytes"] is None
    assert second["resident_reason"] == (
        f"this system cannot reset the peak, and earlier work of this process reached {(5 << 20) * unit} bytes"
    )


def test_windows_reports_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_peak_resident_bytes", lambda: None)
    assert PeakMemory().read() == {
        "resident_bytes": None, "resident_reason": "this system does not report a process's peak",
    }  # fmt: skip
