"""The three results of a run and the key of each, by content: of all that shapes it and of nothing else.

A setting says in the schema which results it shapes. The initialisation's key is made in loftq_exp.initialise.key.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp import ranks
from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig, digest_of, local_path
from loftq_exp.config.schema import ADAPTER, INITIALISATION, SCORES, shaping
from loftq_exp.initialise.key import content_in, init_dir, made_from, named_by
from loftq_exp.initialise.published import source_of
from loftq_exp.source.content import Content
from loftq_exp.source.locate import Source
from loftq_exp.training.origin import adapter_digest, rows_digest

_RUN_DIGITS = 8


@dataclass(frozen=True)
class Identity:
    """What a run starts from, by key, and where its results lie."""

    init_key: str
    init_dir: Path
    run_dir: Path


def identify(config: RunConfig, start: Source | Initialised | None = None) -> Identity:
    """The keys and places of a run that starts from a source or an initialised checkpoint; None: from `source_of(config)`."""
    if isinstance(start, Initialised):
        report = start.report
        key = str(report.get("key") or digest_of(report))  # an export has none
        return Identity(key, start.folder, _run_dir(config, content_in(report)))
    made = made_from(start or source_of(config), config)
    key = digest_of(made)
    return Identity(key, init_dir(config, key), _run_dir(config, made["source"]))


def adapter_key(init_key: str, rows: Iterable[dict[str, Any]], config: RunConfig) -> str:
    """The key of the adapter that is trained from an initialisation on `rows`, as they are used."""
    several = [ranks.count()] if ranks.count() > 1 else []  # each rank trains on a batch of its own
    return digest_of([init_key, rows_digest(rows), shaping(config, ADAPTER), *several])


def scores_key(init_key: str, adapter: Path | None, rows: Iterable[dict[str, Any]], config: RunConfig) -> str:
    """The key of the scores on `rows`, as they are used, of an `adapter`, whoever wrote it; None: of the initial factors."""
    settings = shaping(config, SCORES)
    if adapter is None and config.model.kind == "classification":
        settings |= {"seed": config.seed}  # a head of another number of classes than the checkpoint's is drawn from it
    return digest_of([init_key, adapter_digest(adapter) if adapter else None, rows_digest(rows), settings])


def _run_dir(config: RunConfig, content: Content) -> Path:
    """The run's folder: it follows from all that shapes the initialisation or the adapter, rows aside.

    Where training rows lie is part of it, so that a sweep over files makes a folder for each. Other rows in the same file
    come back to the same folder, where their adapter replaces the earlier one.
    """
    rows = {name: _resolved(value) if name.endswith("_file") else value
            for name, value in shaping(config, ADAPTER, mark="locates").items()}  # fmt: skip
    digest = digest_of([content, shaping(config, INITIALISATION, ADAPTER), rows])[:_RUN_DIGITS]
    return named_by(config.runs_path, config.label, digest)


def _resolved(files: str) -> str:
    """The files that `+` joins, each by its absolute path."""
    whole = os.path.exists(local_path(files))  # noqa: PTH110  # of a name that is too long, Path.exists raises
    names = [files] if whole else files.split("+")
    return "+".join(os.path.realpath(local_path(name)) for name in names)
