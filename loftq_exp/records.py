"""The records of the stages in a run's folder, and whether they are still valid for the run.

A record is valid if it has the stage's key and its files are unchanged since the stage wrote them. Evaluations are stored
side by side, by key. That of the last call is also copied to the top of the folder.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp import ranks
from loftq_exp.artifact.folder import Initialised, read_artifact
from loftq_exp.config import RunConfig, local_path
from loftq_exp.errors import UserError
from loftq_exp.keys import Identity
from loftq_exp.report.record import FORMAT, write_json
from loftq_exp.training.origin import adapter_digest, file_digest, read_origin
from loftq_exp.whole import read_object, whole_file

log = logging.getLogger(__name__)

Record = dict[str, Any]
CONFIG, SAMPLES = "config.json", "samples.jsonl"
_KEY_DIGITS = 16


@dataclass(frozen=True)
class Records:
    """The records in a run's `folder` that belong to the initialisation with the key `init_key`."""

    folder: Path
    init_key: str
    trained_in: Path | None = None
    """The folder of the run whose adapter is scored; None: this run's own."""

    @property
    def adapter(self) -> Path:
        """The folder of the fine-tuned adapter, which may not exist yet."""
        return (self.trained_in or self.folder) / "adapter"

    def samples(self, key: str) -> Path:
        """Return the path of the samples behind the scores with this `key`. Creates their folder."""
        place = self._evaluation(key) / SAMPLES
        if ranks.is_main():
            place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def keep(self, stage: str, key: str, result: Record) -> Record:
        """Write the record of a stage's `result` under `key`, and return it."""
        record = {"format": FORMAT} | result | {"key": key, "initialisation": self.init_key}
        write_json((self._evaluation(key) if stage == "evaluate" else self.folder) / f"{stage}.json", record)
        return record

    def show(self, key: str) -> None:
        """Copy the evaluation with this `key` to the top of the folder, where users and scripts look for it."""
        if self._evaluated(self.folder, key) is None:
            for name in (SAMPLES, "evaluate.json"):
                with whole_file(self.folder / name) as beside:
                    shutil.copyfile(self._evaluation(key) / name, beside)

    def finetuned(self, key: str | None = None) -> Record | None:
        """Return the record of the fine-tuning that produced the current adapter. None if it is missing or has another `key`."""
        found = self._read("finetune", key)
        if found and found.get("adapter") != adapter_digest(self.adapter):
            if key:
                log.info(
                    "finetune: the adapter in %s was deleted or changed since it was trained; it is trained again",
                    self.adapter,
                )
            return None
        return found

    def evaluated(self, key: str | None = None) -> Record | None:
        """Return the record of the current adapter's scores. None if it is missing or has another `key`."""
        if key is None or self._read("evaluate", key):  # the copy at the top; it is invalid if its samples are gone
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
        """Return the adapter of an earlier fine-tuning of the initialisation. None: its initial factors are scored.

        Raises UserError if the initialisation was fine-tuned and its adapter is missing or was changed.
        """
        if self.trained_in:
            return Records(self.trained_in, self.init_key).adapter_to_score()
        if self._read("finetune") and self.finetuned() is None:
            raise UserError(f"stages: the adapter in {self.adapter} was deleted or changed since it was trained; add finetune to "
                            f"stages, or delete {self.folder / 'finetune.json'} and adapter to score the initial factors")  # fmt: skip
        if self.trained_adapter is None and self.adapter.is_dir():
            log.warning("evaluate: the adapter in %s was not trained from this initialisation; the initial factors are scored; "
                        "add finetune to stages to train again", self.adapter)  # fmt: skip
        return self.trained_adapter

    @property
    def trained_adapter(self) -> Path | None:
        """The adapter in the folder if it was trained from the initialisation; else None."""
        origin = read_origin(self.adapter)
        return self.adapter if origin and origin.initialisation == self.init_key else None

    def _read(self, stage: str, key: str | None = None, folder: Path | None = None) -> Record | None:
        found = read_object((folder or self.folder) / f"{stage}.json")
        if found.get("format") != FORMAT or found.get("initialisation") != self.init_key:
            return None
        return found if key in (None, found.get("key")) else None


def write_config(folder: Path, config: RunConfig, identity: Identity) -> None:
    """Write the run's settings and the initialisation that it starts from to its `folder`."""
    start = {"key": identity.init_key, "folder": str(identity.init_dir.absolute())}
    write_json(folder / CONFIG, {"format": FORMAT, **config.to_dict(), "initialisation": start})


def read_config(folder: Path) -> RunConfig:
    """Return the settings of the run in `folder`. Raises UserError if they are missing or of another version."""
    found = read_object(folder / CONFIG)
    if found.get("format") != FORMAT:
        raise UserError(f"{folder}: no run of this version (its {CONFIG} has format {found.get('format')}, not {FORMAT}); "
                        "give a folder of outputs/runs")  # fmt: skip
    return RunConfig.from_mapping(
        {key: value for key, value in found.items() if key not in ("format", "initialisation")}
    )


def init_of_run(folder: Path) -> Path | None:
    """Return the initialised checkpoint that the run in `folder` starts from, or None if the folder names none."""
    start = read_object(folder / CONFIG).get("initialisation")
    return Path(str(start.get("folder"))) if isinstance(start, dict) else None


def continued(config: RunConfig) -> RunConfig:
    """Return the settings with the model and the initialisation of `score_run`, if there is one.

    Raises UserError if it is no run of this version.
    """
    if config.score_run is None:
        return config
    run = read_config(local_path(config.score_run))
    same = {name: getattr(run, name) for name in ("model", "quant", "calibration", "seed", "save_dtype", "save_format")}
    return dataclasses.replace(config, stages=("evaluate",), **same)


def start_of(config: RunConfig) -> Initialised | None:
    """Return the initialised checkpoint of `score_run`; None if there is no such run. Raises UserError if it was deleted."""
    if config.score_run is None:
        return None
    place = init_of_run(local_path(config.score_run))
    found = read_artifact(place) if place else None
    if found is None:
        raise UserError(
            f"score_run={config.score_run}: its initialised checkpoint {place} is gone; run its command again"
        )
    return found


def is_of_version_0_1(folder: Path) -> bool:
    """Return whether `folder` holds results of version 0.1, which do not record their inputs."""
    found = read_object(folder / CONFIG)
    return bool(found) and "format" not in found
