"""The tasks' official metrics as `evaluate.Metric` modules, based on scikit-learn, scipy and rouge-score. No network is needed.

Each is a class: `Accuracy().compute(predictions=..., references=...)` works as with any metric of `evaluate`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from loftq_exp.metrics.classification import F1, Accuracy, Matthews
from loftq_exp.metrics.correlation import Pearson, Spearman
from loftq_exp.metrics.module import Module
from loftq_exp.metrics.rouge import Rouge
from loftq_exp.metrics.squad import Squad

__all__ = ["METRICS", "compute"]

METRICS: dict[str, type[Module]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews": Matthews,
    "pearson": Pearson,
    "spearman": Spearman,
    "squad": Squad,
    "rouge": Rouge,
}
"""The metric class of each name that a task may use."""


def compute(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Return all scores of the named metrics, by the score's own name. `rouge` has four."""
    scores: dict[str, float] = {}
    # In memory and in a temporary folder, because evaluate would leave files under the home folder.
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            metric = METRICS[name](keep_in_memory=True, cache_dir=folder)
            scores |= metric.compute(predictions=predictions, references=references) or {}
    return scores
