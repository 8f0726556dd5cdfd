"""ROUGE as rouge-score computes it, with stemming."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from rouge_score.rouge_scorer import RougeScorer

from loftq_exp.metrics.module import Module
from loftq_exp.metrics.sentences import sentences

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(Module):
    """`rouge1`, `rouge2`, `rougeL` and `rougeLsum`: mean F-measures, from 0 to 1, of Porter-stemmed words.

    Both sides are split into sentences first, one a line: `rougeLsum` compares sentence by sentence.
    """

    prediction = reference = datasets.Value("string")
    citation = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        scorer = RougeScorer(NAMES, use_stemmer=True)
        found = [
            scorer.score("\n".join(sentences(gold)), "\n".join(sentences(predicted)))
            for predicted, gold in zip(predictions, references, strict=True)
        ]
        return {name: sum(scores[name].fmeasure for scores in found) / len(found) for name in NAMES}
