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

    The published form subtracts multiples of column j's error from later columns, with a factor of H^-1. Here is its equal
    (arXiv 2307.13304, theorem 6) with the upper triangular root S of H = S S', which needs no inverse. Let E = X - Q be the
    errors of the columns before j. Column j is the rounding of

        x_j + (E S)_j / S[j, j]

    E S, the errors in the norm of the outputs, is a result too.
    """

    def __init__(self, quantizer: Quantizer, metric: Metric) -> None:
        """Raise UserError for a quantizer type that GPTQ does not support."""
        if quantizer.type not in SEARCHED_TYPES:
            raise UserError(f"rounding=gptq: type {quantizer.type} has no levels per block to round to; "
                            f"choose one of {', '.join(SEARCHED_TYPES)}, or rounding=nearest")  # fmt: skip
        self.quantizer = quantizer
        self._root = metric.root if metric.full else torch.diag(metric.root)

    def round(self, values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, image: torch.Tensor) -> None:
        """Write the codes of X, and its errors. The scales stay.

        Args:
            values: X, rows of whole blocks, float32, contiguous. Replaced by X - Q.
            codes: output, uint8, X's shape.
            scales: of the rows' blocks.
            image: output, (X - Q) S, float32, X's shape, contiguous.
        """
        run = rounding_panel(self.quantizer, values.device.type)
        anchors, columns = self._anchors(values), values.shape[1]
        for first in range(0, columns, PANEL):
            last = min(first + PANEL, columns)
            before, panel = self._root[:first, first:last], image[:, first:last]
            torch.mm(values[:, :first], before, out=panel)  # zeros for the first panel
            run(values, image, anchors, codes, scales, self._root, slice(first, last))

    def _anchors(self, values: torch.Tensor) -> torch.Tensor:
        """Return the place of each block's largest magnitude in the flattened values, int64; -1 for uniform levels."""
        flat, size = values.view(-1), self.quantizer.block_size
        whole = flat.numel() - flat.numel() % size
        parts = [part.view(-1, min(size, len(part))) for part in (flat[:whole], flat[whole:]) if len(part)]
        if self.quantizer.type == "uniform":
            return torch.full((sum(map(len, parts)),), -1, device=values.device)
        largest = torch.cat([part.abs().argmax(dim=1) for part in parts])
        return largest.add_(torch.arange(0, flat.numel(), size, device=values.device))
