"""The packed layer computes what a dense layer with its values does, forward and backward, and keeps no dense weight."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loftq_exp.errors import UserError
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.loftq.quantizers import Quantizer, make_quantizer

ROWS, COLUMNS = 48, 128
QUANTIZERS = [
    make_quantizer("nf", 2, 64, torch.bfloat16),
    make_quantizer("nf", 3, 64, torch.bfloat16, True),
    make_quantizer("nf", 4, 32, torch.float32),
    make_quantizer("nf-symmetric", 2, 64, torch.float16),
    make_quantizer("uniform", 2, 64, torch.bfloat16, True),
    make_quantizer("uniform", 5, 64, torch.bfloat16),
    make_quantizer("uniform-clipped", 8, 64, torch.bfloat16),
    make_quantizer("uniform-sigma", 4, 64, torch.float32, True),
    make_quantizer("int", 8, 64, torch.bfloat16),
]
NF3 = QUANTIZERS[1]


def named(quantizer: Quantizer) -> str:
    return f"{quantizer.type}-{quantizer.bits}"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_pair(
    quantizer: Quantizer = NF3, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer, and the dense one with its values; both biases are trained."""
    quantized = quantizer.encode(0.1 * drawn(ROWS, COLUMNS))
    packed = PackedLinear.from_quantized(quantized, quantizer, drawn(ROWS, seed=1) if bias else None, dtype)
    dense = nn.Linear(COLUMNS, ROWS, bias, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(quantizer.decode_stored(quantized))
        if bias:
            dense.bias.copy_(packed.bias)
    dense.weight.requires_grad_(False)
    return packed, dense


def gradients(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x and bias."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(upstream.to(out.dtype))
    assert x.grad is not None
    found = [out.detach(), x.grad]
    if layer.bias is not None:
        found.append(layer.bias.grad)
        layer.bias.grad = None
    return found


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float64, 1e-14)])
def test_both_directions_are_those_of_the_dense_layer(dtype: torch.dtype, exact: float) -> None:
    x, upstream = drawn(2, 5, COLUMNS, seed=2).to(dtype), drawn(2, 5, ROWS, seed=3)
    for quantizer in QUANTIZERS:
        packed, dense = a_pair(quantizer, dtype)
        for found, expected in zip(gradients(packed, x, upstream), gradients(dense, x, upstream), strict=True):
            assert found.dtype == dtype, named(quantizer)
            assert float((found - expected).norm() / expected.norm()) < exact, named(quantizer)


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (0, COLUMNS), (2, 3, 4, COLUMNS)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_input_of_any_shape(shape: tuple[int, ...], bias: bool) -> None:
    packed, dense = a_pair(bias=bias)
    x, upstream = drawn(*shape), drawn(*shape[:-1], ROWS)
    for found, expected in zip(gradients(packed, x, upstream), gradients(dense, x, upstream), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_finite_differences() -> None:
    packed, _ = a_pair(make_quantizer("nf", 2, 64), torch.float64)
    x = drawn(3, COLUMNS).double().requires_grad_()
    bias = packed.bias

    def computed(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(packed, {"bias": value}, (x,))

    assert torch.autograd.gradcheck(computed, (x, bias), fast_mode=True)


def test_only_what_needs_a_gradient_gets_one() -> None:
    packed, _ = a_pair()
    out = packed(drawn(3, COLUMNS))
    out.sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((ROWS,), 3.0))
    packed.bias.requires_grad_(False)
    assert not packed(drawn(3, COLUMNS)).requires_grad


@pytest.fixture
def saved() -> Iterator[list[torch.Tensor]]:
    """All tensors that are kept for the backward pass."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_dense_is_kept_for_the_backward_pass(saved: list[torch.Tensor], dtype: torch.dtype) -> None:
    packed, dense = a_pair(dtype=dtype)
    x = drawn(3, COLUMNS).to(dtype).requires_grad_()
    nn.functional.gelu(packed(x)).sum().backward()
    assert saved, "the hooks see what is kept"
    assert all(tensor.numel() <= 3 * ROWS for tensor in saved)
    saved.clear()
    dense(x)
    assert any(tensor.numel() == ROWS * COLUMNS for tensor in saved), "they would see a weight"


class Largest(TorchDispatchMode):
    """Counts the tensors of a weight's size in floating point that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, torch.Tensor) and out.is_floating_point() and "empty" in str(func)
        self.dense += made and out.numel() >= ROWS * COLUMNS
        return out


def test_each_direction_makes_one_dense_weight_and_drops_it() -> None:
    packed, _ = a_pair(make_quantizer("nf", 4, 64, torch.bfloat16))
    x = drawn(3, COLUMNS).requires_grad_()
    with Largest() as made:
        out = packed(x)
        assert made.dense == 1
        out.sum().backward()
        assert made.dense == 2
        with torch.no_grad():
            packed(x)
        assert made.dense == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    packed, dense = a_pair()
    upstream = drawn(4, ROWS, seed=3)
    found = []
    for layer in (packed, dense):
        x = drawn(4, COLUMNS).requires_grad_()
        out = checkpoint(lambda x, layer=layer: layer(x).tanh(), x, use_reentrant=reentrant)
        out.backward(upstream)
        found.append((out.detach(), x.grad, layer.bias.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast() -> None:
    packed, dense = a_pair()
    found = []
    for layer in (packed, dense):
        x = drawn(4, COLUMNS).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().pow(2).sum().backward()
        found.append((out.detach(), x.grad, layer.bias.grad))
    assert found[0][0].dtype == torch.bfloat16
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).norm() / other.norm()) < 0.01
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert packed(x).dtype == torch.float32


def test_a_change_of_type_leaves_the_weight_as_it_is() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.float32)
    for quantizer in QUANTIZERS:
        packed, _ = a_pair(quantizer)
        before = {name: part.clone() for name, part in packed.parts.items()}
        model = nn.Sequential(packed)
        for first, second in itertools.permutations(dtypes, 2):
            for dtype in (first, second):
                model.to(dtype)
                packed.check("layer")
                assert all(torch.equal(packed.parts[name], part) for name, part in before.items()), named(quantizer)
                assert packed.bias.dtype == packed.compute_dtype == dtype
                assert packed(drawn(2, COLUMNS).to(dtype)).dtype == dtype
        model.half()
        assert packed.bias.dtype == packed.compute_dtype == torch.float16


def test_there_is_no_dense_weight_to_read() -> None:
    packed, dense = a_pair()
    assert isinstance(packed, nn.Linear)
    assert packed.weight is None
    assert torch.equal(packed.dequantize(torch.float32), dense.weight)
    assert torch.equal(packed.quantized().codes, NF3.encode(0.1 * drawn(ROWS, COLUMNS)).codes)
    assert {name for name, _ in packed.named_parameters()} == {"bias"}
    assert "in_features=128, out_features=48, bias=True, type=nf, bits=3, block_size=64, double=True" in repr(packed)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_copies_and_states_are_the_same_layer(quantizer: Quantizer) -> None:
    packed, _ = a_pair(quantizer)
    x = drawn(2, COLUMNS)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), packed(x))
    state = packed.state_dict()
    assert set(state) == {"qweight", "scales", "bias"} | ({"scale_steps"} if quantizer.double else set())
    empty = PackedLinear(COLUMNS, ROWS, quantizer, True)
    empty.load_state_dict(state)
    assert torch.equal(empty(x), packed(x))
    on_meta = PackedLinear(COLUMNS, ROWS, quantizer, True, device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta(x), packed(x))
    later = PackedLinear(COLUMNS, ROWS, quantizer, True, device="meta").to_empty(device="cpu")
    later.load_state_dict(state)
    assert torch.equal(later(x), packed(x))
    packed.qweight.zero_()
    assert not torch.equal(twin(x), packed(x))


def test_a_weight_that_is_not_whole_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"block size 64: does not divide the 96 values of a weight of 2 x 48"):
        PackedLinear(48, 2, NF3)
