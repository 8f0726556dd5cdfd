"""The settings `calibration`: the text on which quant.calibration observes the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from loftq_exp.config.schema import INITIALISATION, LONGEST, setting
from loftq_exp.errors import UserError

RUNNING_TEXT = "wikitext"
"""The task that reads running text."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text, and how much of it. By default it is a sample of the run's own training rows."""

    file: str | None = setting(
        "local calibration text in place of the training rows: .txt with running text, or .json, .jsonl or .csv with rows as the "
        "task (calibration.task) reads them",
        None,
        shapes=(),
        locates=(INITIALISATION,),
    )
    dataset: str | None = setting(
        "Hub id of a data set in place of the training rows", None, shapes=(), locates=(INITIALISATION,)
    )
    dataset_config: str | None = setting(
        "configuration (subset) of calibration.dataset", None, shapes=(), locates=(INITIALISATION,)
    )
    split: str = setting("split of calibration.dataset", "train", shapes=(), locates=(INITIALISATION,))
    task: str | None = setting(
        "task.kind that reads calibration.file or calibration.dataset, with its default settings; wikitext reads any text. null: "
        "the run's own task, or wikitext for a .txt file",
        None,
        shapes=(),
        locates=(INITIALISATION,),
    )
    samples: int = setting(
        "number of rows, or windows of running text, drawn at random",
        128,
        ge=1,
        lt=LONGEST + 1,
        shapes=(INITIALISATION,),
    )
    length: int = setting("maximum length of a sample in tokens", 512, ge=2, lt=LONGEST + 1, shapes=(INITIALISATION,))
    seed: int = setting("random seed of the draw", 0, ge=0, lt=2**32, shapes=(INITIALISATION,))

    def __post_init__(self) -> None:
        if self.file and self.dataset:
            raise UserError(
                f"calibration.file={self.file}: calibration.dataset={self.dataset} is given too; leave one of them out"
            )
        for name, value, default in (("dataset_config", self.dataset_config, None), ("split", self.split, "train")):
            if value != default and not self.dataset:
                raise UserError(f"calibration.{name}={value}: no data set is named; give calibration.dataset=HUB_ID")
        if self.file and self.task and self.is_text and self.task != RUNNING_TEXT:
            raise UserError(f"calibration.file={self.file}: task {self.task} does not read running text; "
                            f"leave calibration.task out, or give a .jsonl file")  # fmt: skip

    @property
    def is_text(self) -> bool:
        """Whether the file is running text."""
        return PurePath(self.file or "").suffix.lower() == ".txt"
