"""Launchers of a multirun that come as extras."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from loftq_exp.errors import UserError

_LAUNCHERS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_submitit_launcher", "submitit"),
    "submitit_slurm": ("hydra_submitit_launcher", "submitit"),
    "ray": ("hydra_ray_launcher", "ray"),
}
"""Each launcher with its package in hydra_plugins and the extra that installs it."""


def check_launcher(overrides: Iterable[str]) -> None:
    """Raise UserError if the overrides choose a launcher that is not installed."""
    for override in overrides:
        group, _, name = override.partition("=")
        if group == "hydra/launcher" and name in _LAUNCHERS and not is_installed(name):
            raise UserError(f"{override}: not installed; run: pip install 'loftq_exp[{_LAUNCHERS[name][1]}]'")


def is_installed(launcher: str) -> bool:
    """Return whether a launcher's package is installed."""
    try:
        return importlib.util.find_spec(f"hydra_plugins.{_LAUNCHERS[launcher][0]}") is not None
    except ModuleNotFoundError:  # there is no launcher at all
        return False
