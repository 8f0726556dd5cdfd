"""ANLI (Nie et al., 2020): inference written to fool models, in three rounds."""

from __future__ import annotations

from loftq_exp.tasks.classification import Classification


class Anli(Classification):
    """Rows of `premise`, `hypothesis` and `label`; the three rounds are scored together and each alone (`accuracy_r1`)."""

    kind = "anli"
    columns = ("premise", "hypothesis")
    labels = ("entailment", "neutral", "contradiction")
