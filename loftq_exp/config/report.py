"""The settings `report`: what the table of a sweep compares."""

from __future__ import annotations

from dataclasses import dataclass

from loftq_exp.config.schema import setting


@dataclass(frozen=True)
class ReportConfig:
    """What the table at the end of a multirun shows beside the scores. It shapes no result."""

    baseline: str | None = setting(
        "of a multirun: a method (quant.method), or a row's name as `loftq-exp report --format csv` shows it. Each row gets its "
        "paired difference to that row over equal seeds; of several rows of the method, to the one with the nearest settings",
        None,
        shapes=(),
    )
