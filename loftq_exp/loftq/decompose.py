"""LoftQ on one weight: alternate between quantizing W - B A and fitting B A to W - Q."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, overload

import torch

from loftq_exp.errors import UserError
from loftq_exp.loftq.alternation import Alternation, Decomposition, unit_of
from loftq_exp.loftq.calibrated import CalibratedAlternation
from loftq_exp.loftq.lowrank import check_svd_settings, truncated_svd
from loftq_exp.loftq.memory import Workspace
from loftq_exp.loftq.metric import Metric, check_metric, metric_of
from loftq_exp.loftq.pieces import in_thread_pool
from loftq_exp.loftq.quantizer import Quantizer
from loftq_exp.loftq.quantizers import make_quantizer

ROUNDINGS = ("nearest", "gptq")

SHARED_RANK = 64
"""Minimum rank at which the first step is solved, see `first_rank`."""


def first_rank(rank: int, shape: tuple[int, ...], solver: str) -> int:
    """Return the rank at which the first step is solved; its factors are truncated to `rank`.

    The first step's backbone does not depend on the rank, so one solution serves every smaller rank. A sweep over ranks
    therefore solves once.
    """
    return rank if solver == "exact" else max(rank, min(SHARED_RANK, *shape))


def decompose(
    weight: torch.Tensor,
    quantizer: Quantizer,
    rank: int,
    num_iter: int,
    solver: str = "randomized",
    start: Decomposition | None = None,
    measure: bool = True,
    workspace: Workspace | None = None,
    metric: Metric | None = None,
    rounding: str = "nearest",
    principal: bool = False,
) -> Decomposition:
    """Minimise ||W - Q - B A|| over quantized Q and rank-r B A by alternating steps (the paper's algorithm 1).

        A_0 = B_0 = 0
        Q_t = quantize(W - B_{t-1} A_{t-1});    U S V' = svd_r(W - Q_t);    B_t = U sqrt(S),  A_t = sqrt(S) V'

    Q_t is rounded to the quantizer's `scale_dtype`, so the factors are fitted to exactly the values stored in the
    checkpoint. The norm is Frobenius', or that of a `metric`: then see `CalibratedAlternation` for the two moves.

    A step usually lowers the error, but not always, because scales are stored rounded and one scale serves a block. The
    published form (NormalFloat under absmax scales, no metric) returns the last step, whose error at 2 bits may have risen
    again. All others return the step of least error.

    Args:
        weight: W, (out, in), finite, any floating type and device. Not changed.
        quantizer: from `make_quantizer`.
        rank: r, from 1 to min(out, in).
        num_iter: steps T. 0 is QLoRA's backbone with zero factors.
        solver: `randomized` or `exact`, see `truncated_svd`, `leading_factors` and `leading_left`.
        start: result for the same weight with the same settings and fewer steps, on any device, to continue from. The
            result has the same bytes as one from scratch.
        measure: whether to measure the error after each step, which takes about a fifth of the time. If not, it is NaN.
            The step of least error can only be returned if it is measured.
        workspace: memory to reuse across weights. The next decomposition in it overwrites the codes of this one.
        metric: the norm of the errors; None: Frobenius'.
        rounding: `nearest`, or `gptq` with a metric.
        principal: PiSSA's start instead (arXiv 2404.02948): B A = svd_r(W), then Q = quantize(W - B A). It takes one step and
            no metric.

    Returns:
        The decomposition after T steps, with tensors on the weight's device. An all-zero weight has errors of 0.

    Raises:
        UserError: if the weight is not a finite floating-point matrix, or a setting is unknown or out of range.
        ValueError: if `start` has another shape or rank, not fewer steps, or is not of its last step.
    """
    if num_iter < 0:
        raise UserError(f"num_iter={num_iter}: not a number of steps; choose 0 (QLoRA) or more")
    if rounding not in ROUNDINGS or (rounding == "gptq" and metric is None):
        raise UserError(f"rounding={rounding}: not available; choose nearest, or gptq with a hessian")
    if principal and (num_iter != 1 or metric is not None):
        raise UserError(f"num_iter={num_iter}: principal factors are fitted once, without a hessian; choose num_iter=1")
    _check_start(start, weight.shape, rank, num_iter)
    unit = start.unit if start else unit_of(weight)
    check_svd_settings(weight.shape, rank, solver)

    def work() -> Decomposition:
        with torch.no_grad():  # here, because gradient mode is set per thread
            if metric is not None:
                check_metric(metric, weight)
                calibrated = CalibratedAlternation(
                    weight, quantizer, metric, rounding, num_iter == 0, measure, unit, workspace
                )
                return _best(calibrated, rank, num_iter, solver, start)
            alternation = Alternation(weight, quantizer, measure, unit, workspace)
            if principal:
                alternation.start()
                alternation.quantize_around(*truncated_svd(weight.to(torch.float32), rank, solver))
                return alternation.result()
            if quantizer.published or not measure:
                return _last(alternation, rank, num_iter, solver, start)
            return _best(alternation, rank, num_iter, solver, start)

    return in_thread_pool(work, weight.device)


def _last(
    alternation: Alternation, rank: int, num_iter: int, solver: str, start: Decomposition | None
) -> Decomposition:
    """Return the result of the last step."""
    shape = torch.Size(alternation.shape)
    if start is not None and start.steps:
        alternation.resume(start)
    else:
        alternation.start()
        if num_iter:
            alternation.fit(first_rank(rank, shape, solver), solver)
            if alternation.rank > rank:
                alternation.resume(alternation.result().truncated(rank))
    for _ in range(alternation.steps, num_iter):
        alternation.quantize()
        alternation.fit(rank, solver)
    return alternation.result() if num_iter else alternation.result(rank)


def _best(
    alternation: Alternation, rank: int, num_iter: int, solver: str, start: Decomposition | None
) -> Decomposition:
    """Return the result of the step with the least error, the first of several."""
    best: Decomposition | None = None
    if start is not None and start.steps:
        alternation.resume(start)
        best = start
    else:
        alternation.start()
    for step in range(alternation.steps, num_iter):
        if step:
            alternation.quantize()
        alternation.fit(rank, solver)
        current = alternation.result()
        if best is None or current.error < best.error:
            best = current.copied() if step + 1 < num_iter else current
    last = alternation.result(rank)
    return dataclasses.replace(best or last, errors=last.errors, output_errors=last.output_errors).to(
        last.lora_A.device
    )


def _check_start(start: Decomposition | None, shape: torch.Size, rank: int, num_iter: int) -> None:
    if start is None:
        return
    if start.shape != shape or len(start.lora_A) != rank or start.steps >= num_iter or not start.continues:
        raise ValueError("start has another shape or rank, no fewer steps than num_iter, or is not of its last step")


@overload
def loftq_init(
    weight: torch.Tensor,
    num_bits: int,
    reduced_rank: int,
    num_iter: int = ...,
    *,
    quant_type: str = ...,
    block_size: int = ...,
    scale: str = ...,
    levels: str = ...,
    alpha: float | None = ...,
    solver: str = ...,
    seed: int = ...,
    hessian: torch.Tensor | None = ...,
    rounding: str = ...,
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
    scale: str = ...,
    levels: str = ...,
    alpha: float | None = ...,
    solver: str = ...,
    seed: int = ...,
    hessian: torch.Tensor | None = ...,
    rounding: str = ...,
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
    scale: str = "absmax",
    levels: str = "nf",
    alpha: float | None = None,
    solver: str = "randomized",
    seed: int = 0,
    hessian: torch.Tensor | None = None,
    rounding: str = "nearest",
    return_errors: bool = False,
) -> (
    tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, ...]]
):
    """Return the backbone and LoRA factors to start fine-tuning from, like PEFT's function of this name, on any device.

    The paper's objective is

        min over Q, A, B of ||W - Q - s B A||_F

    and its Algorithm 1 alternates for t = 1 ... num_iter, where q is the quantizer and B_0 A_0 = 0:

        Q_t = q(W - s B_{t-1} A_{t-1})
        s B_t A_t = the best approximation of rank r of W - Q_t, by its singular value decomposition

    The factor s = alpha / reduced_rank is LoRA's scaling of B A. Each factor absorbs sqrt(s), so any alpha starts at the
    same function. (PEFT ignores s.) The paper writes A B^T for what LoRA calls s B A.

    Args:
        weight: W, (out, in), finite, any floating type and device.
        num_bits: bits per value, 2 to 8; the allowed ones depend on quant_type. 8 with quant_type `nf` is row-wise int8, as in PEFT.
        reduced_rank: rank r of the factors, from 1 to min(out, in).
        num_iter: alternating steps. 0 is QLoRA: B is zero, and A is Kaiming uniform from `seed`, as in LoRA.
        quant_type: `nf`, `nf-symmetric`, `uniform`, `uniform-clipped`, `uniform-sigma` or `int`, see `make_quantizer`.
        block_size: consecutive values (row-major) that share scales. The last block may be shorter.
        scale: `absmax`, as published, or `search`: the scale of each block with the smallest squared error, see `make_quantizer`.
        levels: of quant_type `nf`: `nf`, as published, or `optimal`, see `make_quantizer`.
        alpha: LoRA's alpha; None: the rank, that is s = 1.
        solver: `randomized` or `exact` (a full SVD), see `truncated_svd`.
        seed: seed of A if num_iter is 0; otherwise without effect.
        hessian: H = E[x x'] of the layer's inputs x, (in, in) or its diagonal (in,), on any device, see `collect_statistics`.
            The norm is then that of the layer's outputs, ||D||_H = sqrt(tr(D H D')), with H damped as in `metric_of`.
        rounding: `nearest`, or `gptq` with a hessian.
        return_errors: whether to return the relative errors ||W - Q - s B A||_F / ||W||_F as a fourth result: of quantization
            alone, then after each step. With a hessian too, they are the weight's. The output's relative error is
            sqrt(tr(D H D') / tr(W H W')) for D = W - Q - s B A.

    Returns:
        (dequantized_weight, lora_A, lora_B): Q (out, in) in the weight's type and on its device, A (r, in) and
        B (out, r) in float32. For bfloat16 and float16 weights, scales are rounded to that type, and the factors are
        fitted to the rounded Q that is returned.

    Raises:
        UserError: if the weight is not a finite floating-point matrix, the hessian is no second moment of its inputs, or a
            setting is unknown or out of range.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha={alpha}: not a positive number; choose one, or None for the rank")
    quantizer_type = "int" if (quant_type, num_bits) == ("nf", 8) else quant_type
    scale_dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    quantizer = make_quantizer(quantizer_type, num_bits, block_size, scale_dtype, levels=levels, scale=scale)
    metric = None if hessian is None else metric_of(hessian.to(weight.device))
    measure = return_errors or not quantizer.published  # the step of least error is returned
    result = decompose(
        weight, quantizer, reduced_rank, num_iter, solver, measure=measure, metric=metric, rounding=rounding
    )
    if num_iter == 0:
        lora_A, lora_B = kaiming_uniform_A(result.lora_A.shape, seed).to(weight.device), result.lora_B
    else:
        root = math.sqrt(1.0 if alpha is None else alpha / reduced_rank)
        lora_A, lora_B = result.lora_A / root, result.lora_B / root
    backbone = result.backbone(quantizer, weight.dtype)
    return (backbone, lora_A, lora_B, result.errors) if return_errors else (backbone, lora_A, lora_B)


def kaiming_uniform_A(shape: torch.Size | tuple[int, int], seed: int) -> torch.Tensor:
    """Return LoRA's random A (rank, in), float32 on the CPU: Kaiming uniform with a = sqrt(5), within +- 1 / sqrt(in)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
