"""The searches without and with vector registers of 8 and 16 lanes give the same bytes as torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loftq_exp.kernels import quantize as kernels
from loftq_exp.kernels import registers, search
from loftq_exp.loftq import make_quantizer
from loftq_exp.loftq import quantizer as quantizer_base

MADE = (
    kernels.quantizing, kernels._levels_encoder, kernels._nearest, kernels._levels_of, kernels._levels_decoder,
    search.best_absmax, search._levels_errors,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_kernels() -> Iterator[None]:
    """Recompile the kernels in the test, and after it for this CPU."""
    for made in MADE:
        made.cache_clear()
    yield
    for made in MADE:
        made.cache_clear()


@pytest.mark.parametrize(("bits", "block", "lanes"), [(3, 32, 0), (2, 64, 8), (4, 64, 8), (4, 128, 16)])
def test_the_same_bytes_on_every_cpu(bits: int, block: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if registers.lanes() < lanes:
        pytest.skip(f"no registers of {lanes} lanes here")
    monkeypatch.setattr(registers, "lanes", lambda: lanes)
    generator = torch.Generator().manual_seed(bits)
    weight, importance = torch.randn(24, 160, generator=generator), torch.rand(160, generator=generator)
    quantizer = make_quantizer("nf", bits, block, torch.bfloat16, levels="optimal", scale="search")
    found = []
    for _ in range(2):
        codes, residual = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(weight.shape)
        scales = torch.empty(quantizer.scales_shape(tuple(weight.shape)))
        quantizer.requantize(weight, None, 1.0, codes, scales, residual, importance)
        found.append((codes, scales, residual))
        monkeypatch.setattr(quantizer_base, "quantizing", lambda quantizer: None)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
