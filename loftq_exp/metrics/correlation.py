"""Correlations of predicted and gold numbers, as defined by scipy. 0 if either side is constant (undefined in scipy)."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from scipy.stats import pearsonr, spearmanr

from loftq_exp.metrics.module import Module

SCIPY = "Virtanen et al., SciPy 1.0: Fundamental Algorithms for Scientific Computing in Python, Nature Methods 17, 2020"


class Pearson(Module):
    """`pearson`: the linear correlation coefficient, from -1 to 1."""

    prediction = reference = datasets.Value("float64")
    citation = SCIPY

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        defined = _defined(predictions, references)
        return {"pearson": float(pearsonr(predictions, references).statistic) if defined else 0.0}


class Spearman(Module):
    """`spearman`: the rank correlation coefficient, from -1 to 1; ties get the mean of their ranks."""

    prediction = reference = datasets.Value("float64")
    citation = SCIPY

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        defined = _defined(predictions, references)
        return {"spearman": float(spearmanr(predictions, references).statistic) if defined else 0.0}


def _defined(predictions: Sequence[float], references: Sequence[float]) -> bool:
    return len(set(predictions)) > 1 and len(set(references)) > 1
