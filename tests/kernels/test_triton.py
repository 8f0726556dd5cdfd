"""The Triton kernels for packed weights: the same values as torch in the interpreter, and compiled for an H100, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq_exp.kernels.gpu import gpu_kernels
from loftq_exp.loftq.quantizers import make_quantizer

CASES = Path(__file__).with_name("interpreted_triton.py")
installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@installed
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_cpu_has_no_gpu_kernels() -> None:
    assert gpu_kernels(torch.device("cpu")) is None


@installed
@pytest.mark.parametrize(
    ("kernel", "kind", "bits", "double"),
    [("_unpack", "uniform", 3, True), ("_one_row", "nf", 3, False), ("_few_rows", "nf", 4, True)],
)
def test_the_kernels_compile_for_an_h100(
    kernel: str, kind: str, bits: int, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU. Unpacking must not fuse a multiplication and an addition, which would change bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loftq_exp.kernels import triton_product, triton_unpack
    from loftq_exp.kernels.triton_codes import TYPES, constants

    function = getattr(triton_unpack if kernel == "_unpack" else triton_product, kernel)
    fixed = dict(constants(make_quantizer(kind, bits, 64, torch.bfloat16, double)))
    fixed |= {"GROUP": 64, "TILE": 4096, "EVEN": True, "ROW": TYPES[torch.bfloat16], "COLUMNS": 4096, "ROWS": 16}
    fixed |= {"OUTS": 16, "PARTS": 8, "UNITS": 64 // fixed["UNIT"]}
    types = {"words": "*i32", "scales": "*u8" if double else "*bf16", "steps": "*fp32", "table": "*fp32"}
    types |= {"out": "*bf16", "rows": "*bf16", "products": "*bf16", "values": "i32", "outs": "i32", "count": "i32"}
    names = function.arg_names
    source = ASTSource(
        function,
        {name: "constexpr" if name in fixed else types[name] for name in names},
        {(index,): fixed[name] for index, name in enumerate(names) if name in fixed},
        {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in types and name != "count"},
    )
    options = {"enable_fp_fusion": False, "num_warps": 8 if kernel == "_few_rows" else 4, "num_stages": 1}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma.rn.f32" not in code
    assert ("mma.sync" in code) == (kernel == "_few_rows")
    assert ".local" not in code, "registers are spilled"
    if kernel == "_unpack":
        assert "st.global.v4.b32" in code, "a thread writes 16 bytes at a time"
