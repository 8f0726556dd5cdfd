"""Scores of predicted labels, as scikit-learn defines them."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from loftq_exp.metrics.module import Module

SCIKIT_LEARN = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011"


class Accuracy(Module):
    """`accuracy`: the share of predicted labels that equal the gold labels, from 0 to 1."""

    prediction = reference = datasets.Value("int64")
    citation = SCIKIT_LEARN

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(Module):
    """`f1` of label 1: 2 P R / (P + R), from 0 to 1; 0 if neither side has a 1."""

    prediction = reference = datasets.Value("int64")
    citation = SCIKIT_LEARN

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, zero_division=0))}


class Matthews(Module):
    """`matthews`: the Matthews correlation coefficient, from -1 to 1; 0 if all labels of one side are equal."""

    prediction = reference = datasets.Value("int64")
    citation = SCIKIT_LEARN

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        if len(set(predictions)) == 1 or len(set(references)) == 1:
            return {"matthews": 0.0}  # as scikit-learn, without its warning
        return {"matthews": float(matthews_corrcoef(references, predictions))}
