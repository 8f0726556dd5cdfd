"""GLUE (Wang et al., 2019): nine tasks on a sentence or a pair of sentences. `task.name` selects one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from loftq_exp.tasks.classification import Classification, ClassificationConfig
from loftq_exp.tasks.data import DataSource, Split

COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
LABELS: dict[str, tuple[str, ...]] = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "stsb": (),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}
METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
}
"""GLUE's own metrics; accuracy for names not listed here."""
MNLI_SPLITS = "validation_matched+validation_mismatched"


@dataclass(frozen=True)
class GlueConfig(ClassificationConfig):
    """The settings of a classification task, with the nine names of GLUE."""

    names = tuple(COLUMNS)


class Glue(Classification):
    """The data set of GLUE that `task.name` names, with the columns and labels of nyu-mll/glue and GLUE's metrics.

    MNLI is scored on both its validation sets, together and separately: `accuracy_matched`, `accuracy_mismatched`.
    """

    kind = "glue"
    config: GlueConfig
    bounds = (0.0, 5.0)  # of STS-B, the only regression task

    def __init__(self, config: GlueConfig) -> None:
        super().__init__(config)
        name = config.name or ""
        self.columns, self.labels = COLUMNS[name], LABELS[name]
        self.metrics = METRICS.get(name, ("accuracy",))

    def source(self, split: Split) -> DataSource:
        """As `Task.source`. MNLI has two validation splits instead of one."""
        source = super().source(split)
        if self.config.name == "mnli" and source.dataset_split == "validation":
            return dataclasses.replace(source, dataset_split=MNLI_SPLITS)
        return source
