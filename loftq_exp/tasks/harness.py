"""lm-evaluation-harness (the extra `lm-eval`): a model is scored on tasks of the harness, such as gsm8k, hellaswag or own YAML files.

The harness has its own prompts, answers and metrics. This module names its tasks, reads their data and returns its scores.
`loftq_exp.evaluation.harness` runs it on a model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from loftq_exp.config import TaskConfig, local_path
from loftq_exp.config.schema import ADAPTER, SCORES, setting
from loftq_exp.errors import UserError
from loftq_exp.tasks.base import Column, Request, Scored, Task
from loftq_exp.tasks.data import Row, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRA = "pip install 'loftq_exp[lm-eval]'"
FEWSHOT_SEED = 1234
"""The seed of few-shot examples: the harness's own default."""
NOT_USED = ("dataset", "dataset_config", "dataset_revision", "eval_split", "eval_file")
"""Settings of other tasks that name what is scored: a task of the harness names its own data."""
SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1", "mcc", "prefix_match")
"""Metrics that are shown in percent."""
_LABEL = 40
"""Maximum number of characters of the tasks' names in a run's label."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class HarnessConfig(TaskConfig):
    """The tasks of the harness, and how it asks them."""

    name: tuple[str, ...] = setting(  # type: ignore[assignment]  # one or several; the other tasks have one data set
        "names of tasks, tags or groups of lm-evaluation-harness, such as [gsm8k,hellaswag]",
        (),
        shapes=(ADAPTER, SCORES),
    )
    include_path: str | None = setting(
        "folder with own task files (YAML) of lm-evaluation-harness; null: its own tasks",
        None,
        shapes=(),
        locates=(SCORES,),
    )
    num_fewshot: int | None = setting(
        "number of examples before each question; null: as the task's file says, otherwise 0",
        None,
        ge=0,
        shapes=(SCORES,),
    )
    apply_chat_template: bool = setting(
        "render each question with the tokenizer's chat template, examples as turns", False, shapes=(SCORES,)
    )

    def __post_init__(self) -> None:
        if not self.name or len(set(self.name)) < len(self.name):
            raise UserError(f"task.name=[{','.join(self.name)}]: name each task of lm-evaluation-harness once, as in "
                            "task.name=[gsm8k,hellaswag]")  # fmt: skip
        defaults = {each.name: each.default for each in dataclasses.fields(TaskConfig)}
        for name in NOT_USED:
            if (value := getattr(self, name)) != defaults[name]:
                raise UserError(f"task.{name}={value}: not used by {self.kind}, whose tasks name their own data; leave it out, or "
                                "write a task file for that data and give task.include_path=FOLDER")  # fmt: skip
        if self.include_path and not local_path(self.include_path).is_dir():
            raise UserError(f"task.include_path={self.include_path}: there is no such folder (looked for "
                            f"{local_path(self.include_path).absolute()}); give one with task files")  # fmt: skip

    @property
    def label(self) -> str:
        """The task's kind with the names, cut to a readable length."""
        return f"{self.kind}-{'+'.join(self.name)[:_LABEL]}"


@dataclass(frozen=True)
class HarnessRun(Request):
    """Request that the harness scores the model. Its only answer is a `HarnessResult`."""

    tasks: Any = None
    """The loaded tasks and groups, as `lm_eval.evaluate` takes them."""
    limit: int | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class HarnessResult:
    """What the harness returned, in JSON types."""

    results: dict[str, dict[str, Any]]
    """The metrics of each task and group: "METRIC,FILTER" to a number, "METRIC_stderr,FILTER" to its standard error."""
    samples: list[dict[str, Any]]
    """One entry for each document and filter."""
    tasks: dict[str, dict[str, Any]]
    """Of each task its version, number of few-shot examples and documents, and the hash that the harness logs."""
    version: str
    """The version of lm_eval."""
    tokens: int = field(default=0)
    """Generated tokens, as the tokenizer counts them in the generated texts."""


class Harness(Task):
    """Scores a decoder on tasks of lm-evaluation-harness. It has no training rows.

    A score is named TASK_METRIC, or TASK_METRIC_FILTER if the task has filters, and its standard error has `_stderr` after that.
    """

    kind = "lm_eval"
    model_kind = "causal"
    config: HarnessConfig
    columns = ()

    def rows(self, split: Split) -> list[Row]:
        """Return one row per document: its task and the requests that the harness makes of it, few-shot examples included.

        The first row holds the tasks' configs. Raises UserError if the tasks are unknown or their data cannot be read.
        """
        if split == "train":
            self._only_scores()
        return list(self._documents)

    def digest(self, split: Split) -> str:
        """As `Task.digest`, of the documents and requests that are scored."""
        return "sha256:" + hashlib.sha256(json.dumps(self.rows(split), sort_keys=True).encode()).hexdigest()

    def _only_scores(self) -> NoReturn:
        raise UserError("task=lm_eval: scores a model and has no training rows; leave finetune out, as in stages=[quantize,evaluate], "
                        "or score a trained run by score_run=FOLDER; to calibrate, give calibration.task=NAME or calibration.file=FILE")  # fmt: skip

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> NoReturn:
        """Raise UserError: there is nothing to train on."""
        self._only_scores()

    @property
    def lengths(self) -> dict[str, int]:
        """The harness encodes its own requests."""
        return {}

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Request a run of the harness. Raises UserError if a chat template is asked for and the tokenizer has none."""
        config = self.config
        if config.apply_chat_template and not tokenizer.chat_template:
            raise UserError(f"task.apply_chat_template=true: the tokenizer of {tokenizer.name_or_path} has no chat template; "
                            "leave it out")  # fmt: skip
        return [HarnessRun("lm-evaluation-harness", [], tasks=self._loaded, limit=config.max_eval_samples,
                           apply_chat_template=config.apply_chat_template)]  # fmt: skip

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return each metric with its standard error. A sample is a document with its arguments, responses and metrics."""
        result: HarnessResult = answers[0][0]
        scores: dict[str, float] = {}
        for name, metrics in result.results.items():
            for metric, value in metrics.items():
                if "," in metric and isinstance(value, (int, float)) and math.isfinite(value):
                    scores[score_name(name, metric)] = float(value)
        return Scored(scores, result.samples, {"lm_eval": result.version, "tasks": result.tasks})

    @property
    def table(self) -> tuple[Column, ...]:
        """A column for each metric of each task or group that was named, without those inside a group with its own metrics."""
        columns = []
        for name, metrics in self._shown().items():
            for metric in metrics:
                title = score_name(name, metric)
                form = "{:.1%}" if metric.partition(",")[0] in SHARES else "{:.4g}"
                columns.append(Column(title, (title,), form))
        return tuple(columns)

    def _shown(self) -> dict[str, list[str]]:
        """Return the metrics ("METRIC,FILTER") by task or group that the table shows."""
        groups = {name: group for name, group in self._loaded.get("groups", {}).items() if group.has_aggregation}
        inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        nested = {other.name for group in groups.values() for other in group.get_all_groups()}
        shown = {name: _metrics(task) for name, task in self._tasks.items() if name not in inside}
        for name, group in groups.items():
            if name not in nested:
                wanted = {each.metric for each in group.aggregate_metric_list}
                found = [metric for task in group.get_all_tasks() for metric in _metrics(task)]
                shown[name] = [metric for metric in dict.fromkeys(found) if metric.partition(",")[0] in wanted]
        return shown

    # The harness's tasks ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _documents(self) -> list[Row]:
        """The rows. The harness takes long to build its requests, and both the scores' key and the digest need them."""
        rows: list[Row] = [{"configs": {name: task.dump_config() for name, task in self._tasks.items()}}]
        with quiet(), self._readable():
            for name, task in self._tasks.items():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.build_all_requests(limit=self.config.max_eval_samples)
                documents: dict[int, Row] = {}
                for one in task.instances:
                    row = documents.setdefault(one.doc_id, {"task": name, "document": one.doc, "requests": []})
                    row["requests"].append([one.request_type, one.arguments])
                rows += documents.values()
        return [plain(row) for row in rows]

    @property
    def _tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._loaded["tasks"]
        return tasks

    @functools.cached_property
    def _loaded(self) -> Any:
        """The loaded tasks and groups. Raises UserError, one line, if lm_eval is missing, or a task is unknown or unreadable."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"task=lm_eval: lm-evaluation-harness is not installed; run: {EXTRA}")
        manager = self._manager()
        with quiet(), self._readable():
            loaded = manager.load(list(self.config.name))
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = (
                    "runs code that the model wrote" if getattr(task, "UNSAFE_CODE", False) else "needs images or audio"
                )
                raise UserError(
                    f"task.name=[{','.join(self.config.name)}]: {name} {what}, which is not supported; leave it out"
                )
            shots = self.config.num_fewshot
            if shots is None or task.get_config("num_fewshot") == 0:  # as the harness: a task's own 0 stays
                shots = task.get_config("num_fewshot") or 0
            task.set_config(key="num_fewshot", value=shots)
        return loaded

    def _manager(self) -> Any:
        """Return a manager that knows all named tasks. The harness's own 14000 are indexed only if needed, for seconds."""
        from lm_eval.tasks import TaskManager

        names, folder = self.config.name, self.config.include_path
        include = str(local_path(folder)) if folder else None
        if include:
            manager = TaskManager(include_path=include, include_defaults=False)
            if all(name in manager.task_index for name in names):
                return manager
        manager = TaskManager(include_path=include)
        for name in names:
            if name not in manager.task_index:
                near = get_close_matches(name, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
                where = f" nor in task.include_path={folder}" if folder else ""
                raise UserError(
                    f"task.name=[{','.join(names)}]: {name} is no task of lm-evaluation-harness{where}; {hint}"
                )
        return manager

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Report an error of the harness or of its data in one line. A task's file may hold anything."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"task.name=[{','.join(self.config.name)}]: lm-evaluation-harness cannot load it ({reason:.300}); check "
                            "the network and HF_HUB_OFFLINE, or give task.include_path=FOLDER with a task of local data") from error  # fmt: skip


def score_name(task: str, metric: str) -> str:
    """Return the name of a score: "acc,none" of "x" is "x_acc", and "exact_match,strict-match" is "x_exact_match_strict-match".

    A standard error, "acc_stderr,none", is "x_acc_stderr", always with `_stderr` at the end.
    """
    name, _, kept = metric.partition(",")
    end = "_stderr" if name.endswith("_stderr") else ""
    parts = [task, name.removesuffix("_stderr"), *([kept] if kept not in ("", "none") else [])]
    return "_".join(parts) + end


def plain(value: Any) -> Any:
    """Return `value` in JSON types. What has none is its text, without addresses in memory."""
    return json.loads(json.dumps(value, default=_plain_object))


def _plain_object(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else _ADDRESS.sub("", str(value))


def _metrics(task: Any) -> list[str]:
    filters = [each.name for each in getattr(task, "_filters", ())] or ["none"]
    return [f"{metric},{kept}" for kept in filters for metric in task.aggregation()]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the harness's progress bars and log; the run shows its own."""
    import datasets
    from lm_eval.api import task

    bar, log, shown = task.tqdm, logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = log.level
    task.tqdm = lambda items, **_: items
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        task.tqdm = bar
        log.setLevel(level)
        if not shown:
            datasets.enable_progress_bars()
