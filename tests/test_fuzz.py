"""Fuzzed input, see fuzzing.py: hundreds of cases here, 10,000 of each kind in `make test-all`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import TARGETS, fuzz

CASES = {"safetensors": 400, "index": 400, "rows": 400, "overrides": 200, "config": 150, "tokenizer": 150}


def test_every_kind_of_input_has_cases() -> None:
    assert set(CASES) == set(TARGETS)


@pytest.mark.parametrize("target", CASES)
def test_some_bad_input(target: str) -> None:
    result = fuzz(target, CASES[target], seed=1)
    assert result.failures == []
    assert result.accepted > 0
    assert result.refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES)
def test_ten_thousand_cases_of_bad_input(target: str) -> None:
    """In a process of its own, whose memory nothing else has taken."""
    command = [sys.executable, str(Path(__file__).with_name("fuzzing.py")), "--cases", "10000", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{target}: 10000 cases, " in done.stdout
