"""Exact match and F1 of answer texts, with the normalisation of SQuAD's official script."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import datasets

from loftq_exp.metrics.module import Module

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Squad(Module):
    """`exact_match` and `f1`, from 0 to 1: the best over each question's gold answers, averaged over questions."""

    prediction = datasets.Value("string")
    reference = datasets.List(datasets.Value("string"))
    citation = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016"

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": sum(best_exact_match(*pair) for pair in pairs) / len(pairs),
            "f1": sum(best_f1(*pair) for pair in pairs) / len(pairs),
        }


def normalised(text: str) -> str:
    """Return `text` in lower case, without punctuation and articles, words separated by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def best_exact_match(prediction: str, gold: Sequence[str]) -> float:
    """Return 1 if the prediction equals one of the gold answers after normalisation, else 0."""
    return float(any(normalised(prediction) == normalised(answer) for answer in gold))


def best_f1(prediction: str, gold: Sequence[str]) -> float:
    """Return the largest word F1 of the prediction with a gold answer. It is 1 if neither has words, as in SQuAD 2."""
    return max(_f1(normalised(prediction).split(), normalised(answer).split()) for answer in gold)


def _f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    if not predicted and not gold:
        return 1.0  # consistent with exact match: an answer may be only an article or punctuation
    common = sum((Counter(predicted) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)
