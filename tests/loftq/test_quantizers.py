"""Quantizers compared with facts.md, bitsandbytes, and small versions written by hand."""

import itertools

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.utils import CODE
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.config.quant import BITS_OF_TYPE
from loftq_exp.errors import UserError
from loftq_exp.loftq.quantizers import make_quantizer, normal_float_levels

QUANTIZERS = [(type, bits) for type, widths in BITS_OF_TYPE.items() if type != "none" for bits in widths]
SHAPES = [(64, 64), (3, 64), (5, 13), (7, 99), (1, 1), (1, 63), (2, 65), (33, 2)]
FAST = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def bitsandbytes_without_compiler():
    """bitsandbytes recompiles its kernel for each odd shape, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def bnb_nf4(weight):
    """bitsandbytes' NF4 codes (unpacked), absmax and values."""
    # Flat, because with AVX-512 it dequantizes rows that are not whole blocks with other blocks' scales.
    packed, state = bnb.quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    # dequantize_4bit turns a result round whose packed codes are a single byte.
    return codes.reshape(weight.shape), state.absmax, bnb.dequantize_4bit(packed, state).reshape(weight.shape)


def assert_same_bits(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.uint8: torch.uint8}[left.dtype]
    assert torch.equal(left.contiguous().view(integers), right.contiguous().view(integers))


def assert_equals_bnb(weight):
    codes, absmax, values = bnb_nf4(weight.float())
    quantizer = make_quantizer("nf", 4)
    quantized = quantizer.encode(weight)
    assert_same_bits(quantized.codes, codes)
    assert_same_bits(quantized.scales.flatten(), absmax)
    assert_same_bits(quantizer.decode(quantized), values)


@st.composite
def weights(draw):
    """Matrices of any small shape, with scales from tiny to huge, zero blocks and outliers."""
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 150)))
    weight = normal(*shape, seed=draw(st.integers(0, 2**31)), scale=10.0 ** draw(st.integers(-30, 30)))
    flat = weight.view(-1)
    flat[: draw(st.integers(0, 130))] = 0
    flat[draw(st.integers(0, flat.numel() - 1))] *= draw(st.sampled_from([1.0, -1e4, 0.0]))
    return weight


class TestLevels:
    def test_published_values(self):
        expected = {
            ("nf", 2): [-1, 0, 0.337915, 1],
            ("nf", 3): [-1, -0.478629, -0.217142, 0, 0.160930, 0.337915, 0.562617, 1],
            ("nf-symmetric", 2): [-1, -0.252568, 0.252568, 1],
        }
        for (type, bits), levels in expected.items():
            torch.testing.assert_close(normal_float_levels(type, bits), torch.tensor(levels), atol=6e-7, rtol=0)

    def test_nf4_is_bitsandbytes_table(self):
        assert_same_bits(normal_float_levels("nf", 4), CODE["nf4"])

    def test_every_nf2_level_is_an_nf4_level(self):
        assert set(normal_float_levels("nf", 2).tolist()) <= set(normal_float_levels("nf", 4).tolist())


class TestNormalFloat:
    def test_equals_bitsandbytes(self):
        for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
            assert_equals_bnb(normal(*shape).to(dtype))

    @FAST
    @given(weights())
    def test_equals_bitsandbytes_on_any_matrix(self, weight):
        assert_equals_bnb(weight)

    @pytest.mark.parametrize("columns", [64, 65, 47])
    def test_ties_and_their_neighbours_equal_bitsandbytes(self, columns):
        thresholds = (CODE["nf4"][:-1] + CODE["nf4"][1:]) / 2
        around = [thresholds.nextafter(torch.tensor(-2.0)), thresholds, thresholds.nextafter(torch.tensor(2.0))]
        row = torch.cat([*around, torch.ones(columns - 45)])
        scales = torch.tensor([1.0, 0.5, 3.0, 0.1, 1 / 3, 7e-4]).view(-1, 1)
        assert_equals_bnb(row * scales)

    def test_tie_takes_the_lower_level(self):
        levels = normal_float_levels("nf", 2)
        halfway = ((levels[2] + levels[3]) / 2).item()
        assert make_quantizer("nf", 2).encode(torch.tensor([[1.0, halfway]])).codes.tolist() == [[3, 2]]

    @pytest.mark.parametrize(("type", "bits"), [("nf", 2), ("nf", 3), ("nf-symmetric", 2)])
    def test_is_the_nearest_level(self, type, bits):
        weight = normal(10, 70)
        quantizer = make_quantizer(type, bits, block_size=32)
        levels = normal_float_levels(type, bits)
        blocks = torch.split(weight.flatten(), 32)
        nearest = [levels[((block / block.abs().max())[:, None] - levels).abs().argmin(1)] for block in blocks]
        expected = torch.cat([level * block.abs().max() for level, block in zip(nearest, blocks, strict=True)])
        torch.testing.assert_close(quantizer.quantize(weight).flatten(), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("bits", [2, 4])
    @FAST
    @given(weights())
    def test_stored_values_reload_exactly_through_bitsandbytes(self, dtype, bits, weight):
        quantizer = make_quantizer("nf", bits, scale_dtype=dtype)
        stored = quantizer.decode(quantizer.encode(weight)).to(dtype)
        reloaded = bnb_nf4(stored)[2]
        # Compared as numbers: a product that underflows to -0 comes back as 0.
        assert reloaded.dtype == dtype
        assert torch.equal(reloaded, stored)
        assert torch.equal(quantizer.quantize(weight), stored.float())


class TestUniform:
    def test_equation_1_by_hand(self):
        quantizer = make_quantizer("uniform", 2, block_size=4)
        quantized = quantizer.encode(torch.tensor([[-1.0, 0.0, 0.4, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 3.0, 1.6, 2.4]]))
        assert quantized.codes.tolist() == [[0, 1, 1, 3], [0, 0, 0, 0], [0, 3, 2, 2]]
        assert quantized.scales.tolist() == [[-1, 1], [5, 0], [0, 1]]
        assert quantizer.decode(quantized).tolist() == [[-1, 0, 0, 2], [5, 5, 5, 5], [0, 3, 2, 2]]

    @pytest.mark.parametrize("bits", BITS_OF_TYPE["uniform"])
    def test_reaches_the_extremes_and_errs_by_half_a_step(self, bits):
        weight = normal(20, 67)
        for block, values in zip(
            torch.split(weight.flatten(), 64),
            torch.split(make_quantizer("uniform", bits).quantize(weight).flatten(), 64),
            strict=True,
        ):
            step = (block.max() - block.min()) / (2**bits - 1)
            assert (block - values).abs().max() <= step * 0.5001
            torch.testing.assert_close(torch.stack(values.aminmax()), torch.stack(block.aminmax()))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_clipped_is_the_official_glue_code(self, bits):
        weight = normal(30, 50, scale=0.1) + 0.03
        mean, deviation = weight.double().mean(), weight.double().std()
        clipped = weight.double().clamp(mean - 2 * deviation, mean + 2 * deviation)
        low, span, top = clipped.min(), clipped.max() - clipped.min() + 1e-8, 2**bits - 1
        expected = torch.round((clipped - low) / span * top) / top * span + low
        quantizer = make_quantizer("uniform-clipped", bits)
        assert quantizer.encode(weight).scales.shape == (1, 2)
        torch.testing.assert_close(quantizer.quantize(weight), expected.float(), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("bits", [2, 4])
    @pytest.mark.parametrize("shift", [0.0, -20.0])
    def test_sigma_is_the_early_official_code(self, bits, shift):
        weight = normal(8, 64) + shift
        assert (make_quantizer("uniform-sigma", bits).encode(weight).scales < 0).all() == (shift < 0)
        scales = weight.double().mean(1, keepdim=True) + 2.5 * weight.double().std(1, keepdim=True)
        levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
        expected = levels[((weight / scales).unsqueeze(-1) - levels).abs().argmin(-1)] * scales
        torch.testing.assert_close(make_quantizer("uniform-sigma", bits).quantize(weight), expected.float())


class TestRowInt:
    @pytest.mark.parametrize("shape", [(8, 64), (5, 13), (1, 1)])
    def test_equals_bitsandbytes(self, shape):
        weight = normal(*shape)
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
        quantizer = make_quantizer("int", 8)
        quantized = quantizer.encode(weight)
        assert torch.equal(quantized.codes.int() - 128, codes.int())
        assert torch.equal(quantized.scales.flatten(), absmax)
        assert_same_bits(quantizer.decode(quantized), bnb.int8_vectorwise_dequant(codes, absmax))

    def test_row_of_zeros(self):
        assert not make_quantizer("int", 8).quantize(torch.zeros(2, 5)).any()


@settings(max_examples=10, deadline=None)
@given(weights(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([16, 64, 7]))
def test_contract_of_every_quantizer(weight, dtype, block_size):
    for type, bits in QUANTIZERS:
        check_contract(type, bits, weight, dtype, block_size)


def check_contract(type, bits, weight, dtype, block_size):
    quantizer = make_quantizer(type, bits, block_size, dtype)
    codes, scales = quantizer.encode(weight)
    groups = {"uniform-clipped": 1, "int": weight.shape[0]}.get(type, -(-weight.numel() // block_size))
    assert (codes.dtype, codes.shape) == (torch.uint8, weight.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (groups, 2 if type in ("uniform", "uniform-clipped") else 1))
    assert int(codes.max()) < 2**bits
    assert torch.equal(scales, scales.to(dtype).float())
    values = quantizer.quantize(weight)
    assert (values.dtype, values.shape) == (torch.float32, weight.shape)
    assert values.isfinite().all()
    assert torch.equal(values, values.to(dtype).float())
    if type != "uniform-sigma":  # whose scale may cancel to almost nothing
        assert (values - weight).abs().max() <= weight.abs().max() * 1.01 + 1e-38


def test_zeros_stay_zero():
    largest = {kind: make_quantizer(*kind).quantize(torch.zeros(3, 50)).abs().max().item() for kind in QUANTIZERS}
    assert {kind: value for kind, value in largest.items() if value > 1e-38} == {}


def test_layout_and_type_do_not_matter():
    weight = normal(40, 30).bfloat16()
    for kind in QUANTIZERS:
        quantizer = make_quantizer(*kind)
        expected = quantizer.quantize(weight.float())
        for same in (weight.T.contiguous().T, weight.double(), torch.nn.Parameter(weight)):
            assert torch.equal(quantizer.quantize(same), expected), (kind, same.dtype, same.stride())


def test_scale_beyond_the_storage_type_saturates():
    assert make_quantizer("nf", 4, scale_dtype=torch.float16).quantize(torch.full((1, 64), 1e6)).max() == 65504


def test_identity_names_all_that_shapes_the_result():
    identity = make_quantizer("nf", 4, 64, torch.bfloat16).identity
    assert identity == {"type": "nf", "bits": 4, "block_size": 64, "scale_dtype": "bfloat16", "version": 1}
    others = [("nf", 2, 64, torch.bfloat16), ("nf", 4, 32, torch.bfloat16), ("nf", 4, 64, torch.float32)]
    assert all(make_quantizer(*other).identity != identity for other in others)
    assert make_quantizer("int", 8, 64).identity == make_quantizer("int", 8, 32).identity


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nf5", 4), "nf5"),
        (("none", 16), "none"),
        (("nf", 5), "bits=5"),
        (("nf-symmetric", 4), "bits=4"),
        (("uniform", 1), "bits=1"),
        (("int", 4), "bits=4"),
        (("nf", 4, 0), "block_size=0"),
        (("nf", 4, -64), "block_size=-64"),
        (("nf", 4, 64, torch.int8), "torch.int8"),
    ],
)
def test_refuses_what_does_not_exist(arguments, named):
    with pytest.raises(UserError, match=named) as refused:
        make_quantizer(*arguments)
    assert "\n" not in str(refused.value)
