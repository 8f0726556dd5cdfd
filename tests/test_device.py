"""Device, compute type and memory of the machine."""

from __future__ import annotations

import resource
import sys

import pytest

from loftq_exp.device import peak_memory


def test_peak_memory_is_in_bytes_on_linux_and_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        ru_maxrss = 3 << 20

    monkeypatch.setattr(resource, "getrusage", lambda who: Usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory()["resident_bytes"] == 3 << 30
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory()["resident_bytes"] == 3 << 20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory()["resident_bytes"] == 0, "Windows does not say"
