"""Looking up codes in vector registers, compared with numpy's indexing."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.kernels import registers
from loftq_exp.kernels import unpack as kernels
from loftq_exp.kernels.compiled import compiled
from loftq_exp.loftq.quantizers import make_quantizer
from loftq_exp.storage.codes import pack_codes
from loftq_exp.storage.packed import dequantize, pack, product

FORMS = [
    pytest.param(
        lanes, marks=pytest.mark.skipif(registers.lanes() < lanes, reason=f"no registers of {lanes} lanes here")
    )
    for lanes in (8, 16)
]


@pytest.mark.parametrize("lanes", FORMS)
@pytest.mark.parametrize("bits", registers.REGISTER_WIDTHS)
@settings(deadline=None, max_examples=20)
@given(sixteens=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_each_code_brings_its_level_and_nothing_else_is_touched(
    bits: int, lanes: int, sixteens: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 2**bits, 16 * sixteens, dtype=np.uint8)
    levels = draw.standard_normal(2**bits).astype(np.float32)
    room = np.full(len(codes) + 64, np.nan, np.float32)
    packed = pack_codes(torch.from_numpy(codes), bits).numpy()
    before = packed.copy()
    registers.looking_up(bits, lanes)(packed, registers.padded(levels), room[32 : len(codes) + 32])
    assert np.array_equal(room[32 : len(codes) + 32], levels[codes])
    assert np.isnan(room[:32]).all()
    assert np.isnan(room[len(codes) + 32 :]).all()
    assert np.array_equal(packed, before)


@pytest.mark.parametrize("lanes", FORMS)
@pytest.mark.parametrize("bits", registers.REGISTER_WIDTHS)
def test_every_code_in_every_lane(bits: int, lanes: int) -> None:
    codes = np.stack([(np.arange(16) + shift) % 2**bits for shift in range(2**bits)]).reshape(-1).astype(np.uint8)
    levels = np.linspace(-1, 1, 2**bits, dtype=np.float32)
    found = np.empty(codes.size, np.float32)
    registers.looking_up(bits, lanes)(
        pack_codes(torch.from_numpy(codes), bits).numpy(), registers.padded(levels), found
    )
    assert np.array_equal(found, levels[codes])


@pytest.mark.parametrize("lanes", FORMS)
@pytest.mark.parametrize("bits", registers.REGISTER_WIDTHS)
def test_a_value_gets_the_code_that_counting_thresholds_gives_and_back_its_level(bits: int, lanes: int) -> None:
    nearest, levels_of = registers.nearest(bits, lanes), registers.levels_of(bits, lanes)

    def both(x: np.ndarray, thresholds: np.ndarray, levels: np.ndarray, codes: np.ndarray, values: np.ndarray) -> None:
        for i in range(x.size // lanes):
            nearest(x, thresholds, codes, lanes * i)
            levels_of(codes, levels, values, lanes * i)

    levels = np.sort(np.random.default_rng(bits).standard_normal(2**bits)).astype(np.float32)
    thresholds = (levels[:-1] + levels[1:]) / 2
    ends = [np.nextafter(thresholds, np.float32(end)) for end in (-9, 9)]  # and the thresholds themselves: not above
    x = np.resize(np.concatenate([thresholds, *ends, levels, np.float32([-9, 9])]), 160).astype(np.float32)
    codes, values = np.empty(x.size, np.uint8), np.empty_like(x)
    compiled(both)(x, registers.padded(thresholds), registers.padded(levels), codes, values)
    assert np.array_equal(codes, (x[:, None] > thresholds).sum(axis=1))
    assert np.array_equal(values, levels[codes])


CASES = [
    ("nf", 2, 64, torch.bfloat16),
    ("nf", 3, 64, torch.bfloat16),
    ("nf", 4, 32, torch.float32),
    ("nf", 4, 64, torch.bfloat16),
    ("uniform", 3, 256, torch.float32),
    ("uniform", 4, 64, torch.bfloat16),
]


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """Recompile the kernels in the test, and after it for this CPU."""

    def forget() -> None:
        for made in (
            kernels.unpacking,
            kernels.multiplying,
            kernels._unpack_kernel,
            kernels._product_kernel,
            kernels._looking_up,
        ):
            made.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("lanes", [0, *FORMS])
@pytest.mark.parametrize(("kind", "bits", "block", "stored"), CASES)
def test_rows_are_multiplied_and_values_unpacked_alike_with_and_without_registers(
    kind: str, bits: int, block: int, stored: torch.dtype, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registers, "lanes", lambda: lanes)
    shape = (24, 512)
    generator = torch.Generator().manual_seed(bits)
    quantizer = make_quantizer(kind, bits, block, stored)
    quantized = quantizer.encode(torch.randn(shape, generator=generator))
    parts = pack(quantized, quantizer)
    assert torch.equal(dequantize(parts, quantizer, shape, stored).float(), quantizer.decode_stored(quantized))
    for count in (1, 3):
        rows = torch.randn(count, 512, generator=generator).to(stored)
        found = product(parts, quantizer, shape, rows)
        assert found is not None
        exact = rows.double() @ quantizer.decode(quantized).double().T
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(stored).eps, atol=1e-4)


def test_not_where_numba_compiles_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.numba is None:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(kernels.numba.config, "CPU_NAME", "generic")
    assert registers.lanes.__wrapped__() == 0
