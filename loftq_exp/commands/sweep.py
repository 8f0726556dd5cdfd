"""The folder of a multirun: what was asked for, which jobs are done, and how a multirun that was cut short goes on.

`sweep.json` holds the arguments and the list of jobs. The outcome of each job is a file beside it, see
`loftq_exp.report.sweep`. The process that starts a multirun holds a lock in the folder for as long as it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from loftq_exp.commands.planned import check_baseline, check_objective, planned, recorded
from loftq_exp.config import RunConfig, local_path
from loftq_exp.config.schema import RESULTS, shaping
from loftq_exp.errors import UserError
from loftq_exp.report.places import JOB, PLAN, job_file
from loftq_exp.whole import read_object, write_whole

log = logging.getLogger(__name__)

SWEEP_FOLDER = "LOFTQ_EXP_SWEEP"
"""Environment variable with the folder of this process's multirun."""
_LOCK = ".running.lock"
_HOW = ("hydra/launcher=", "hydra.launcher.")
"""Overrides that change how the jobs are run, and no job."""


@dataclass(frozen=True)
class Sweep:
    """What a multirun was asked for, as sweep.json holds it.

    Attributes:
        folder: the folder of the multirun.
        arguments: the command's arguments, as typed.
        place: the working directory, from which relative paths in the arguments start.
        jobs: the overrides of each job, in order; None if the sweeper chooses them as it goes.
        began: when it was started or last resumed, in seconds since the epoch.
        retries: whether jobs that failed before `began` are run again.
        direction: of a search, whether it should `minimize` or `maximize` the objective; None if the jobs are given.
    """

    folder: Path
    arguments: tuple[str, ...]
    place: str
    jobs: tuple[tuple[str, ...], ...] | None
    began: float
    retries: bool = False
    direction: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Sweep | None:
        """Return the multirun in `folder`; None if there is none."""
        found = read_object(folder / PLAN)
        try:
            jobs = None if found["jobs"] is None else tuple(tuple(job) for job in found["jobs"])
            given = tuple(found["arguments"]), found["place"], jobs, found["began"], found["retries"]
            return cls(folder, *given, found.get("direction"))
        except (KeyError, TypeError):
            return None

    @classmethod
    def current(cls) -> Sweep | None:
        """Return the multirun of this process; None if it runs none."""
        folder = os.environ.get(SWEEP_FOLDER)
        return cls.read(Path(folder)) if folder else None

    def write(self) -> None:
        """Write sweep.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in dataclasses.asdict(self).items() if name != "folder"}
        write_whole(self.folder / PLAN, json.dumps(content, indent=1) + "\n")

    def repeats(self, other: Sweep) -> bool:
        """Return whether both have the same jobs, asked for in the same way from the same place."""
        return self.jobs is not None and self._asked == other._asked

    @property
    def _asked(self) -> tuple[Any, ...]:
        return tuple(each for each in self.arguments if not each.startswith(_HOW)), self.place, self.jobs

    def outcome(self, number: int, overrides: Sequence[str]) -> dict[str, Any] | None:
        """Return the recorded outcome of a job with its `error` or `metrics`; None if it has none."""
        found = read_object(self.record(number))
        return found if found.get("overrides") == list(overrides) else None

    def record(self, number: int) -> Path:
        """Return the path of the file with the outcome of the job of this number."""
        return self.folder / job_file(number)

    @property
    def outcomes(self) -> Iterator[dict[str, Any]]:
        """The recorded outcomes of its jobs."""
        for number, overrides in enumerate(self.jobs or ()):
            if found := self.outcome(number, overrides):
                yield found

    @property
    def states(self) -> Counter[str]:
        """How many jobs are `done`, have `failed`, or are `missing`."""
        states = Counter("failed" if outcome["error"] else "done" for outcome in self.outcomes)
        return states + Counter(missing=len(self.jobs or ()) - states.total())

    @property
    def complete(self) -> bool:
        """Whether every job is done."""
        return self.states["done"] == len(self.jobs or ())

    def decided(
        self, number: int, overrides: Sequence[str], composed: Callable[[], RunConfig]
    ) -> dict[str, Any] | None:
        """Return the recorded outcome of a job if it need not run: it is done, or failed and is not to be run again.

        A job whose settings or input files changed since must run; the run's own keys then decide what is computed.
        """
        found = self.outcome(number, overrides)
        if found is None:
            return None
        recorded = self.record(number).stat().st_mtime
        if found["error"]:
            return None if self.retries and recorded < self.began else found
        with contextlib.suppress(UserError):  # raised again when the job is run
            config = composed()
            same = json.loads(json.dumps(config.to_dict())) == found["metrics"]["config"]
            if same and _newest_input(config) < recorded:
                return found
        log.info("\njob %d: done before, but its settings or its files changed since", number)
        return None

    def progress(self) -> str:
        """Return how many jobs are done, and the time left at the pace since `began`."""
        if self.jobs is None:
            return f"{len(list(self.folder.glob(JOB)))} jobs recorded"
        states, elapsed = self.states, time.time() - self.began
        now = sum(path.stat().st_mtime >= self.began for path in self.folder.glob(JOB))
        left = states["missing"]
        text = f"{states['done']} of {len(self.jobs)} jobs done"
        text += f", {states['failed']} failed" if states["failed"] else ""
        return text + (f", about {_duration(elapsed / now * left)} left" if now and left else "")


@dataclass(frozen=True)
class Request:
    """The arguments of the command in this process; for a resumed multirun also its folder, and whether failed jobs run again."""

    arguments: tuple[str, ...]
    folder: Path | None = None
    retries: bool = False


request: ContextVar[Request] = ContextVar("request")
"""What this process was asked for. Hydra creates the callback, so that this cannot be passed to it."""


class Refused(BaseException):
    """Passes a UserError through Hydra, which turns the exceptions of a callback into warnings."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class SweepFolder(Callback):
    """Sets a multirun's folder once, so that jobs in other processes of a launcher belong to the same sweep."""

    def __init__(self) -> None:
        self.lock: FileLock | None = None

    def __reduce__(self) -> tuple[type[SweepFolder], tuple[()]]:
        """Leave the lock out: launchers send the callbacks to other processes."""
        return SweepFolder, ()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Choose the folder, see `start`, and make it that of every job, in whatever process or machine."""
        asked = request.get()
        sweeps = local_path(config.output_dir).resolve() / "sweeps"
        given = planned(config)
        jobs = None if given is None else tuple(tuple(recorded(job)) for job in given)
        direction = None if jobs is not None else str(config.hydra.sweeper.get("direction") or "minimize")
        plan = Sweep(sweeps, asked.arguments, str(Path.cwd()), jobs, time.time(), asked.retries, direction)
        try:
            check_baseline(config, given or ())
            check_objective(config, [()] if given is None else given)
            sweep, self.lock = start(sweeps, plan, asked.folder)
            if jobs is not None and len(jobs) == 1:
                log.info(
                    "-m: one job, because no setting has several values; to run several give NAME=A,B, such as quant.rank=8,16"
                )
        except UserError as error:
            raise Refused(error) from None
        except OSError as error:
            reason = f"{error.filename} cannot be written ({error.strerror})"
            raise Refused(UserError(f"output_dir: {reason}; set another output_dir")) from error
        os.environ[SWEEP_FOLDER] = str(sweep.folder)
        with open_dict(config.hydra):
            config.hydra.sweep.dir = str(sweep.folder)
        with read_write(config.hydra.overrides.hydra):
            config.hydra.overrides.hydra.append(
                f"hydra.sweep.dir={_quoted(str(sweep.folder))}"
            )  # jobs are composed from these

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Drop the job's settings, 0.2 MB, from its result, which the launcher and the sweeper keep for all jobs."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Release the folder."""
        if self.lock:
            self.lock.release()
            Path(self.lock.lock_file).unlink(missing_ok=True)


def start(sweeps: Path, asked: Sweep, folder: Path | None) -> tuple[Sweep, FileLock]:
    """Return the multirun to run, with its lock held: that in `folder`, else one in `sweeps` that was cut short, else a new one.

    Raises UserError if the one in `folder` runs elsewhere, or if its arguments now give other jobs.
    """
    earlier = Sweep.read(folder) if folder else _latest(sweeps, asked)
    if folder and not (earlier and earlier.repeats(asked)):
        raise UserError(f"{folder}: its arguments give other jobs than at its start, because conf/ changed; "
                        "run its command again as a new sweep")  # fmt: skip
    lock = _locked(earlier.folder) if earlier else None
    if folder and lock is None:
        raise UserError(f"{folder}: is running; wait for it, or end that process first")
    if earlier and lock:
        sweep = dataclasses.replace(asked, folder=earlier.folder)
        states = sweep.states
        log.info("sweep %s goes on: %d of %d jobs done, %d failed, %d missing", sweep.folder, states["done"],
                 len(sweep.jobs or ()), states["failed"], states["missing"])  # fmt: skip
    else:
        # Microseconds, so that sweeps started in the same second differ.
        named = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        sweep = dataclasses.replace(asked, folder=sweeps / named)
        sweep.folder.mkdir(parents=True)
        lock = _locked(sweep.folder)
    sweep.write()
    assert lock
    return sweep, lock


def _latest(sweeps: Path, asked: Sweep) -> Sweep | None:
    """Return the latest multirun in `sweeps` that `asked` repeats, if a job of it is not done."""
    for folder in sorted(sweeps.glob("*/"), reverse=True):
        found = Sweep.read(folder)
        if found and found.repeats(asked):
            return None if found.complete else found
    return None


def _locked(folder: Path) -> FileLock | None:
    """Return the lock of a multirun's folder, held; None if another process holds it."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _newest_input(config: RunConfig) -> float:
    """Return when the files that the settings name were last changed, in seconds since the epoch; 0 if there are none.

    This is the time of the change on this file system, which a copy cannot carry along.
    """
    named = [config.model.path, config.quant.path, *shaping(config, *RESULTS, mark="locates").values()]
    paths = [Path(name).expanduser() for name in named if isinstance(name, str)]
    inside = [inner for path in paths if path.is_dir() for inner in path.rglob("*")]
    return max((path.stat().st_ctime for path in (*paths, *inside) if path.exists()), default=0.0)


def _quoted(text: str) -> str:
    """Return `text` quoted for Hydra, in which a backslash is special only before a quote."""
    inner = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{inner}'"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
