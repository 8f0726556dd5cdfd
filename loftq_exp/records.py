"""What the stages left in a run's folder, and whether it is still the result of what the run would do now.

A record counts under its key, and where the files that it vouches for are the very ones that the stage wrote. Evaluations
are kept beside each other by key; the one of the last call also stands at the top of the folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp import ranks
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.keys import Identity
from loftq_exp.report.record import FORMAT, write_json
from loftq_exp.training.origin import adapter_digest, file_digest, read_origin
from loftq_exp.whole import whole_file

log = logging.getLogger(__name__)

Record = dict[str, Any]
CONFIG, SAMPLES = "config.json", "samples.jsonl"
_KEY_DIGITS = 16


@dataclass(frozen=True)
class Records:
    """The records in a run's `folder`, seen from the initialisation of the key `init_key`."""

    folder: Path
    init_key: str

    @property
    def adapter(self) -> Path:
        """Where the fine-tuned adapter is, or will be."""
        return self.folder / "adapter"

    def samples(self, key: str) -> Path:
        """Where the samples behind the scores of a `key` are, or will be. Their folder is made."""
        place = self._evaluation(key) / SAMPLES
        if ranks.is_main():
            place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def keep(self, stage: str, key: str, result: Record) -> Record:
        """Writes the record of what a stage did under `key`, and gives it back."""
        record = {"format": FORMAT} | result | {"key": key, "initialisation": self.init_key}
        write_json((self._evaluation(key) if stage == "evaluate" else self.folder) / f"{stage}.json", record)
        return record

    def show(self, key: str) -> None:
        """Puts the evaluation of a `key` at the top of the folder, where people and scripts look for it."""
        if self._evaluated(self.folder, key) is None:
            for name in (SAMPLES, "evaluate.json"):
                with whole_file(self.folder / name) as beside:
                    shutil.copyfile(self._evaluation(key) / name, beside)

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
        if key is None or self._read("evaluate", key):  # at the top: where its samples are gone, they are made again
            return self._evaluated(self.folder, key)
        return self._evaluated(self._evaluation(key), key)

    def _evaluated(self, folder: Path, key: str | None) -> Record | None:
        found = self._read("evaluate", key, folder)
        if not found or found["adapter"] != ("fine-tuned" if found["adapter_digest"] else "initial"):
            return None
        if found["adapter_digest"] not in (None, adapter_digest(self.adapter)):
            return None
        try:
            return found if found["samples"] == file_digest(folder / SAMPLES) else None
        except OSError:
            return None

    def _evaluation(self, key: str) -> Path:
        return self.folder / "evaluations" / key[:_KEY_DIGITS]

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

    def _read(self, stage: str, key: str | None = None, folder: Path | None = None) -> Record | None:
        found = _read_json((folder or self.folder) / f"{stage}.json")
        if found.get("format") != FORMAT or found.get("initialisation") != self.init_key:
            return None
        return found if key in (None, found.get("key")) else None


def write_config(folder: Path, config: RunConfig, identity: Identity) -> None:
    """Leaves the run's settings in its `folder`, and which initialisation it starts from."""
    start = {"key": identity.init_key, "folder": str(identity.init_dir.absolute())}
    write_json(folder / CONFIG, {"format": FORMAT, **config.to_dict(), "initialisation": start})


def read_config(folder: Path) -> RunConfig:
    """The settings of the run in `folder`. Raises UserError where they are not there, or not those of this version."""
    found = _read_json(folder / CONFIG)
    if found.get("format") != FORMAT:
        raise UserError(f"{folder}: no run of this version (its {CONFIG} has format {found.get('format')}, not {FORMAT}); "
                        "give a folder of outputs/runs")  # fmt: skip
    return RunConfig.from_mapping(
        {key: value for key, value in found.items() if key not in ("format", "initialisation")}
    )


def init_of_run(folder: Path) -> Path | None:
    """The initialised checkpoint that the run in `folder` starts from; None for a folder that names none."""
    start = _read_json(folder / CONFIG).get("initialisation")
    return Path(str(start.get("folder"))) if isinstance(start, dict) else None


def is_of_version_0_1(folder: Path) -> bool:
    """Whether a run of version 0.1 left its results in `folder`: they do not say what they were made from."""
    found = _read_json(folder / CONFIG)
    return bool(found) and "format" not in found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
