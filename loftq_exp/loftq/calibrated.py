"""The alternation on one weight in the norm of its layer's outputs, see `loftq_exp.loftq.metric`."""

from __future__ import annotations

import dataclasses
import math

import torch

from loftq_exp.loftq.alternation import Alternation, Decomposition, Factors, Tile, norm_of_rows, row_norms
from loftq_exp.loftq.gptq import FeedbackRounding
from loftq_exp.loftq.lowrank import thin_times
from loftq_exp.loftq.memory import Workspace
from loftq_exp.loftq.metric import Metric
from loftq_exp.loftq.pieces import spread
from loftq_exp.loftq.projection import leading_left
from loftq_exp.loftq.quantizer import Quantizer

CANCELLED = 1e-3
"""Share of the squared norm under which what the factors leave is computed from the factors, not as a difference."""


class CalibratedAlternation(Alternation):
    """Alternates between rounding W - B A and fitting B A to W - Q, both in the norm ||D||_H of a `Metric`.

    Rounding is to the nearest level, or GPTQ's. Searched scales minimise the plain squared error of a block. Weights from
    H's diagonal make them worse: a few inputs dominate it, and the factors repair just their errors. Only without factors
    are scales `weighted`. For the factors let H = S S' and U S V' be the leading singular triplets of (W - Q) S. The minimum of ||W - Q - B A||_H is at

        B = U sqrt(S),   A = sqrt(S) V' S^-1 = U' (W - Q) / sqrt(S)

    The second form of A needs no inverse. Each step records the relative error ||W - Q - B A||_H / ||W||_H.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: Quantizer,
        metric: Metric,
        rounding: str = "nearest",
        weighted: bool = False,
        measure: bool = True,
        unit: float | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """As `Alternation`.

        Args:
            weight: W.
            quantizer: makes Q.
            metric: the norm of the errors.
            rounding: `nearest` or `gptq`.
            weighted: whether scales are searched by the error weighted by H's diagonal.
            measure: whether to measure the weight's error after each step.
            unit: `Factors.unit` of the weight; None: compute it.
            workspace: memory to reuse; None: new memory.
        """
        super().__init__(weight, quantizer, measure, unit, workspace, residual_dtype=torch.float32)
        self.metric = metric
        self.importance = metric.importance if weighted else None
        self._feedback = FeedbackRounding(quantizer, metric) if rounding == "gptq" else None
        self.output_errors: list[float] = []
        """||W - quantize(W)||_H / ||W||_H, then ||W - Q - B A||_H / ||W||_H after each step."""
        self._output_norm = 0.0
        self._image_A: torch.Tensor | None = None
        """A S, if GPTQ rounds; None without factors."""

    def start(self) -> None:
        """As `Alternation.start`; also measure ||W||_H."""
        super().start()
        self._measure_norm()

    def resume(self, start: Factors) -> None:
        """As `Alternation.resume`."""
        super().resume(start)
        self.output_errors = list(start.output_errors)
        self._measure_norm()

    def quantize(self) -> None:
        """As `Alternation.quantize`."""
        if self._feedback is not None and self.lora_A is not None:
            self._image_A = self.metric.times_root(self.lora_A)
        super().quantize()

    def fit(self, rank: int, solver: str) -> None:
        """Compute the B A of rank r that minimises ||W - Q - B A||_H, starting from the current factors."""
        start = self.lora_B if self.rank == rank else None
        image = self._image()
        squares = self._squares(image)
        if not self.output_errors:
            self.output_errors.append(self._relative(squares))
        left, singular = leading_left(image, squares, rank, solver, start)
        lora_A = thin_times(left.T.contiguous(), self.residual)
        peaks = lora_A.gather(1, lora_A.abs().argmax(dim=1, keepdim=True)).squeeze(1)
        roots = singular.sqrt() * torch.where(peaks < 0, -1.0, 1.0)
        share = math.sqrt(1 / self.unit)
        self.lora_B = (left * roots).mul_(share).contiguous()
        self.lora_A = torch.where(roots == 0, 0.0, 1 / roots)[:, None].mul(lora_A).mul_(share).contiguous()
        self.steps += 1
        if not self.measure:
            self.errors.append(math.nan)
        remaining = squares - float(singular.double().square().sum())
        if remaining < CANCELLED * squares:
            remaining = self._squares(self.metric.times_root(self.residual - left @ lora_A))
        self.output_errors.append(self._relative(remaining))

    def result(self, rank: int = 0) -> Decomposition:
        """As `Alternation.result`, with the output errors."""
        if not self.output_errors:
            self.output_errors.append(self._relative(self._squares(self._image())))
        return dataclasses.replace(super().result(rank), output_errors=tuple(self.output_errors))

    def _requantize(self, tile: Tile) -> None:
        super()._requantize(tile)
        if self._feedback is None:
            return
        values, image = self._scratch(tile.codes.shape, "left"), self._image_buffer()[tile.rows]
        values = values.copy_(tile.weight) if tile.product is None else torch.sub(tile.weight, tile.product, out=values)
        self._feedback.round(values, tile.codes, tile.scales, image)
        image.mul_(self.unit)  # now (W - B A - Q) S
        if self._image_A is not None and self.lora_B is not None:
            image.addmm_(self.lora_B[tile.rows], self._image_A, alpha=self.unit)
        self.quantizer.leave(tile.weight, None, self.unit, tile.codes, tile.scales, tile.residual)

    def _image(self) -> torch.Tensor:
        """Return (W - Q) S * unit, whose Frobenius norm is the output error of quantization. GPTQ's rounding has computed it."""
        image = self._image_buffer()
        return image if self._feedback is not None else self.metric.times_root(self.residual, image)

    def _image_buffer(self) -> torch.Tensor:
        return self._workspace.take("image", self.shape, torch.float32, self.weight.device)

    def _measure_norm(self) -> None:
        def pass_over(rows: slice) -> torch.Tensor:
            return row_norms(self.metric.times_root(self._weight(rows).to(torch.float32) * self.unit))

        self._output_norm = norm_of_rows(spread(pass_over, self._tiles))

    def _squares(self, image: torch.Tensor) -> float:
        return norm_of_rows(spread(lambda rows: row_norms(image[rows]), self._tiles)) ** 2

    def _relative(self, squares: float) -> float:
        return math.sqrt(squares) / self._output_norm if self._output_norm else 0.0
