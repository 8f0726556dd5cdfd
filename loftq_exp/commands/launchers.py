"""Launchers of a multirun that come as extras: whether one is installed, and what to do when its jobs die or are interrupted."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from loftq_exp.commands.sweep import SWEEP_FOLDER, Sweep
from loftq_exp.errors import UserError
from loftq_exp.report.places import JOB

log = logging.getLogger(__name__)

_LAUNCHERS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_submitit_launcher", "submitit"),
    "submitit_slurm": ("hydra_submitit_launcher", "submitit"),
    "ray": ("hydra_ray_launcher", "ray"),
}
"""Each launcher with its package in hydra_plugins and the extra that installs it."""
SUBMITTED = ".submitit"
"""The folder in a multirun's with a folder for each job that submitit submitted, named by its number."""
_SECONDS = 2.0
"""Between two looks at the jobs."""
_GRACE = 8.0
"""Seconds in which a job of submitit_local may end by itself after Ctrl-C."""


def chosen(overrides: Iterable[str]) -> str | None:
    """Return the launcher of these that the overrides choose; None if they choose none."""
    names = [each.partition("=")[2] for each in overrides if each.startswith("hydra/launcher=")]
    return next((name for name in names if name in _LAUNCHERS), None)


def check_launcher(overrides: Iterable[str]) -> None:
    """Raise UserError if the overrides choose a launcher that is not installed."""
    name = chosen(overrides)
    if name and not is_installed(name):
        raise UserError(f"hydra/launcher={name}: not installed; run: pip install 'loftq_exp[{_LAUNCHERS[name][1]}]'")


def is_installed(launcher: str) -> bool:
    """Return whether a launcher's package is installed."""
    try:
        return importlib.util.find_spec(f"hydra_plugins.{_LAUNCHERS[launcher][0]}") is not None
    except ModuleNotFoundError:  # there is no launcher at all
        return False


@contextlib.contextmanager
def launched(launcher: str | None) -> Iterator[None]:
    """Show the progress of jobs whose output goes to files, and end them on Ctrl-C.

    If the launcher fails, such as when a job's process is killed, log its reason once the other jobs have ended. Raises
    UserError with the reason if no job has a record, such as when a queue accepts none.
    """
    ended = threading.Event()
    watch = threading.Thread(target=_show_progress, args=(ended,), daemon=True)
    if launcher and launcher.startswith("submitit"):
        watch.start()
    try:
        yield
    except KeyboardInterrupt:
        for job in _submitted(launcher):
            job.cancel(check=False)
        raise
    except Exception as error:
        if launcher is None or isinstance(error, UserError) or not _is_of_launcher(error):
            raise
        for job in _submitted(launcher):
            job.wait()
        reason = f"hydra/launcher={launcher}: {type(error).__name__}: {_reason(error)}"
        if not list(Path(os.environ[SWEEP_FOLDER]).glob(JOB)):
            raise UserError(reason) from error
        log.error("%s", reason)
    finally:
        ended.set()


def _show_progress(ended: threading.Event) -> None:
    """Log how many jobs are done each time that a job has ended."""
    known = 0
    while not ended.wait(_SECONDS):
        sweep = Sweep.current()
        if sweep and (recorded := len(list(sweep.folder.glob(JOB)))) != known:
            known = recorded
            log.info("sweep: %s", sweep.progress())


def _submitted(launcher: str | None) -> Sequence[Any]:
    """Return the jobs that submitit started for this multirun since it began or was resumed."""
    sweep = Sweep.current()
    if sweep is None or launcher is None or not launcher.startswith("submitit"):
        return ()
    folder = sweep.folder / SUBMITTED
    found = [path for path in folder.glob("[0-9]*") if path.is_dir() and path.stat().st_mtime >= sweep.began]
    numbers = [path.name for path in found if re.fullmatch(r"\d+(_\d+)?", path.name)]
    if launcher == "submitit_slurm":
        import submitit

        return [submitit.SlurmJob(folder=folder / "%j", job_id=number, tasks=[0]) for number in numbers]
    return [_Child(int(number)) for number in numbers]


class _Child:
    """A job of submitit_local: a child of this process. submitit itself forgets it when it raises."""

    def __init__(self, number: int) -> None:
        import psutil

        self._processes = [child for child in psutil.Process().children() if child.pid == number]

    def cancel(self, check: bool) -> None:
        import psutil

        # Ctrl-C of a terminal reaches it too. A second signal would keep it from ending the job.
        _, running = psutil.wait_procs(self._processes, timeout=_GRACE)
        for process in running:
            process.send_signal(signal.SIGINT)  # it passes this on to the job; both ignore SIGTERM

    def wait(self) -> None:
        for process in self._processes:
            process.wait()


def _is_of_launcher(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__", "")).startswith("hydra_plugins.") for frame, _ in frames)


def _reason(error: Exception) -> str:
    """Return the error's text in one line, without the output of a job that some launchers add."""
    text = re.split(r"Traceback \(most recent call last\)|-{8}", str(error))[0]
    return " ".join(text.split())[:400]
