"""The records of the stages in a run's folder, and whether they are still valid for the run.

A record is valid if it has the stage's key and its files are unchanged since the stage wrote them. Evaluations are stored
side by side, by key. That of the last call is also copied to the top of the folder.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp import manifest, ranks
from loftq_exp.artifact.folder import Initialised, read_artifact
from loftq_exp.artifact.origin import FILE as ORIGIN
from loftq_exp.artifact.origin import adapter_digest, file_digest, read_origin
from loftq_exp.config import RunConfig, local_path
from loftq_exp.errors import UserError
from loftq_exp.keys import Identity
from loftq_exp.provenance import provenance
from loftq_exp.report.record import FORMAT, as_json
from loftq_exp.whole import clear_leftovers, read_object, remove_folder

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

    def clear_leftovers(self) -> None:
        """Remove what killed processes left, under the run's lock."""
        for folder in (self.folder, *self.folder.glob("evaluations/*")):
            clear_leftovers(folder)

    def drop_checkpoints(self, key: str) -> None:
        """Remove the trainer's checkpoints of the fine-tuning with this `key`, whose record is kept."""
        place = self.folder / "checkpoints"
        origin = read_origin(place)
        if origin and origin.finetune == key:
            remove_folder(place)

    def samples(self, key: str) -> Path:
        """Return the path of the samples behind the scores with this `key`. Creates their folder."""
        place = self._evaluation(key) / SAMPLES
        if ranks.is_main():
            place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def keep(self, stage: str, key: str, result: Record) -> Record:
        """Write the record of a stage's `result` under `key`, and return it."""
        record = {"format": FORMAT} | result | {"key": key, "initialisation": self.init_key, "provenance": provenance()}
        folder = self._evaluation(key) if stage == "evaluate" else self.folder
        manifest.write_listed(folder / f"{stage}.json", as_json(record))
        return record

    def show(self, key: str) -> None:
        """Copy the evaluation with this `key` to the top of the folder, where users and scripts look for it."""
        if self._evaluated(self.folder, key) is None:
            for name in (SAMPLES, "evaluate.json"):
                manifest.copy_listed(self._evaluation(key) / name, self.folder / name)

    def finetuned(self, key: str | None = None) -> Record | None:
        """Return the record of the fine-tuning that produced the current adapter. None if it is missing or has another `key`."""
        found = self._read("finetune", key)
        if found and (self._origin_fault() or found.get("adapter") != (adapter_digest(self.adapter) or "missing")):
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

        Raises UserError if the initialisation was fine-tuned and its adapter is missing or was changed, or if that cannot be
        read because a record is damaged.
        """
        if self.trained_in:
            return Records(self.trained_in, self.init_key).adapter_to_score()
        record = self.folder / "finetune.json"
        if fault := (manifest.fault_of(record) if record.exists() else None) or self._origin_fault():
            raise UserError(f"{fault}; add finetune to stages to train again")
        if self._read("finetune") and self.finetuned() is None:
            raise UserError(f"stages: the adapter in {self.adapter} was deleted or changed since it was trained; add finetune to "
                            f"stages, or delete {self.folder / 'finetune.json'} and adapter to score the initial factors")  # fmt: skip
        if self.trained_adapter is None and self.adapter.is_dir():
            log.warning("evaluate: the adapter in %s was not trained from this initialisation; the initial factors are scored; "
                        "add finetune to stages to train again", self.adapter)  # fmt: skip
        return self.trained_adapter

    def _origin_fault(self) -> str | None:
        """Return what is wrong with the file that says what the adapter was trained from."""
        return manifest.fault_of(self.adapter / ORIGIN)

    @property
    def trained_adapter(self) -> Path | None:
        """The adapter in the folder if it was trained from the initialisation; else None."""
        origin = read_origin(self.adapter)
        return self.adapter if origin and origin.initialisation == self.init_key else None

    def _read(self, stage: str, key: str | None = None, folder: Path | None = None) -> Record | None:
        place = (folder or self.folder) / f"{stage}.json"
        if fault := manifest.fault_of(place):
            if place.exists():
                log.warning("%s: %s; its stage is done again", stage, fault)
            return None
        found = read_object(place)
        if found.get("format") != FORMAT or found.get("initialisation") != self.init_key:
            return None
        return found if key in (None, found.get("key")) else None


def write_config(folder: Path, config: RunConfig, identity: Identity) -> None:
    """Write the run's settings and the initialisation that it starts from to its `folder`."""
    start = {"key": identity.init_key, "folder": str(identity.init_dir.absolute())}
    manifest.write_listed(folder / CONFIG, as_json({"format": FORMAT, **config.to_dict(), "initialisation": start}))


def read_config(folder: Path) -> RunConfig:
    """Return the settings of the run in `folder`. Raises UserError if they are missing or of another version."""
    if fault := manifest.fault_of(folder / CONFIG):
        raise UserError(f"{fault}; run its command again")
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
