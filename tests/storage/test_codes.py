"""Packed codes compared with numpy's bit operations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.storage.codes import pack_codes, packed_bytes, unpack_codes

WIDTHS = range(1, 9)


def drawn(values: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(values)
    return torch.randint(2**bits, (values,), generator=generator, dtype=torch.uint8)


@given(bits=st.sampled_from(WIDTHS), codes=st.lists(st.integers(0, 255), max_size=70))
def test_what_was_packed_comes_back_and_takes_its_own_bits(bits: int, codes: list[int]) -> None:
    given_codes = torch.tensor([code % 2**bits for code in codes], dtype=torch.uint8)
    packed = pack_codes(given_codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_bytes(len(codes), bits),)
    assert len(packed) * 8 - len(codes) * bits < 8 * bits, "less than one group of eight codes is spare"
    assert torch.equal(unpack_codes(packed, bits, len(codes)), given_codes)


def test_the_bytes_are_a_little_endian_stream_of_bits() -> None:
    for bits, values in itertools.product(WIDTHS, (1, 7, 8, 9, 640)):
        codes = drawn(values, bits)
        stream = np.unpackbits(codes.numpy()[:, None], axis=1, count=bits, bitorder="little").reshape(-1)
        expected = np.packbits(stream, bitorder="little")
        packed = pack_codes(codes, bits).numpy()
        assert np.array_equal(packed[: len(expected)], expected), (bits, values)
        assert not packed[len(expected) :].any(), f"{values} codes of {bits} bits: what is left is zero"


def test_three_bits_take_three() -> None:
    assert packed_bytes(2**20, 3) == 3 * 2**20 // 8
    assert pack_codes(torch.arange(8, dtype=torch.uint8), 3).tolist() == [0b10001000, 0b11000110, 0b11111010]


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4)])
@pytest.mark.parametrize("bits", [3, 8])
def test_codes_of_any_shape_lie_row_by_row_and_are_left_alone(shape: tuple[int, ...], bits: int) -> None:
    codes = drawn(int(np.prod(shape)), bits).reshape(shape).transpose(0, 1)
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert torch.equal(packed, pack_codes(codes.contiguous().flatten(), bits))
    packed.zero_()
    assert torch.equal(codes, before)


def test_a_code_that_does_not_fit_is_refused() -> None:
    for bits in range(1, 8):
        with pytest.raises(UserError) as caught:
            pack_codes(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)
        assert str(caught.value) == f"codes: {2**bits} does not fit into {bits} bits; give codes below {2**bits}"
