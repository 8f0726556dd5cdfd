"""The run command. Hydra composes conf/ and the overrides into one `RunConfig`, which is passed to the pipeline.

No other module uses Hydra. Hydra creates no folder and no log here. A run's folder is derived from its settings, so that the
same command finds its own results, and ranks above 0 of a distributed run write nothing.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import os
import re
import shlex
import shutil
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import hydra
import yaml
from hydra import version as hydra_version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from loftq_exp import ranks
from loftq_exp.commands.launchers import check_launcher, chosen, launched
from loftq_exp.commands.planned import AUTO, COMPOSE_ERRORS, recorded, run_config
from loftq_exp.commands.sweep import SWEEP_FOLDER, Refused, Request, Sweep, request
from loftq_exp.commands.terminal import exit_code, log_to, only_rank_0_speaks, quiet_libraries
from loftq_exp.config import RunConfig, TaskConfig
from loftq_exp.config.schema import check_encoding, check_secret, defaults, dotted_names, nearest
from loftq_exp.errors import UserError
from loftq_exp.masking import mask_output
from loftq_exp.report.places import JOB
from loftq_exp.tasks.outside import import_named

if TYPE_CHECKING:
    from loftq_exp.pipeline import RunResult

log = logging.getLogger(__name__)

GROUPS = ("model", "quant", "task", "train", "experiment")
CLOSED = "standard output was closed by its reader; finished work is kept; run the same command again, with its output in a file"
OF_THE_RUN = ("model", "quant", "calibration", "initialise", "seed", "save_dtype", "save_format", "save_dir")
"""Groups and settings that `score_run` takes from that run."""
KNOWN_ELSEWHERE = {
    "train.lr": "did you mean 'train.learning_rate'?",
    "train.packing": "task=instruct has task.packing",
    "train.seed": "did you mean 'seed'?",
    "quant.r": "did you mean 'quant.rank'?",
    "quant.modules": "did you mean 'quant.target_modules'?",
    "logger": "did you mean 'train.report_to'? Every run logs to TensorBoard in its folder, and metrics.json has all numbers",
}
"""What replaces a setting that other tools have."""


def conf_dir() -> Path:
    """Return the folder of YAML choices: conf/ of a checkout if there is one, else the copy inside the wheel.

    The checkout takes precedence, because an editable install may hold a stale copy.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    if (package.parent / "pyproject.toml").is_file() and (checkout / "config.yaml").is_file():
        return checkout
    return package / "conf"


def _choices(group: str, names: str = "*") -> list[str]:
    """Return the choices in a folder of conf/ whose names match."""
    return sorted(path.stem for path in (conf_dir() / group).glob(f"{names}.yaml"))


# For --help: Hydra's own list would name all of the paper's rows, which is longer than the rest of the page.
OmegaConf.register_new_resolver("choices", lambda *group: ", ".join(_choices(*group)), replace=True)
# First in the defaults list of conf/config.yaml. It puts every setting into the composed tree, including those that no file
# of conf/ names, so that overrides need no +. The task's settings depend on the chosen task.
ConfigStore.instance().store("schema", defaults(RunConfig))


def _names() -> tuple[str, ...]:
    """Return every name that an override may set."""
    return (*dotted_names(RunConfig), *GROUPS)


def _store_tasks(*folders: Path) -> None:
    """Put the settings of all known tasks into Hydra's store. A task without a file in `folders` needs none."""
    store = ConfigStore.instance()
    for kind, settings in TaskConfig.variants().items():
        store.store(kind, defaults(settings), group="schema_of_task", package="task")
        if not any((folder / "task" / f"{kind}.yaml").is_file() for folder in folders):
            store.store(kind, {"kind": kind}, group="task")


_store_tasks(conf_dir())


def _import_tasks(folder: Path) -> None:
    """Import the modules that the task files in --config-dir name. Raises UserError if one cannot be imported."""
    for file in sorted((folder / "task").glob("*.yaml")):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("module"), str):
            import_named(values["module"], folder)
    _store_tasks(conf_dir(), folder)


def main(argv: Sequence[str] | None = None, resumed: Path | None = None, retries: bool = False) -> int:
    """Run the command with `argv`, by default the process's arguments. Returns 0 if every job succeeded.

    `resumed` is the folder of a multirun with these arguments that is to go on, with its failed jobs if `retries`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    request.set(Request(tuple(arguments), resumed, retries))
    _set_up_output()
    only_rank_0_speaks()
    threading.excepthook = _report_thread
    os.environ.pop(SWEEP_FOLDER, None)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised here and reported in one line
    return exit_code(lambda: _work(arguments), _how_to_go_on, CLOSED)


def _set_up_output() -> None:
    """Print logs and silence libraries. A job in a process of a launcher needs this too."""
    mask_output()
    log_to(sys.stdout)
    quiet_libraries()


def _how_to_go_on() -> str:
    sweep = Sweep.current()
    if sweep is None:
        return "finished work is kept; run the same command again to resume"
    return f"{sweep.progress()}; go on with: loftq-exp sweep resume {shlex.quote(str(sweep.folder))}"


def _work(arguments: list[str]) -> int:
    for composed in _composed(arguments):
        _run(run_config(composed))
    if SWEEP_FOLDER in os.environ and not _report_sweep(Path(os.environ[SWEEP_FOLDER])):
        raise UserError("not every job succeeded; the failed jobs and their errors are listed above; to run them again: "
                        f"loftq-exp sweep resume {shlex.quote(os.environ[SWEEP_FOLDER])} --failed")  # fmt: skip
    return 0


def _composed(arguments: list[str]) -> list[DictConfig]:
    """Return the composed tree of a single run. Empty if Hydra ran the jobs of a multirun or printed a page."""
    single: list[DictConfig] = []
    parser, options = _parsed(arguments)
    hydra_version.setbase("1.3")
    try:
        if options.config_dir:
            _import_tasks(Path(options.config_dir))
        # As `hydra.main`, which however can only read arguments from sys.argv.
        with launched(chosen(options.overrides)):
            _run_hydra(options, parser, functools.partial(_job, single=single), str(conf_dir()), "config")
    except UserError:
        _remove_empty_sweep()
        raise
    except Refused as refused:
        raise refused.reason from None
    except COMPOSE_ERRORS as error:
        _remove_empty_sweep()
        raise UserError(_explain(error, arguments)) from error
    except BrokenPipeError:  # of a page that is printed, such as --cfg job
        raise
    except OSError as error:
        place = os.environ.get(SWEEP_FOLDER, ".")
        raise UserError(f"output_dir: {place} cannot be written ({error.strerror}); set another output_dir") from error
    return single


def _parsed(arguments: list[str]) -> tuple[ArgumentParser, Namespace]:
    """Parse the arguments with Hydra's parser. -m may be anywhere, and an unknown flag is an error in one line."""
    parser = get_args_parser()
    parser.error = _unknown_flag  # type: ignore[method-assign]
    options = parser.parse_intermixed_args(arguments)
    if options.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not supported; use python -m loftq_exp.rerun RUN_DIR")
    if ranks.count() > 1 and (options.multirun or "hydra.mode=MULTIRUN" in options.overrides):
        raise UserError("-m: not supported with several processes, because each would run the whole sweep; "
                        "launch single runs, or run without the launcher")  # fmt: skip
    check_launcher(options.overrides)
    for name, _, value in (override.partition("=") for override in options.overrides):
        check_secret(name.lstrip("+"), value)  # a multirun records its overrides before it composes them
        check_encoding(name.lstrip("+"), value)  # Hydra's grammar has no such characters
    options.overrides = _overrides(options.overrides)
    return parser, options


def _overrides(given: Sequence[str]) -> list[str]:
    """Return the overrides as Hydra accepts them. A model.path without a choice of model is of the group `auto`."""
    names = {re.split("[=@]", each.lstrip("+~"), maxsplit=1)[0]: each for each in given}
    if names.get("score_run", "").partition("=")[2] not in ("", "null"):
        for name, each in names.items():
            if name.split(".")[0] in OF_THE_RUN:
                raise UserError(
                    f"{each}: with score_run the model and its initialisation are those of that run; leave it out"
                )
    added = [AUTO] if "model.path" in names and not names.keys() & {"model", "experiment"} else []
    return [*added, *map(_plain, given)]


def _plain(override: str) -> str:
    """Return an override of a known setting in the form that Hydra accepts, with or without a leading +.

    Hydra cannot add what is in the composed tree, nor set what is not in it, such as a setting of another task.
    """
    known = re.match(r"(?:\+\+?)?([^+=~]+)=", override)
    if not known or known[1] not in _names():
        return override
    name = override.lstrip("+")
    return f"++{name}" if name.startswith("task.") else name


def _unknown_flag(message: str) -> NoReturn:
    raise UserError(f"{message}; give settings as NAME=VALUE, see --help")


def _remove_empty_sweep() -> None:
    """Remove the folder of a multirun without any job."""
    folder = os.environ.get(SWEEP_FOLDER)
    if folder and not list(Path(folder).glob(JOB)):
        shutil.rmtree(folder, ignore_errors=True)


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """Report an exception in a thread, except OSError: TensorBoard's thread passes that (a full disk) to the run."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _job(composed: DictConfig, single: list[DictConfig]) -> float | None:
    """Store the composed tree of a single run in `single`, or run the job of a multirun. Called by Hydra.

    Return the job's objective to the sweeper: NaN if the job failed, None if no objective is set. A sweeper that searches gets
    an error for a failed job instead, because it may not accept NaN.
    """
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        single.append(composed)
        return None
    searches = not str(job.sweeper["_target_"]).endswith(".BasicSweeper")
    named = composed.get("objective")
    if searches and named is None:
        raise UserError(
            "objective=null: hydra/sweeper searches for the best score; add objective=NAME, such as objective=nll"
        )
    _set_up_output()
    folder = Path(job.sweep.dir)
    metrics = _outcome(composed, folder, job.job.num, recorded(job.overrides.task))
    if metrics is None and searches:
        raise UserError(
            f"job {job.job.num}: failed with the error above; correct it, or go on after failed jobs with "
            "hydra.sweeper.max_failure_rate=1"
        )
    if named is None:
        return None
    return metrics["scores"][named] if metrics else math.nan


def _outcome(composed: DictConfig, folder: Path, number: int, overrides: list[str]) -> dict[str, Any] | None:
    """Return the metrics of a job, which is run if it was not before; None if it failed, as its record says."""
    from loftq_exp.device import release_memory  # imported late: it takes seconds
    from loftq_exp.pipeline import settled
    from loftq_exp.report.sweep import record_job

    sweep = Sweep.read(folder)
    assert sweep
    os.chdir(sweep.place)  # a worker of a cluster may start elsewhere
    if known := sweep.decided(number, overrides, lambda: settled(run_config(composed))):
        return cast("dict[str, Any] | None", known["metrics"])
    # A failed job is recorded and reported at the end. The others continue.
    with record_job(folder, number, overrides) as outcome:
        config = run_config(composed)
        outcome.config = config.to_dict()
        outcome.metrics = _run(config).metrics
    release_memory()
    log.info("sweep: %s", sweep.progress())
    return outcome.metrics


def _run(config: RunConfig) -> RunResult:
    from loftq_exp.pipeline import run  # imported late: it takes seconds

    return run(config)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the settings that the command would compose from `overrides`, for use in Python: `run(compose(["quant.bits=2"]))`.

    Args:
        overrides: as on the command line, one per string.

    Returns:
        The settings, checked and frozen. No model or data is read, and nothing is written.

    Raises:
        UserError: for any error in the settings, in one line.
    """
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return run_config(hydra.compose("config", overrides=_overrides(overrides)))
    except COMPOSE_ERRORS as error:
        raise UserError(_explain(error, list(overrides))) from error


def _report_sweep(folder: Path) -> bool:
    from loftq_exp.report.sweep import report_sweep

    _remove_empty_sweep()
    return report_sweep(folder)


def _explain(error: Exception, arguments: list[str]) -> str:
    """Return one line for an error of Hydra or OmegaConf, with the invalid name and the nearest valid one."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if "/" in group and group.split("/")[0] == "model":  # a hub id, model=OWNER/NAME
            given = str(error.missing_cfg_file).removeprefix("model/")
            return f"model={given}: model= chooses a file of conf/model; for a hub id or folder give model.path={given}"
        return f"{group}={choice}: there is no such choice; {nearest(choice, error.options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{str(error.override).lstrip('+')}: not readable as NAME=VALUE; write a list as [A,B], and quote text with spaces, "
            "brackets, commas or ~: 'NAME=\"A TEXT\"'"
        )
    if "interpolation '${task}'" in str(error):  # in conf/config.yaml, after ~task removed the group
        return "task.kind: no value is set and there is no default; give task=NAME"
    if several := re.match("Ambiguous value for argument '(.+?)'", str(error)):
        return f"{several[1].lstrip('+')}: several values; add -m to run each of them, or write a list as [A,B]"
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            continue
        key, value = re.split("[=@]", argument.lstrip("+~"), maxsplit=1)
        if not key.startswith("hydra") and key not in _names():
            return f"{argument}: there is no such setting; {KNOWN_ELSEWHERE.get(key) or _nearest_setting(key)}"
        choices = _choices(key)
        if isinstance(error, ValueError) and key in GROUPS and value not in choices:  # not text, such as model=null
            return f"{argument}: there is no such choice; {nearest(value, choices)}"
    return str(error)


def _nearest_setting(key: str) -> str:
    """As `nearest`, and also accepts the last part of a dotted name (`rank` for `quant.rank`)."""
    names = _names()
    last_parts = {name.rpartition(".")[2]: name for name in names}
    found = difflib.get_close_matches(key, GROUPS, n=1, cutoff=0.8)  # modle is no task.module
    found = found or difflib.get_close_matches(key, [*names, *last_parts], n=1)
    return f"did you mean '{last_parts.get(found[0], found[0])}'?" if found else "--cfg job shows all of them"
