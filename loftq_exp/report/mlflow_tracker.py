"""MLflow, in its SQLite store OUTPUT_DIR/mlflow.db unless MLFLOW_TRACKING_URI names another."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from loftq_exp.config import local_path
from loftq_exp.report.settings import flatten
from loftq_exp.report.tracker import PROJECT, Tracker

_LONGEST = 500
"""Characters of a parameter that every store of MLflow takes."""


class MlflowTracker(Tracker):
    """A run of MLflow. Its parameters are the settings by dotted name."""

    name = "mlflow"

    def open(self, known: str | None) -> str:
        """As `Tracker.open`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        given = os.environ.get("MLFLOW_TRACKING_URI")
        place = local_path(self.config.output_dir).absolute()
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".mlflow.lock"):  # jobs of a sweep would make the database's tables at the same time
            self._client = MlflowClient(given or f"sqlite:///{place / 'mlflow.db'}")
            experiment = self._experiment(None if given else (place / "mlartifacts").as_uri())
        with contextlib.suppress(MlflowException):  # of another store
            if known:
                self._client.update_run(known, status="RUNNING")
                self._id = known
                return known
        self._id = self._client.create_run(experiment, run_name=self.folder.name).info.run_id
        for name, value in flatten(self.config.to_dict()).items():
            self._client.log_param(self._id, name, str(value)[:_LONGEST])
        return str(self._id)

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name, artifact_location=artifacts))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.scalars`."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `Tracker.table`: an artifact in the form that MLflow shows as a table."""
        self._client.log_dict(self._id, {"columns": list(columns), "data": [list(row) for row in rows]}, f"{name}.json")

    def artifact(self, files: Sequence[Path]) -> None:
        """As `Tracker.artifact`."""
        for file in files:
            self._client.log_artifact(self._id, str(file), "report")

    def end(self, failed: bool) -> None:
        """As `Tracker.end`."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
