"""The jobs of a multirun before any of them runs: their overrides and settings, and whether its baseline and objective can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError)
"""What Hydra raises for settings that it cannot compose. ValueError is for a choice that is not text, such as model=null."""

AUTO = "model=auto"
"""The group that the command adds to a model.path without one."""


def recorded(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a job as its record and the plan of its sweep have them: without what the command adds."""
    return [each.lstrip("+") for each in overrides if each != AUTO]


def planned(config: DictConfig) -> tuple[tuple[str, ...], ...] | None:
    """Return the overrides of each job as Hydra composes them; None if the sweeper chooses them as it goes, or refuses these."""
    sweeper = config.hydra.sweeper
    if sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return None
    # Not resolved: in calibration.seed=${seed} the seed is that of the job.
    task = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    params = OmegaConf.to_container(sweeper.params or OmegaConf.create(), resolve=False)
    given = [*(f"{name}={value}" for name, value in cast("dict[str, Any]", params).items()), *cast("list[str]", task)]
    try:
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException:
        return None
    return tuple(map(tuple, jobs))


def check_baseline(config: DictConfig, jobs: Sequence[tuple[str, ...]]) -> None:
    """Raise UserError if no job of a multirun matches report.baseline. A job whose settings are refused matches nothing."""
    if config.report.baseline is None and not any("report.baseline=" in each for job in jobs for each in job):
        return
    from loftq_exp.report.collect import from_settings  # imported late: they take seconds
    from loftq_exp.report.sweep import with_baseline

    found = [from_settings(Path("config.json"), each.to_dict(), "unfinished") for each in _composed(config, jobs)]
    if found:
        with_baseline([run for run in found if run])


def check_objective(config: DictConfig, jobs: Sequence[tuple[str, ...]]) -> None:
    """Raise UserError if no job of a multirun has the score that it names as objective."""
    if config.objective is None and not any("objective=" in each for job in jobs for each in job):
        return
    from loftq_exp.run_data import load_scored  # imported late: it takes seconds

    refused = None
    for composed in _composed(config, jobs):
        try:
            load_scored(composed)
            return
        except UserError as error:
            refused = error
    if refused:
        raise refused


def _composed(config: DictConfig, jobs: Sequence[tuple[str, ...]]) -> Iterator[RunConfig]:
    """The settings of each job. One that is refused is left out: it is refused again when it is run."""
    loader = GlobalHydra.instance().config_loader()
    for job in jobs:
        with contextlib.suppress(UserError, *COMPOSE_ERRORS):
            composed = loader.load_sweep_config(config, list(job))
            own = OmegaConf.masked_copy(composed, [str(name) for name in composed if name != "hydra"])
            yield run_config(own)


def run_config(composed: DictConfig) -> RunConfig:
    """Return the settings of a run from Hydra's tree. Raises UserError for any error in them."""
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        name = error.full_key
        raise UserError(f"{name}: no value is set and there is no default; give {name}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from error
    return RunConfig.from_mapping(cast("dict[str, Any]", values))
