"""Collecting the metrics of the runs and sweeps in folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

log = logging.getLogger(__name__)

_NEEDED = ("label", "config", "scores", "table", "init", "seconds", "published", "backbone_bytes", "adapter_bytes")


@dataclass(frozen=True)
class Found:
    """A run's metrics and the file that holds them."""

    path: Path
    metrics: dict[str, Any]


def collect(folders: Iterable[Path]) -> list[Found]:
    """Return the metrics in `folders` and their subfolders, each run once. A run's metrics.json precedes a sweep's record.

    A file without valid metrics is skipped with a warning. A failed job of a sweep is skipped without one.
    """
    folders = list(folders)
    runs: dict[str, Found] = {}
    for found in [*_runs(folders), *_jobs(folders)]:
        runs.setdefault(json.dumps(found.metrics["config"], sort_keys=True), found)
    return list(runs.values())


def _runs(folders: list[Path]) -> Iterator[Found]:
    for path in _files(folders, "metrics.json"):
        if _is_metrics(metrics := _read(path)):
            yield Found(path, metrics)
        else:
            log.warning("%s: not the metrics of a run; skipped", path)


def _jobs(folders: list[Path]) -> Iterator[Found]:
    for path in _files(folders, "job-*.json"):
        job = _read(path)
        metrics = job.get("metrics") if isinstance(job, dict) else None
        if _is_metrics(metrics):
            yield Found(path, metrics)
        elif not (isinstance(job, dict) and job.get("error")):
            log.warning("%s: not a job of a sweep; skipped", path)


def _files(folders: list[Path], name: str) -> list[Path]:
    return sorted({path for folder in folders for path in folder.rglob(name)})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _is_metrics(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and all(name in value for name in _NEEDED)
