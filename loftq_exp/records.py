"""What the stages left in a run's folder, and whether it is still the result of what the run would do now.

A record counts under its key, and where the files that it vouches for are the very ones that the stage wrote.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp.errors import UserError
from loftq_exp.training.origin import adapter_digest, file_digest, read_origin

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records in a run's `folder`, seen from the initialisation of the key `init_key`."""

    folder: Path
    init_key: str

    @property
    def adapter(self) -> Path:
        """Where the fine-tuned adapter is, or will be."""
        return self.folder / "adapter"

    @property
    def samples(self) -> Path:
        """Where the samples behind the scores are, or will be."""
        return self.folder / "samples.jsonl"

    def finetuned(self, key: str | None = None) -> Record | None:
        """The record of the fine-tuning that made the adapter which is there, under `key` where one is given."""
        found = self._read("finetune", key)
        if found and found.get("adapter") != adapter_digest(self.adapter):
            if key:
                log.info(
                    "finetune: the adapter in %s was deleted or changed since it was trained: trained again",
                    self.adapter,
                )
            return None
        return found

    def evaluated(self, key: str | None = None) -> Record | None:
        """The record of the scores of the adapter which is there, under `key` where one is given."""
        found = self._read("evaluate", key)
        if not found or found["adapter"] != ("fine-tuned" if found["adapter_digest"] else "initial"):
            return None
        if found["adapter_digest"] not in (None, adapter_digest(self.adapter)):
            return None
        try:
            return found if found["samples"] == file_digest(self.samples) else None
        except OSError:
            return None

    def adapter_to_score(self) -> Path | None:
        """The adapter of an earlier fine-tuning that belongs to the initialisation; None: its initial factors are scored.

        Raises UserError where the initialisation was fine-tuned and the adapter is not what came of it.
        """
        if self._read("finetune") and self.finetuned() is None:
            raise UserError(f"stages: the adapter in {self.adapter} was deleted or changed since it was trained; add finetune to "
                            f"stages, or delete {self.folder / 'finetune.json'} and adapter to score the initial factors")  # fmt: skip
        if self.trained_adapter is None and self.adapter.is_dir():
            log.warning("evaluate: the adapter in %s was not trained from this initialisation: the initial factors are scored; "
                        "add finetune to stages to train anew", self.adapter)  # fmt: skip
        return self.trained_adapter

    @property
    def trained_adapter(self) -> Path | None:
        """The adapter in the folder where it was trained from the initialisation."""
        origin = read_origin(self.adapter)
        return self.adapter if origin and origin.initialisation == self.init_key else None

    def _read(self, stage: str, key: str | None = None) -> Record | None:
        try:
            found = json.loads((self.folder / f"{stage}.json").read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("initialisation") != self.init_key:
            return None
        return found if key in (None, found.get("key")) else None
