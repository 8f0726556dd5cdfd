"""Machine code on disk: compiled once per machine, checked when it is read, and apart for each kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loftq_exp.kernels.compiled import compile_seconds, compiled, numba

pytestmark = pytest.mark.skipif(numba is None, reason="numba is not installed")

PROGRAM = """
import json, sys
import numpy as np
from loftq_exp.kernels.bfloat16 import storing
from loftq_exp.kernels.compiled import compile_seconds
order = [word == "True" for word in sys.argv[1:]]
scale, found = np.float32(1.2345678), {}
for rounded in order:
    kernel = storing(rounded)
    found[str(rounded)] = float(kernel(scale, np.empty(1, np.float32)))
    found[f"hits {rounded}"] = sum(kernel.stats.cache_hits.values())
print(json.dumps(found | {"seconds": compile_seconds()}))
"""


def process(folder: Path, *order: bool) -> tuple[dict[str, Any], str]:
    """What a new process computes with the kernels kept in `folder`, in this order, and its standard error."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, order)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout), done.stderr


def test_a_second_process_compiles_nothing_and_another_kernel_stays_another(tmp_path: Path) -> None:
    first, _ = process(tmp_path, True)
    assert (first["True"], first["hits True"]) == (1.234375, 0)
    second, _ = process(tmp_path, False, True)  # compiles its own first: numba would give it the other's symbols
    assert (second["False"], second["hits False"]) == (float(np.float32(1.2345678)), 0)
    assert (second["True"], second["hits True"]) == (1.234375, 1)
    third, _ = process(tmp_path, True, False)
    assert (third["hits True"], third["hits False"]) == (1, 1)
    assert third["seconds"] < first["seconds"] / 2
    for path in tmp_path.rglob("*.bin"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged, errors = process(tmp_path, True)
    assert (damaged["True"], damaged["hits True"]) == (1.234375, 0)
    assert "damaged; the kernel is compiled again" in errors


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found, errors = process(tmp_path / "file", True)
    assert (found["True"], errors) == (1.234375, "")


def test_time_of_compiling_is_counted() -> None:
    before = compile_seconds()

    def doubled(x: Any) -> Any:
        return x * np.float32(2)

    assert compiled(doubled)(np.float32(1.5)) == 3
    assert compile_seconds() > before
