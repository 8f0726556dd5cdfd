"""Trackio, in OUTPUT_DIR/trackio unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_exp.config import local_path
from loftq_exp.report.tracker import PROJECT, Tracker


class TrackioTracker(Tracker):
    """A run of Trackio. The library keeps the folder of its first run in a process."""

    name = "trackio"

    def open(self, known: str | None) -> str:
        """As `Tracker.open`. A run is found by its name."""
        os.environ.setdefault("TRACKIO_DIR", str((local_path(self.config.output_dir) / "trackio").absolute()))
        import trackio

        self._trackio = trackio
        with _silent():
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
                name=self.folder.name,
                config=self.config.to_dict(),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return self.folder.name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.scalars`."""
        self._run.log(dict(values), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `Tracker.table`."""
        from pandas import DataFrame

        found = self._trackio.Table(dataframe=DataFrame([list(row) for row in rows], columns=list(columns)))
        self._run.log({name: found}, step=0)

    def artifact(self, files: Sequence[Path]) -> None:
        """As `Tracker.artifact`."""
        found = self._trackio.Artifact(f"report-{self.folder.name}"[:128], type="report")
        for file in files:
            found.add_file(str(file))
        self._run.log_artifact(found)

    def end(self, failed: bool) -> None:
        """As `Tracker.end`."""
        with _silent():
            self._run.finish()


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Keep back what the library prints about its dashboard."""
    return contextlib.redirect_stdout(io.StringIO())
