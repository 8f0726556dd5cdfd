"""The same command gives the same numbers: twice, and with other threads within a bound. After a kill: test_pipeline.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command

THREADS_BOUND = 1e-4
"""Largest relative difference of a loss or score between one thread and two: sums are taken in another order."""


def run(cli: Command, name: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The metrics, and the bytes of backbone, adapter and samples, of a run that shares nothing with another."""
    outcome = cli(*cli.tiny, f"output_dir={name}", f"save_dir={name}/init", f"cache_dir={name}/cache")
    assert (outcome.code, outcome.err) == (0, "")
    (folder,) = Path(name, "runs").iterdir()
    paths = [*Path(name).rglob("*.safetensors"), folder / "samples.jsonl"]
    files = {str(path.relative_to(name)): path.read_bytes() for path in paths if "cache" not in path.parts}
    return json.loads((folder / "metrics.json").read_text()), files


def test_twice_and_with_two_threads(cli: Command) -> None:
    (one, bytes_one), (two, bytes_two) = run(cli, "one"), run(cli, "two")
    assert len(bytes_one) == 4
    assert bytes_one == bytes_two
    assert (one["losses"], one["scores"]) == (two["losses"], two["scores"])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other, _ = run(cli, "threads")
    finally:
        torch.set_num_threads(threads)
    assert [loss for _, loss in other["losses"]] == pytest.approx(
        [loss for _, loss in one["losses"]], rel=THREADS_BOUND
    )
    assert other["scores"] == pytest.approx(one["scores"], rel=THREADS_BOUND)
