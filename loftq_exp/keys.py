"""The keys of a run's three results. A key is a digest of exactly the content that shapes the result.

Each setting declares in the schema which results it shapes. The initialisation's key is computed in loftq_exp.initialise.key.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp import ranks
from loftq_exp.artifact.folder import Initialised
from loftq_exp.artifact.origin import adapter_digest, rows_digest
from loftq_exp.config import RunConfig, digest_of, local_path
from loftq_exp.config.schema import ADAPTER, INITIALISATION, SCORES, shaping
from loftq_exp.initialise.key import content_in, init_dir, made_from, named_by, used
from loftq_exp.initialise.published import source_of
from loftq_exp.source.content import Content
from loftq_exp.source.locate import Source

_RUN_DIGITS = 8
_CHOOSING = ("train.eval_strategy", "train.eval_steps", "train.metric_for_best_model")
"""Settings that say when and how a validation chooses the adapter."""


@dataclass(frozen=True)
class Identity:
    """The key and folder of a run's initialisation, and the run's folder."""

    init_key: str
    init_dir: Path
    run_dir: Path


def identify(config: RunConfig, start: Source | Initialised | None = None) -> Identity:
    """Return the key and folders of a run that starts from a source or an initialised checkpoint.

    `start=None` means `source_of(config)`.
    """
    if isinstance(start, Initialised):
        report = start.report
        key = str(report.get("key") or digest_of(report))  # an export has none
        return Identity(key, start.folder, _run_dir(config, content_in(report)))
    made = made_from(start or source_of(config), config)
    key = digest_of(made)
    return Identity(key, init_dir(config, key), _run_dir(config, made["source"]))


def adapter_key(
    init_key: str, rows: Iterable[dict[str, Any]], config: RunConfig, validation: Iterable[dict[str, Any]] = ()
) -> str:
    """Return the key of the adapter that is trained from an initialisation on `rows`, as they are used.

    The `validation` rows and their settings shape the adapter only if it is chosen by them.
    """
    several: list[Any] = [ranks.count()] if ranks.count() > 1 else []  # each rank trains on its own batches
    settings = shaping(config, ADAPTER)
    if config.train.validation_chooses:
        several.append(rows_digest(validation))
    else:
        settings = {name: value for name, value in settings.items() if name not in _CHOOSING}
    return digest_of([init_key, rows_digest(rows), settings, *several])


def scores_key(init_key: str, adapter: Path | None, rows: Iterable[dict[str, Any]], config: RunConfig) -> str:
    """Return the key of the scores of `adapter` on `rows`, as they are used. `adapter=None` means the initial factors."""
    settings = shaping(config, SCORES)
    if adapter is None and config.model.kind == "classification":
        settings |= {"seed": config.seed}  # draws the head if the checkpoint's has another number of classes
    return digest_of([init_key, adapter_digest(adapter) if adapter else None, rows_digest(rows), settings])


def _run_dir(config: RunConfig, content: Content) -> Path:
    """Return the run's folder. Its digest covers everything that shapes the initialisation or the adapter except the rows.

    It also covers the location of the training rows and of the calibration text, so that a sweep over files makes one folder per file. If the rows in a
    file change, the folder stays the same and the new adapter replaces the earlier one.
    """
    located = used(config, shaping(config, INITIALISATION, ADAPTER, mark="locates"))
    rows = {name: _resolved(value) if name.endswith(("file", "_run")) else value for name, value in located.items()}
    digest = digest_of([content, used(config, shaping(config, INITIALISATION, ADAPTER)), rows])[:_RUN_DIGITS]
    return named_by(config.runs_path, config.label, digest)


def _resolved(files: str) -> str:
    """Return the files joined by `+`, each as an absolute path."""
    whole = os.path.exists(local_path(files))  # noqa: PTH110  # Path.exists raises for a name that is too long
    names = [files] if whole else files.split("+")
    return "+".join(os.path.realpath(local_path(name)) for name in names)
