"""ROUGE as rouge-score computes it, with stemming, on words of any script."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from rouge_score.rouge_scorer import RougeScorer

from loftq_exp.metrics.module import Module
from loftq_exp.metrics.sentences import sentences
from loftq_exp.metrics.words import Words

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(Module):
    """`rouge1`, `rouge2`, `rougeL` and `rougeLsum`: mean F-measures, from 0 to 1, of Porter-stemmed words.

    Both sides are first split into sentences, one per line, since `rougeLsum` compares by sentence. Scores of ASCII texts
    equal those of rouge-score. Letters that rouge-score drops form words here: accented letters and all other scripts. A
    text without any word scores 0, even against itself.
    """

    prediction = reference = datasets.Value("string")
    citation = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        scorer = RougeScorer(NAMES, tokenizer=Words())
        found = [
            scorer.score("\n".join(sentences(gold)), "\n".join(sentences(predicted)))
            for predicted, gold in zip(predictions, references, strict=True)
        ]
        return {name: sum(scores[name].fmeasure for scores in found) / len(found) for name in NAMES}
