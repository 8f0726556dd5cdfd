"""ANLI (Nie et al., 2020): adversarial natural language inference, in three rounds."""

from __future__ import annotations

from loftq_exp.tasks.classification import Classification


class Anli(Classification):
    """Rows of `premise`, `hypothesis` and `label`. The three rounds are scored together and separately (`accuracy_r1`)."""

    kind = "anli"
    columns = ("premise", "hypothesis")
    labels = ("entailment", "neutral", "contradiction")
