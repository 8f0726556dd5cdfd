"""Collecting the metrics of the runs and sweeps in folders, also of those that are not finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard

from loftq_exp.manifest import fault_of
from loftq_exp.report.places import JOB
from loftq_exp.report.table import METHODS

log = logging.getLogger(__name__)

CONFIG, METRICS = "config.json", "metrics.json"

_NEEDED = {"label": str, "config": dict, "scores": dict, "table": list, "init": dict, "seconds": dict}
_PRESENT = ("published", "backbone_bytes", "adapter_bytes")
_QUANT = ("method", "type", "bits", "rank")
_COLUMN = ("title", "scores", "form", "scale")


@dataclass(frozen=True)
class Found:
    """A run's metrics and the file that holds them. The state is "done", "unfinished" or "failed"."""

    path: Path
    metrics: dict[str, Any]
    state: str = "done"


def collect(places: Iterable[Path]) -> list[Found]:
    """Return the metrics in `places`, each run once. A run's metrics.json precedes a sweep's record.

    A place is a folder, which is searched with its subfolders, or a file. A file without valid metrics is skipped with a
    warning. A failed job of a sweep, see `loftq_exp.report.jobs`, is none. A run that is not finished or that failed has its
    settings and no scores.
    """
    places = list(places)
    runs: dict[str, Found] = {}
    for found in [*_runs(places), *_jobs(places), *_unfinished(places)]:
        runs.setdefault(json.dumps(found.metrics["config"], sort_keys=True), found)
    return list(runs.values())


def _runs(places: list[Path]) -> Iterator[Found]:
    for path in files_in(places, METRICS):
        if fault := fault_of(path):
            log.warning("%s; skipped: run its command again", fault)
        elif is_metrics(metrics := _read(path)):
            yield Found(path, metrics)
        else:
            log.warning("%s: not the metrics of a run; skipped", path)


def _jobs(places: list[Path]) -> Iterator[Found]:
    for path in files_in(places, JOB):
        job = _read(path)
        metrics = job.get("metrics") if isinstance(job, dict) else None
        if is_metrics(metrics):
            yield Found(path, metrics)
        elif not (isinstance(job, dict) and job.get("error")):
            log.warning("%s: not a job of a sweep; skipped", path)


def _unfinished(places: list[Path]) -> Iterator[Found]:
    """Yield the runs whose folder has settings and no metrics. Any other config.json, such as a model's, is none of ours."""
    failed = [
        job["config"] for path in files_in(places, JOB) if isinstance(job := _read(path), dict) and job.get("config")
    ]
    for path in files_in(places, CONFIG):
        config = _read(path)
        if (path.parent / METRICS).exists() or not (isinstance(config, dict) and "initialisation" in config):
            continue
        settings = {name: value for name, value in config.items() if name not in ("format", "initialisation")}
        if found := from_settings(path, settings, "failed" if settings in failed else "unfinished"):
            yield found
        else:
            log.warning("%s: not the settings of a run; skipped", path)


def from_settings(path: Path, settings: dict[str, Any], state: str) -> Found | None:
    """Return a run that has settings and no results yet; None if they are not the settings of a run."""
    metrics: dict[str, Any] = {"label": path.parent.name, "config": settings, "scored_adapter": _to_be_scored(settings),
               "scores": {}, "table": [], "init": {}, "seconds": {}, "losses": [], **dict.fromkeys(_PRESENT)}  # fmt: skip
    return Found(path, metrics, state) if is_metrics(metrics) else None


def _to_be_scored(settings: dict[str, Any]) -> str | None:
    stages = settings.get("stages") or ()
    return None if "evaluate" not in stages else "fine-tuned" if "finetune" in stages else "initial"


def files_in(places: list[Path], pattern: str) -> list[Path]:
    """Return the files of this name in folders and their subfolders, and those of `places` themselves, sorted."""
    files = (
        place.rglob(pattern) if place.is_dir() else [place] if fnmatch(place.name, pattern) else [] for place in places
    )
    return sorted({path for found in files for path in found})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _numbers(metrics: dict[str, Any]) -> list[Any]:
    init = [metrics["init"].get(name) for name in ("bits_per_weight", "mean_error", "mean_output_error")]
    sizes = [metrics["backbone_bytes"], metrics["adapter_bytes"]]
    return [*init, *sizes, *metrics["scores"].values(), *metrics["seconds"].values()]


def is_metrics(value: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether `value` has all that a report reads, in the expected types."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), kind) for name, kind in _NEEDED.items()):
        return False
    quant, task = value["config"].get("quant"), value["config"].get("task", {})
    return (
        all(name in value for name in _PRESENT)
        and all(isinstance(number, (int, float, NoneType)) for number in _numbers(value))
        and (not value["published"] or isinstance(value["published"], dict))
        and isinstance(task, dict)
        and isinstance(quant, dict)
        and all(name in quant for name in _QUANT)
        and quant["method"] in METHODS
        and all(isinstance(column, dict) and all(name in column for name in _COLUMN) for column in value["table"])
    )
