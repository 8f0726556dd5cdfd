"""LoftQ on one weight: alternate between quantizing what the factors leave and fitting what the quantizer leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch

from loftq_exp.errors import UserError
from loftq_exp.loftq.lowrank import check_svd_settings, truncated_svd
from loftq_exp.loftq.quantizers import Quantized, Quantizer, make_quantizer


@dataclass(frozen=True)
class Decomposition:
    """A weight W (out, in) as a quantized backbone Q and low-rank factors: W is about Q + B A."""

    quantized: Quantized
    """Codes and scales of Q, for the quantizer that made them."""
    lora_A: torch.Tensor
    """(rank, in) float32; zeros without steps."""
    lora_B: torch.Tensor
    """(out, rank) float32; zeros without steps."""
    errors: tuple[float, ...]
    """Relative Frobenius errors: ||W - quantize(W)|| / ||W||, then ||W - Q_t - B_t A_t|| / ||W|| after each step t."""
    norm: float
    """Frobenius norm of W."""

    @property
    def steps(self) -> int:
        """Alternating steps taken."""
        return len(self.errors) - 1


@torch.no_grad()
def decompose(
    weight: torch.Tensor,
    quantizer: Quantizer,
    rank: int,
    num_iter: int,
    solver: str = "randomized",
    start: Decomposition | None = None,
) -> Decomposition:
    """Minimise ||W - Q - B A||_F over quantized Q and rank-r B A by alternating steps (the paper's algorithm 1).

        A_0 = B_0 = 0
        Q_t = quantize(W - B_{t-1} A_{t-1});    U S V' = svd_r(W - Q_t);    B_t = U sqrt(S),  A_t = sqrt(S) V'

    Q_t is taken as it will be stored, rounded to the quantizer's `scale_dtype`, so the factors are fitted to the very
    values that a reader of the checkpoint gets. A step lowers the error as a rule, not always: nearest levels under
    an absmax scale do not minimise the norm, and at 2 bits the error may rise again after a few steps.

    Args:
        weight: W, (out, in), finite, any floating type and device. Not changed.
        quantizer: from `make_quantizer`.
        rank: r, from 1 to min(out, in).
        num_iter: steps T. 0 is QLoRA's backbone with zero factors.
        solver: `randomized` or `exact`, see `truncated_svd`.
        start: a decomposition of the same weight with the same settings and at most T steps, on any device. It is
            continued, and the result has the same bytes as one from scratch.

    Returns:
        The decomposition after T steps, its tensors on the weight's device. An all-zero weight has errors 0.

    Raises:
        UserError: for a weight that is not a finite floating-point matrix, or a setting that does not exist or fit.
        ValueError: for a `start` of another shape or rank, or of more steps.
    """
    target = _checked(weight, num_iter)
    check_svd_settings(target.shape, rank, solver)
    if start is None:
        start = _quantize_only(target, quantizer, rank)
    elif start.quantized.codes.shape != target.shape or len(start.lora_A) != rank or start.steps > num_iter:
        raise ValueError("start is a decomposition of another shape or rank, or one of more steps than num_iter")
    # Copies, because a tensor that maps a file may lie at an address for which matrix products round differently.
    quantized = Quantized(*(tensor.to(target.device, copy=True) for tensor in start.quantized))
    lora_B, lora_A = (factor.to(target.device, torch.float32, copy=True) for factor in (start.lora_B, start.lora_A))
    errors = list(start.errors)
    for step in range(start.steps, num_iter):
        if step > 0:
            quantized = quantizer.encode(target - lora_B @ lora_A)
        residual = target - quantizer.decode_stored(quantized)
        factors = (lora_B, lora_A) if step > 0 else None
        lora_B, lora_A = truncated_svd(residual, rank, solver, start=factors)
        errors.append(_relative(residual.sub_(lora_B @ lora_A), start.norm))
    return Decomposition(quantized, lora_A, lora_B, tuple(errors), start.norm)


def _quantize_only(target: torch.Tensor, quantizer: Quantizer, rank: int) -> Decomposition:
    """The decomposition without steps: Q = quantize(W), A = B = 0."""
    norm = _frobenius(target)
    quantized = quantizer.encode(target)
    error = _relative(target - quantizer.decode_stored(quantized), norm)
    rows, columns = target.shape
    return Decomposition(quantized, target.new_zeros(rank, columns), target.new_zeros(rows, rank), (error,), norm)


@overload
def loftq_init(
    weight: torch.Tensor,
    num_bits: int,
    reduced_rank: int,
    num_iter: int = ...,
    *,
    quant_type: str = ...,
    block_size: int = ...,
    alpha: float | None = ...,
    solver: str = ...,
    seed: int = ...,
    return_errors: Literal[False] = ...,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@overload
def loftq_init(
    weight: torch.Tensor,
    num_bits: int,
    reduced_rank: int,
    num_iter: int = ...,
    *,
    quant_type: str = ...,
    block_size: int = ...,
    alpha: float | None = ...,
    solver: str = ...,
    seed: int = ...,
    return_errors: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, ...]]: ...


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor,
    num_bits: int,
    reduced_rank: int,
    num_iter: int = 1,
    *,
    quant_type: str = "nf",
    block_size: int = 64,
    alpha: float | None = None,
    solver: str = "randomized",
    seed: int = 0,
    return_errors: bool = False,
) -> (
    tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, ...]]
):
    """The backbone and LoRA factors to start fine-tuning from; PEFT's function of this name, on any device.

    Q + s B A is close to W, where s = alpha / reduced_rank is the factor a LoRA layer puts before B A. It is absorbed,
    half into each factor, so that any alpha starts at the same function. (PEFT ignores s.)

    Args:
        weight: W, (out, in), finite, any floating type and device.
        num_bits: bits a weight. 8 with quant_type `nf` is int8 a row, as in PEFT.
        reduced_rank: rank r of the factors, from 1 to min(out, in).
        num_iter: alternating steps. 0 is QLoRA: B is zero and A drawn as LoRA draws it, Kaiming uniform from `seed`.
        quant_type: see `make_quantizer`.
        block_size: consecutive values (row-major) that share scales; the last block is short where it does not divide.
        alpha: LoRA's alpha; none: the rank, that is s = 1.
        solver: `randomized` or `exact`, see `truncated_svd`.
        seed: seed of A where num_iter is 0; without effect otherwise.
        return_errors: whether the errors follow as a fourth result, as `Decomposition.errors` has them.

    Returns:
        (dequantized_weight, lora_A, lora_B): Q (out, in) in the weight's type and on its device, A (r, in) and
        B (out, r) in float32. For bfloat16 and float16 weights, scales are rounded to that type and the factors fitted
        to the rounded Q that is returned.

    Raises:
        UserError: for a weight that is not a finite floating-point matrix, or a setting that does not exist or fit.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha={alpha}: not a scale; choose a positive number, or none for the rank")
    quantizer_type = "int" if (quant_type, num_bits) == ("nf", 8) else quant_type
    scale_dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    quantizer = make_quantizer(quantizer_type, num_bits, block_size, scale_dtype)
    result = decompose(weight, quantizer, reduced_rank, num_iter, solver)
    if num_iter == 0:
        lora_A, lora_B = kaiming_uniform_A(result.lora_A.shape, seed).to(weight.device), result.lora_B
    else:
        root = math.sqrt(1.0 if alpha is None else alpha / reduced_rank)
        lora_A, lora_B = result.lora_A / root, result.lora_B / root
    backbone = quantizer.decode(result.quantized).to(weight.dtype)
    return (backbone, lora_A, lora_B, result.errors) if return_errors else (backbone, lora_A, lora_B)


def kaiming_uniform_A(shape: torch.Size | tuple[int, int], seed: int) -> torch.Tensor:
    """LoRA's random A (rank, in), float32 on the CPU: Kaiming uniform with a = sqrt(5), within +- 1 / sqrt(in)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _checked(weight: torch.Tensor, num_iter: int) -> torch.Tensor:
    """The weight as contiguous float32, or UserError."""
    name = f"weight of shape {tuple(weight.shape)}"
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise UserError(f"{name} and {weight.dtype}: not a floating-point matrix; pass one of shape (out, in)")
    if num_iter < 0:
        raise UserError(f"num_iter={num_iter}: not a number of steps; choose 0 (QLoRA) or more")
    target = weight.detach().to(torch.float32).contiguous()
    finite = int(torch.isfinite(target).sum())
    if finite < target.numel():
        lost = target.numel() - finite
        raise UserError(
            f"{name}: {lost} of {target.numel()} values are NaN or infinite in float32; get the weight again"
        )
    return target


def _frobenius(matrix: torch.Tensor) -> float:
    """The Frobenius norm: rows in float32 relative to the largest value, which keeps squares in range, then float64."""
    peak = matrix.abs().amax()
    if peak == 0:
        return 0.0
    rows = torch.linalg.vector_norm(matrix / peak, dim=1).cpu().to(torch.float64)
    return float(torch.linalg.vector_norm(rows)) * float(peak)


def _relative(residual: torch.Tensor, norm: float) -> float:
    return _frobenius(residual) / norm if norm else 0.0
