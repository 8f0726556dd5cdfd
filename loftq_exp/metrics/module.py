"""The base class of the metrics, which declares a metric's inputs and description to `evaluate`."""

from __future__ import annotations

import datasets
import evaluate

INPUTS = """
Args:
    predictions: the model's answers
    references: the gold answers, in the same order
"""


class Module(evaluate.Metric):
    """A metric. A subclass declares the types that it compares and implements `_compute`. Its docstring is the description."""

    prediction: datasets.features.features.FeatureType
    """The type of one prediction."""
    reference: datasets.features.features.FeatureType
    """The type of one reference."""
    citation: str

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=self.citation,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": self.prediction, "references": self.reference}),
        )
