"""The command. Hydra composes conf/ and the overrides; what comes out is one `RunConfig`, handed to the pipeline.

Nothing else knows Hydra. Hydra creates no folder and no log here: a run's folder follows from its settings, so that the
same command comes back to its own results, and so that ranks above 0 of a distributed run write nothing.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import logging
import os
import re
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
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loftq_exp import ranks
from loftq_exp.commands.terminal import exit_code, only_rank_0_speaks, quiet_libraries
from loftq_exp.config import RunConfig, TaskConfig, local_path
from loftq_exp.config.schema import defaults, dotted_names, nearest
from loftq_exp.errors import UserError

if TYPE_CHECKING:
    from loftq_exp.pipeline import RunResult

SWEEP_FOLDER = "LOFTQ_EXP_SWEEP"
"""Environment variable with the folder of the multirun that this process belongs to."""
GROUPS = ("model", "quant", "task", "train", "experiment")
NAMES = (*dotted_names(RunConfig), *GROUPS)
"""Every name that an override may set."""
_REFUSALS = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError)
"""What Hydra raises for settings that it cannot compose; ValueError for a choice that is no text, such as model=null."""


def conf_dir() -> Path:
    """The folder of YAML choices: a checkout's own conf/ where there is one, else the copy inside the wheel.

    The checkout wins because an editable install may carry a stale copy of a force-included folder.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    if (package.parent / "pyproject.toml").is_file() and (checkout / "config.yaml").is_file():
        return checkout
    return package / "conf"


def _choices(group: str, names: str = "*") -> list[str]:
    """The choices of a folder of conf/ whose names match."""
    return sorted(path.stem for path in (conf_dir() / group).glob(f"{names}.yaml"))


# For the page that --help shows: Hydra's own list would name all of the paper's rows, more lines than the rest of the page.
OmegaConf.register_new_resolver("choices", lambda *group: ", ".join(_choices(*group)), replace=True)
# First in conf/config.yaml's defaults list: every setting is in the composed tree, also one that no file of conf/ names, and
# an override sets it without a +. The task's settings follow from the task that is chosen.
ConfigStore.instance().store("schema", defaults(RunConfig))
for _kind, _settings in TaskConfig.variants().items():
    ConfigStore.instance().store(_kind, defaults(_settings), group="schema_of_task", package="task")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, without them those of the process; returns 0 when every job succeeded."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    quiet_libraries()
    only_rank_0_speaks()
    threading.excepthook = _tell_of_thread
    os.environ.pop(SWEEP_FOLDER, None)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back here and are reported in one line
    return exit_code(lambda: _work(arguments), "finished work is kept, and the same command goes on from there")


def _work(arguments: list[str]) -> int:
    for composed in _composed(arguments):
        _run(composed)
    if SWEEP_FOLDER in os.environ and not _report_sweep(Path(os.environ[SWEEP_FOLDER])):
        raise UserError("not every job succeeded: the table above names those that failed, and why")
    return 0


def _composed(arguments: list[str]) -> list[DictConfig]:
    """The composed tree of a single run; none where Hydra ran the jobs of a multirun, or showed a page, by itself."""
    single: list[DictConfig] = []
    parser, options = _parsed(arguments)
    hydra_version.setbase("1.3")
    try:
        # What `hydra.main` does, but for the arguments: that reads them from sys.argv, and no others.
        _run_hydra(options, parser, functools.partial(_job, single=single), str(conf_dir()), "config")
    except _REFUSALS as error:
        _forget_empty_sweep()
        raise UserError(_explain(error, arguments)) from error
    except OSError as error:
        place = os.environ.get(SWEEP_FOLDER, ".")
        raise UserError(f"output_dir: {place} cannot be written ({error.strerror}); set another output_dir") from error
    return single


def _parsed(arguments: list[str]) -> tuple[ArgumentParser, Namespace]:
    """Hydra's parser and what it makes of the arguments: -m may stand anywhere, and a wrong flag is refused in one line."""
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    options = parser.parse_intermixed_args(arguments)
    if options.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not supported; use python -m loftq_exp.rerun RUN_DIR")
    if ranks.count() > 1 and (options.multirun or "hydra.mode=MULTIRUN" in options.overrides):
        raise UserError("-m: not with several processes, each of which would run the whole sweep; "
                        "launch single runs, or leave the launcher out")  # fmt: skip
    options.overrides = [_plain(override) for override in options.overrides]
    return parser, options


def _plain(override: str) -> str:
    """`NAME=VALUE` as Hydra takes it for a setting that there is, whether written with a + or without.

    Hydra refuses to add what is in the composed tree, and to set what is not: a setting of another task than the chosen one.
    """
    known = re.match(r"(?:\+\+?)?([^+=~]+)=", override)
    if not known or known[1] not in NAMES:
        return override
    name = override.lstrip("+")
    return f"++{name}" if name.startswith("task.") else name


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message}; settings are given as NAME=VALUE, --help shows them")


def _forget_empty_sweep() -> None:
    """Removes the folder of a multirun that came to no job."""
    folder = os.environ.get(SWEEP_FOLDER)
    if folder and not list(Path(folder).glob("job-*.json")):
        shutil.rmtree(folder, ignore_errors=True)


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Tells of a bug in a thread. A full disk it passes over: TensorBoard's thread hands that on to the run itself."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


class SweepFolder(Callback):
    """Fixes a multirun's folder once, so that jobs which a launcher runs in other processes belong to the same sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Names the folder by the time to the microsecond: two sweeps begun in one second stay apart."""
        began = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        os.environ[SWEEP_FOLDER] = str(local_path(config.output_dir).resolve() / "sweeps" / began)


def _job(composed: DictConfig, single: list[DictConfig]) -> None:
    """What Hydra calls: keeps the composed tree of a single run for `main`, runs a job of a multirun here."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        single.append(composed)
        return
    from loftq_exp.report.sweep import record_job

    # A job that fails is recorded and told at the end; the others go on.
    with record_job(
        Path(os.environ[SWEEP_FOLDER]), job.job.num, [override.lstrip("+") for override in job.overrides.task]
    ) as finished:
        finished(_run(composed))


def _run(composed: DictConfig) -> RunResult:
    config = _config(composed)
    from loftq_exp.pipeline import run  # seconds of imports that a wrong setting need not wait for

    return run(config)


def _config(composed: DictConfig) -> RunConfig:
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from error
    return RunConfig.from_mapping(cast("dict[str, Any]", values))


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the command would make of these overrides, for use in Python: `run(compose(["quant.bits=2"]))`.

    Args:
        overrides: as on the command line, one a string.

    Returns:
        The settings, checked and frozen. Nothing is read or written yet.

    Raises:
        UserError: for what the command would refuse, in one line.
    """
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return _config(hydra.compose("config", overrides=[_plain(override) for override in overrides]))
    except _REFUSALS as error:
        raise UserError(_explain(error, list(overrides))) from error


def _report_sweep(folder: Path) -> bool:
    from loftq_exp.report.sweep import report_sweep

    _forget_empty_sweep()
    return report_sweep(folder)


def _explain(error: Exception, arguments: list[str]) -> str:
    """One line for what Hydra or OmegaConf refused: the name at fault and the nearest valid one."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: there is no such choice; {nearest(choice, error.options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{str(error.override).lstrip('+')}: not readable as NAME=VALUE; a list is written [A,B], and a text with blanks, brackets, "
            "commas or ~ in quotes: 'NAME=\"A TEXT\"'"
        )
    if "interpolation '${task}'" in str(error):  # of the schema in conf/config.yaml, where ~task removed the group
        return "task.kind: no value is set and there is no default; give task=NAME"
    if several := re.match("Ambiguous value for argument '(.+?)'", str(error)):
        return f"{several[1].lstrip('+')}: several values; add -m to run each of them, or write a list as [A,B]"
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            continue
        key, value = re.split("[=@]", argument.lstrip("+~"), maxsplit=1)
        if not key.startswith("hydra") and key not in NAMES:
            return f"{argument}: there is no such setting; {_nearest_setting(key)}"
        choices = _choices(key)
        if isinstance(error, ValueError) and key in GROUPS and value not in choices:  # no text, such as model=null
            return f"{argument}: there is no such choice; {nearest(value, choices)}"
    return str(error)


def _nearest_setting(key: str) -> str:
    """As `nearest`, also where only the last part of a dotted name was given (`rank` for `quant.rank`)."""
    last_parts = {name.rpartition(".")[2]: name for name in NAMES}
    found = difflib.get_close_matches(key, [*NAMES, *last_parts], n=1)
    return f"did you mean '{last_parts.get(found[0], found[0])}'?" if found else "--cfg job shows all of them"
