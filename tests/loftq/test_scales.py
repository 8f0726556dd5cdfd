"""Double quantization: scales are quantized once, and are the same in a file, in memory and in the residual."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from loftq_exp.loftq import alternation, decompose, make_quantizer
from loftq_exp.loftq.scales import SCALES_PER_STEP, dequantize_scales, quantize_scales
from loftq_exp.storage.packed import pack, unpack

LARGEST = torch.finfo(torch.float32).max
FINITE = st.floats(-LARGEST, LARGEST, width=32)
SIGNS = st.sampled_from([(False,), (True,), (True, False)])


def rounded(scales: torch.Tensor, signed: tuple[bool, ...]) -> torch.Tensor:
    return dequantize_scales(quantize_scales(scales, signed), signed)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), two.contiguous().view(torch.int32))


def positive_where_unsigned(scales: torch.Tensor, signed: tuple[bool, ...]) -> torch.Tensor:
    return torch.where(torch.tensor(signed), scales, scales.abs())


@given(data=st.data(), signed=SIGNS, groups=st.integers(1, 4))
def test_what_was_rounded_once_stays_as_it_is(data: st.DataObject, signed: tuple[bool, ...], groups: int) -> None:
    drawn = data.draw(arrays("float32", (groups, len(signed)), elements=FINITE))
    once = rounded(positive_where_unsigned(torch.from_numpy(drawn), signed), signed)
    assert once.isfinite().all()
    assert same_bits(rounded(once, signed), once)
    first, second = (quantize_scales(scales, signed) for scales in (once, rounded(once, signed)))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.steps, second.steps)


def test_a_scale_moves_by_at_most_half_a_step() -> None:
    signs = ((False,), (True,), (True, False))
    for groups, signed, magnitude in itertools.product((1, 255, 256, 257, 1000), signs, (1e-30, 0.01, 1.0, 1e37)):
        check_half_a_step(groups, signed, magnitude)


def check_half_a_step(groups: int, signed: tuple[bool, ...], magnitude: float) -> None:
    generator = torch.Generator().manual_seed(groups)
    scales = magnitude * torch.randn(groups, len(signed), generator=generator)
    scales = positive_where_unsigned(scales, signed)
    quantized = quantize_scales(scales, signed)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.steps.shape == (math.ceil(groups / SCALES_PER_STEP), len(signed))
    found = dequantize_scales(quantized, signed)
    assert same_bits(rounded(found, signed), found)
    for column, sign in enumerate(signed):
        for start in range(0, groups, SCALES_PER_STEP):
            part = scales[start : start + SCALES_PER_STEP, column].double()
            step = part.abs().max() / (127 if sign else 255)
            # Half of a step; and the step itself keeps 16 bits, of which the largest multiple loses the most.
            allowed = step * (0.5 + 255 * 2.0**-15)
            assert (found[start : start + SCALES_PER_STEP, column].double() - part).abs().max() <= allowed


def test_zeros_stay_zero_and_each_group_and_column_has_its_own_step() -> None:
    scales = torch.zeros(600, 2)
    assert not rounded(scales, (True, False)).any()
    scales[256:512, 1] = 1e-3
    scales[512:, 1] = 7.0
    scales[:256, 0] = -2.0
    found = rounded(scales, (True, False))
    torch.testing.assert_close(found, scales, rtol=2.0**-15, atol=0)
    assert (found[:256, 0] < 0).all()


@given(exponent=st.integers(-149, 127), sign=st.booleans())
def test_scales_of_any_magnitude_stay_finite_and_keep_their_sign(exponent: int, sign: bool) -> None:
    scale = math.ldexp(-1.0 if sign else 1.0, exponent)
    found = float(rounded(torch.tensor([[scale]]), (True,)))
    assert math.isfinite(found)
    assert found * scale >= 0
    if exponent >= -100:
        assert found == pytest.approx(scale, rel=2.0**-15)


@pytest.mark.parametrize("kind", ["nf", "nf-symmetric", "uniform", "uniform-sigma"])
def test_a_decomposition_measures_the_values_that_are_stored(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "TILE_VALUES", 2**14)  # a tile is 256 blocks of 64 then, and the weight is several
    weight = 0.02 * torch.randn(600, 128, generator=torch.Generator().manual_seed(0))
    quantizer = make_quantizer(kind, 2, 64, torch.bfloat16, double=True)
    for steps in (0, 2):
        result = decompose(weight, quantizer, 8, steps)
        stored = unpack(pack(result.quantized, quantizer), quantizer, (600, 128))
        assert torch.equal(stored.codes, result.quantized.codes)
        assert same_bits(stored.scales, result.quantized.scales)
        left = weight.double() - quantizer.decode_stored(stored).double()
        if steps:
            left = left - result.lora_B.double() @ result.lora_A.double()
        assert result.errors[-1] == pytest.approx(float(left.norm() / weight.double().norm()), rel=1e-4)
    plain = decompose(weight, make_quantizer(kind, 2, 64, torch.bfloat16), 8, 2)
    assert result.errors[-1] == pytest.approx(plain.errors[-1], rel=0.03), "a byte a scale costs next to nothing"


def test_tiles_are_whole_groups_of_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = 0.02 * torch.randn(1100, 96, generator=torch.Generator().manual_seed(1))
    quantizer = make_quantizer("nf", 3, 64, torch.float32, double=True)
    found = []
    for values in (2**12, 2**30):
        monkeypatch.setattr(alternation, "TILE_VALUES", values)
        found.append(decompose(weight, quantizer, 4, 1))
    assert torch.equal(found[0].quantized.codes, found[1].quantized.codes)
    assert same_bits(found[0].quantized.scales, found[1].quantized.scales)
    assert torch.equal(found[0].quantized.codes, quantizer.encode(weight).codes)
