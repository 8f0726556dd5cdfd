"""Weights & Biases. It stays offline unless WANDB_MODE or WANDB_API_KEY says otherwise: no key is asked for."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_exp.config import local_path
from loftq_exp.report.tracker import PROJECT, Tracker

log = logging.getLogger(__name__)

_LOGIN_SECONDS = 30


class WandbTracker(Tracker):
    """A run of wandb in OUTPUT_DIR/wandb. An offline one is sent later with `wandb sync`."""

    name = "wandb"

    def open(self, known: str | None) -> str:
        """As `Tracker.open`. The id follows from the run's folder, so that a resumed run is the same one."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        place = local_path(self.config.output_dir)
        os.environ.setdefault(
            "WANDB_DATA_DIR", str((place / "wandb" / "data").absolute())
        )  # files of artifacts, until they are sent
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        given = known or hashlib.blake2b(str(self.folder.absolute()).encode(), digest_size=8).hexdigest()
        place.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, login_timeout=_LOGIN_SECONDS)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=self.folder.name,
            id=given,
            dir=str(place),
            mode=mode,
            resume="allow",
            config=self.config.to_dict(),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            log.info("wandb: offline, in %s; send it with: wandb sync %s", place / "wandb", Path(self._run.dir).parent)
        return given

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.scalars`. `step` is a value of its own, because scores and errors do not come in the order of steps."""
        self._run.log({**values, "step": step})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `Tracker.table`."""
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def artifact(self, files: Sequence[Path]) -> None:
        """As `Tracker.artifact`."""
        found = self._wandb.Artifact(f"report-{self._run.id}", type="report")
        for file in files:
            found.add_file(str(file))
        self._run.log_artifact(found)

    def end(self, failed: bool) -> None:
        """As `Tracker.end`."""
        self._run.finish(exit_code=int(failed))
