"""What the metrics share: how each tells `evaluate` what it is and what it compares."""

from __future__ import annotations

import datasets
import evaluate

INPUTS = """
Args:
    predictions: what the model answered
    references: the gold answers, in the same order
"""


class Module(evaluate.Metric):
    """A metric. A subclass says what it compares and, in `_compute`, how; its docstring describes it."""

    prediction: datasets.features.features.FeatureType
    """One prediction's type."""
    reference: datasets.features.features.FeatureType
    """One reference's type."""
    citation: str

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=self.citation,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": self.prediction, "references": self.reference}),
        )
