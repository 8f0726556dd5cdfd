"""The decomposition on CUDA: as good as on the CPU, with bitsandbytes' codes, without a synchronisation per tile."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from weights import weight_like

from loftq_exp.loftq import decompose, loftq_init, make_quantizer
from loftq_exp.loftq.memory import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

QUANTIZERS = [
    *(("nf", bits, {}) for bits in (2, 3, 4)),
    *(("nf", bits, {"levels": "optimal", "scale": "search"}) for bits in (2, 3, 4)),
    ("nf-symmetric", 2, {}),
    *((kind, bits, {}) for kind in ("uniform", "uniform-clipped", "uniform-sigma") for bits in (2, 4, 8)),
    ("uniform", 2, {"scale": "search"}),
    ("int", 8, {}),
]
SHAPES = [(256, 320), (320, 256), (65, 99), (1, 64)]


def correlated(columns: int) -> torch.Tensor:
    """A second moment of inputs with a few strong directions."""
    inputs = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(1))
    inputs[:, ::5] *= 5
    return inputs.T @ inputs / len(inputs)


def error(weight: torch.Tensor, result: tuple[torch.Tensor, ...], hessian: torch.Tensor | None = None) -> float:
    """The relative error of Q + B A in float64 on the CPU, of the weight or of the layer's outputs."""
    backbone, lora_A, lora_B = (part.cpu().double() for part in result[:3])
    left, whole = weight.double() - backbone - lora_B @ lora_A, weight.double()
    norm = torch.eye(weight.shape[1], dtype=torch.float64) if hessian is None else hessian.double()
    return float(((left @ norm * left).sum() / (whole @ norm * whole).sum()).sqrt())


@pytest.mark.parametrize(("kind", "bits", "settings"), QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_cpu(kind: str, bits: int, settings: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = weight_like(*shape).to(dtype)
        for steps in (0, 1, 5):
            rank = min(16, *shape)
            on_cpu, on_cuda = (
                loftq_init(weight.to(device), bits, rank, steps, quant_type=kind, **settings)
                for device in ("cpu", "cuda")
            )
            assert all(part.device.type == "cuda" for part in on_cuda)
            assert on_cuda[0].dtype == dtype
            if steps == 0:
                on_cpu, on_cuda = ((Q, 0 * A, B) for Q, A, B in (on_cpu, on_cuda))
            # Five steps amplify a last bit: on a weight this small they scatter by more than 1 % on one device too.
            bound = 0.02 if steps == 5 and min(shape) < 256 else 0.01
            assert error(weight, on_cuda) == pytest.approx(error(weight, on_cpu), rel=bound, abs=1e-6), (shape, steps)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("form", ["full", "diagonal"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibrated_errors_are_those_of_the_cpu(rounding: str, form: str, bits: int) -> None:
    weight, hessian = weight_like(192, 256), correlated(256)
    given = hessian if form == "full" else hessian.diagonal().contiguous()
    errors = {
        device: error(
            weight,
            loftq_init(
                weight.to(device), bits, 16, 5, levels="optimal", scale="search", hessian=given, rounding=rounding
            ),
            hessian if form == "full" else hessian.diagonal().diag(),
        )
        for device in ("cpu", "cuda")
    }
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.01)


@pytest.mark.parametrize("shape", [(512, 1024), (4096, 4096), (3, 65)])
def test_nf4_has_bitsandbytes_codes(shape: tuple[int, int]) -> None:
    weight = weight_like(*shape).cuda()
    quantized = make_quantizer("nf", 4).encode(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: weight.numel()]
    assert torch.equal(quantized.scales.view(-1), state.absmax)
    # bitsandbytes' CUDA kernel divides by the absmax with an approximate reciprocal. A value whose exact quotient is within
    # rounding of a threshold may fall to its other side there; all other codes are equal.
    other = quantized.codes.view(-1) != codes
    thresholds = make_quantizer("nf", 4).thresholds().cuda().double()
    size = weight.numel()
    absmax = state.absmax.double().repeat_interleave(64)[:size]
    distance = (weight.view(-1).double() / absmax)[other][:, None].sub(thresholds).abs().amin(dim=1)
    assert int(other.sum()) <= size * 2e-6
    assert not other.any() or float(distance.max()) < 2e-7


def test_codes_and_scales_are_the_cpus() -> None:
    for kind, bits, settings in QUANTIZERS:
        quantizer, weight = make_quantizer(kind, bits, **settings), weight_like(256, 320)
        there, here = quantizer.encode(weight.cuda()), quantizer.encode(weight)
        # A sum of squares may be rounded otherwise, so a block may have the next scale of a search, and no more than that.
        # CUDA divides by a constant with its reciprocal, so a step may differ in its last bit.
        same = torch.isclose(there.scales.cpu(), here.scales, rtol=1e-6, atol=0).all(dim=1).float().mean()
        assert same > 0.99, (kind, bits)
        assert (there.codes.cpu() == here.codes).float().mean() > 0.99, (kind, bits)


def test_the_same_weight_has_the_same_bytes_twice() -> None:
    weight = weight_like(512, 768).cuda()
    one, two = (loftq_init(weight, 2, 32, 5) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


def test_synchronisations_do_not_grow_with_the_weight() -> None:
    counts = []
    for side in (512, 4096):
        weight, quantizer = weight_like(side, side).cuda(), make_quantizer("nf", 4)
        decompose(weight, quantizer, 64, 5, measure=False)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                decompose(weight, quantizer, 64, 5, measure=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in found))
    assert max(counts) < 150, counts
    assert counts[1] < counts[0] + 60, counts  # sweeps of the first step differ, tiles do not


def test_two_weights_at_a_time_in_threads() -> None:
    weights = [weight_like(1024, 2048, seed).cuda() for seed in range(4)]
    alone = [decompose(weight, make_quantizer("nf", 2), 32, 3) for weight in weights]
    found: dict[int, Any] = {}

    def work(first: int) -> None:
        workspace = Workspace()
        for number in (first, first + 1):
            result = decompose(weights[number], make_quantizer("nf", 2), 32, 3, workspace=workspace).copied()
            found[number] = result.to(torch.device("cpu"))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(alone):
        assert torch.equal(found[number].quantized.codes, result.quantized.codes.cpu())
        assert found[number].errors == result.errors
