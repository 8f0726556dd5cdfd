"""GPTQ rounding (arXiv 2210.17323): a column's rounding error is compensated in the columns after it.

The scales are those of the nearest rounding, searched before, so rows are independent and blocks may run across rows. The
largest value of each block keeps the outermost level. A block thus always has a value at its scale, and bitsandbytes
recovers that scale from the values.
"""

from __future__ import annotations

import torch

from loftq_exp.errors import UserError
from loftq_exp.kernels.feedback import PANEL, rounding_panel
from loftq_exp.loftq.metric import Metric
from loftq_exp.loftq.quantizer import Quantizer
from loftq_exp.schemes import SEARCHED_TYPES


class FeedbackRounding:
    """Rounds rows of a weight to given scales, in the norm of a `Metric`.

    With H^-1 = U' U (U upper triangular), column j of X is rounded to q, and (x_j - q) U[j, k] / U[j, j] is subtracted from
    each later column k.
    """

    def __init__(self, quantizer: Quantizer, metric: Metric) -> None:
        """Compute U. Raise UserError for a quantizer type that GPTQ does not support."""
        if quantizer.type not in SEARCHED_TYPES:
            raise UserError(f"rounding=gptq: type {quantizer.type} has no levels per block to round to; "
                            f"choose one of {', '.join(SEARCHED_TYPES)}, or rounding=nearest")  # fmt: skip
        self.quantizer = quantizer
        factor = metric.inverse_factor()
        self._factor = (factor / factor.diagonal()[:, None]).contiguous()

    def round(
        self, weight: torch.Tensor, product: torch.Tensor | None, codes: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Replace the `codes` of W - P, rounded to the nearest, by GPTQ's. The scales stay.

        Args:
            weight: W, rows of whole blocks.
            product: P, of the same shape, or None for zero.
            codes: uint8, W's shape; the nearest codes on entry.
            scales: of the rows' blocks.
        """
        values = weight.to(torch.float32) if product is None else weight.to(torch.float32) - product
        values = values.clone() if values.data_ptr() == weight.data_ptr() else values
        run = rounding_panel(self.quantizer, values.device.type)
        columns = values.shape[1]
        fixed = self._fixed(values)
        for first in range(0, columns, PANEL):
            last = min(first + PANEL, columns)
            errors = values.new_empty(len(values), last - first)
            run(values, fixed, codes, scales, self._factor, errors, first)
            if last < columns:
                values[:, last:] -= errors @ self._factor[first:last, last:]

    def _fixed(self, values: torch.Tensor) -> torch.Tensor:
        """Return 1 where a value is the largest magnitude of its block, else 0: uint8, the values' shape."""
        flat, size = values.reshape(-1), self.quantizer.block_size
        fixed = torch.zeros(flat.numel(), dtype=torch.uint8, device=values.device)
        if self.quantizer.type != "uniform":
            padded = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % size), value=-1.0).reshape(-1, size)
            fixed[padded.argmax(dim=1) + torch.arange(0, len(padded) * size, size, device=values.device)] = 1
        return fixed.reshape(values.shape)
