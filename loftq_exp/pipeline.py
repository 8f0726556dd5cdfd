"""The stages of a run, in order. Each saves its result in the run's folder. A stage whose result exists is not run again."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from loftq_exp import manifest, ranks
from loftq_exp.artifact.folder import Initialised
from loftq_exp.artifact.origin import Origin, adapter_digest
from loftq_exp.artifact.push import check_push, push
from loftq_exp.config import RunConfig, local_path
from loftq_exp.config.train import LOSS
from loftq_exp.device import compute_device, compute_dtype
from loftq_exp.errors import UserError
from loftq_exp.initialise.kept import discard_damaged, find_kept
from loftq_exp.initialise.off_the_shelf import take
from loftq_exp.initialise.on_ray import share_on_ray
from loftq_exp.initialise.published import check_published, source_of
from loftq_exp.initialise.share import share
from loftq_exp.initialise.stage import initialise
from loftq_exp.keys import adapter_key, identify, scores_key
from loftq_exp.records import Record, Records, continued, is_of_version_0_1, start_of, write_config
from loftq_exp.report.console import print_table
from loftq_exp.report.loggers import Loggers, check_loggers
from loftq_exp.report.record import as_json, assemble
from loftq_exp.report.scored import lower_is_better
from loftq_exp.report.table import LEAST, cells, columns
from loftq_exp.run_data import RunData, log_data, read_data
from loftq_exp.source.kind import with_kind
from loftq_exp.source.locate import Source
from loftq_exp.source.wheel import UNWRITABLE
from loftq_exp.tasks import load_task
from loftq_exp.whole import locked

if TYPE_CHECKING:
    from loftq_exp.training.preflight import Prepared
    from loftq_exp.training.validation import Validation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The folders of a run's results, and its metrics as in metrics.json.

    Attributes:
        run_dir: the run's folder: records, samples, metrics.json, TensorBoard log.
        init_dir: the initialised checkpoint.
        adapter_dir: the fine-tuned adapter; None if no stage trained or scored one.
        scores: the task's scores by name, in the task's own units; empty if nothing was scored.
        metrics: the content of metrics.json.
    """

    run_dir: Path
    init_dir: Path
    adapter_dir: Path | None
    scores: dict[str, float]
    metrics: dict[str, Any]


def run(config: RunConfig) -> RunResult:
    """Run `config.stages`, in the order quantize, finetune, evaluate. A stage whose result exists is not run again.

    With several ranks (torchrun), each must call it. All get the same result; only rank 0 writes.

    Args:
        config: the settings of the run, from `compose` or `RunConfig.from_mapping`.

    Returns:
        The folders of the results, and the scores.

    Raises:
        UserError: for anything that the user can correct, in one line.
    """
    try:
        return _run(config)
    except (OSError, SafetensorError, RuntimeError) as error:
        _refuse_place(config, error)
        reason = _unwritable(error)
        if reason is None:
            raise
        raise UserError(f"output_dir={config.output_dir}: cannot be written ({reason}); "
                        "free space there or set another output_dir") from error  # fmt: skip


def _refuse_place(config: RunConfig, error: Exception) -> None:
    """Raise UserError if `error` is that a folder of the settings cannot be created, as below /proc."""
    if not isinstance(error, FileNotFoundError) or error.filename is None:
        return
    missing = Path(os.path.abspath(error.filename))  # noqa: PTH100  # resolve() would ask the system again
    for name in ("output_dir", "cache_dir", "save_dir"):
        value = getattr(config, name)
        place = Path(os.path.abspath(local_path(value))) if value else None  # noqa: PTH100
        if place and (missing == place or missing in place.parents):
            raise UserError(
                f"{name}={value}: {missing} cannot be created ({error.strerror}); set another {name}"
            ) from error


def _run(config: RunConfig) -> RunResult:
    # All checks come before the long work and before any folder is created.
    ranks.check_launch()
    check_loggers(config)
    _check_machine(config)
    check_push(config)
    check_published(config)
    asked = config
    config = ranks.from_main(lambda: settled(asked))
    data = ranks.main_first(lambda: read_data(config))  # rank 0 downloads from the Hub
    log_data(config, data)
    place = ranks.from_main(lambda: _place(config))
    identity = ranks.from_main(lambda: identify(config, place))
    folder = identity.run_dir
    records = Records(folder, identity.init_key, local_path(config.score_run) if config.score_run else None)
    todo = ranks.from_main(lambda: _todo(config, data, records))
    prepared = _prepare(place, config, data, todo)
    if config.initialise.shards > 1 and isinstance(place, Source):
        spread = share_on_ray if config.initialise.engine == "ray" else share
        # Before the run's lock, behind which the other shards would wait.
        ranks.from_main(lambda: spread(place, config))
    ranks.from_main(lambda: _make_folder(config, folder))
    with _alone(folder, config):
        before, todo = todo, ranks.from_main(lambda: _todo(config, data, records))
        if todo != before:  # by another process, until this one had the lock
            prepared = _prepare(place, config, data, todo)
        ranks.from_main(records.clear_leftovers)
        ranks.from_main(lambda: write_config(folder, config, identity))
        recorder, failed = Loggers(config, folder), True
        try:
            init = ranks.from_main(lambda: _initialised(place, config, recorder, records.init_key, todo.any))
            if todo.score and config.evaluate.max_memory:
                _check_offload(init, config)
            finetuned = _finetune(config, init, data, prepared, records, recorder)
            steps = _steps_of(finetuned) if finetuned and todo.adapter else 0
            evaluated = _evaluate(config, init, data, prepared, records, todo.adapter, recorder, steps)

            def report() -> dict[str, Any]:
                metrics = assemble(config, init, finetuned, evaluated, data.task.table)
                manifest.write_listed(folder / "metrics.json", as_json(metrics))
                recorder.report(metrics, init, steps)
                return metrics

            metrics = ranks.from_main(report)
            failed = False
        finally:
            recorder.close(failed)
    if ranks.is_main():
        headings = columns([metrics])
        print_table(config.label, headings, [cells(metrics, headings)], drop=LEAST, elsewhere="metrics.json has all")
        log.info("run: %s   checkpoint: %s", folder, init.folder)
        if "tensorboard" in config.train.report_to:
            log.info("tensorboard --logdir %s", folder.parent)
    return RunResult(folder, init.folder, records.trained_adapter, metrics["scores"], metrics)


def settled(config: RunConfig) -> RunConfig:
    """The settings with the model and initialisation of `score_run`, and the model's kind instead of `model.kind=auto`.

    Raises UserError if the run or the model is not found.
    """
    return with_kind(continued(config), load_task(config.task).model_kind)


def _place(config: RunConfig) -> Source | Initialised:
    """The model's files, or the initialised checkpoint that the stages start from."""
    if found := start_of(config):
        return found
    return source_of(config) if "quantize" in config.stages else find_kept(config)


def _make_folder(config: RunConfig, folder: Path) -> None:
    _log_version_0_1(config, folder)
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _alone(folder: Path, config: RunConfig) -> Iterator[None]:
    """Let one run at a time work in `folder`. Runs that differ only in evaluation settings wait and reuse the adapter."""
    if not ranks.is_main():
        yield
        return
    with locked(folder / ".run.lock", f"running {config.label}", "output_dir"):
        yield


def _log_version_0_1(config: RunConfig, folder: Path) -> None:
    """Log the folder that version 0.1 made for such a run. It does not record its inputs and is not touched."""
    if folder.exists():
        return
    old = [
        place
        for place in sorted(config.runs_path.glob(f"{glob.escape(config.plain_label)}-*"))
        if is_of_version_0_1(place)
    ]
    if old:
        log.info("%s: made by version 0.1, left alone; this run's results go to %s", old[0], folder)


def _check_machine(config: RunConfig) -> None:
    """Raise UserError if the device is not available, or does not work with the type, optimiser or training arguments."""
    device = compute_device(config.device)
    if set(config.stages) == {"quantize"}:
        return
    dtype = compute_dtype(device, config.train.bf16, config.train.fp16)
    if "evaluate" in config.stages:
        from loftq_exp.training.placement import check_placement

        check_placement(config)
    if "finetune" in config.stages:
        from loftq_exp.training.preflight import check_optimiser

        check_optimiser(config, device, dtype)


def _check_offload(init: Initialised, config: RunConfig) -> None:
    from loftq_exp.training.load import check_offload

    check_offload(init, config)


def _adapter_to_score(config: RunConfig, records: Records) -> Path | None:
    """The adapter that the evaluate stage scores; None: the initial factors."""
    if "evaluate" not in config.stages:
        return None
    return records.adapter if "finetune" in config.stages else records.adapter_to_score()


@dataclass(frozen=True)
class _Todo:
    """The work that remains, by the records in the run's folder."""

    adapter: Path | None
    """The adapter that is scored; None: the initial factors."""
    train: bool
    score: bool

    @property
    def any(self) -> bool:
        """Whether the initialised checkpoint will be read."""
        return self.train or self.score


def _todo(config: RunConfig, data: RunData, records: Records) -> _Todo:
    adapter = _adapter_to_score(config, records)
    train = "finetune" in config.stages and not records.finetuned(_adapter_key(config, data, records))
    score = "evaluate" in config.stages and (
        train or not records.evaluated(scores_key(records.init_key, adapter, data.eval, config))
    )
    return _Todo(adapter, train, score)


def _prepare(place: Source | Initialised, config: RunConfig, data: RunData, todo: _Todo) -> Prepared | None:
    """Encode the rows of the remaining stages and check them against the model. None if no stage remains."""
    if not todo.any:
        return None
    from loftq_exp.training.preflight import prepare

    train, validation = (data.train, data.validation) if todo.train else ((), ())
    return prepare(place, data.task, train, data.eval if todo.score else (), config, validation)


def _adapter_key(config: RunConfig, data: RunData, records: Records) -> str:
    return adapter_key(records.init_key, data.train, config, data.validation)


def _initialised(
    place: Source | Initialised, config: RunConfig, recorder: Loggers, key: str, is_read: bool
) -> Initialised:
    """Return the initialised checkpoint with this `key`. Raises UserError if the source's files changed during the run.

    One that `is_read` by a later stage is verified first. If it is damaged and of our own store, it is made again.
    """
    init = place if isinstance(place, Initialised) else _quantize(place, config, recorder)
    if is_read and isinstance(place, Source) and discard_damaged(init.folder, config):
        init = _quantize(place, config, recorder)
    if identify(config, init).init_key != key:
        raise UserError(f"model.path={config.model.path}: its files changed during the run; run it again")
    return init


def _quantize(source: Source, config: RunConfig, recorder: Loggers) -> Initialised:
    init = (take if config.quant.method == "off-the-shelf" else initialise)(source, config)
    recorder.started(init)
    if config.hub.push:
        push(init, config)
    return init


def _finetune(
    config: RunConfig, init: Initialised, data: RunData, prepared: Prepared | None, records: Records, recorder: Loggers
) -> Record | None:
    if "finetune" not in config.stages:
        return records.finetuned()
    key = _adapter_key(config, data, records)

    def work() -> Record:
        from loftq_exp.training.finetune import finetune

        assert prepared
        origin = Origin(key, records.init_key)
        validation = _validation(config, data, prepared) if data.validation else None
        log_from, log_step = partial(recorder.begin_training, key), recorder.training
        result = finetune(init, prepared, data.task, config, records.folder, origin, log_from, log_step, validation)
        return result | {"rows": len(data.train), "data": data.digests}

    record = _once("finetune", records, key, records.finetuned(key), work)
    ranks.from_main(lambda: records.drop_checkpoints(key))  # only now: the record says that the training is done
    return record


def _validation(config: RunConfig, data: RunData, prepared: Prepared) -> Validation:
    """Return what the trainer validates: the loss, and the task's scores if one of them chooses the best step."""
    from loftq_exp.evaluation.evaluate import evaluate
    from loftq_exp.training.validation import Validation

    metric = config.train.metric_for_best_model
    if metric == LOSS:
        return Validation(prepared.validation, len(data.validation))

    def score(model: Any) -> dict[str, float]:
        size = config.train.per_device_eval_batch_size
        found = evaluate(
            model, prepared.tokenizer, data.task, data.validation, size, None, prepared.validation_requests
        )
        return found.scores

    return Validation(prepared.validation, len(data.validation), score, bool(lower_is_better(metric)))


def _steps_of(finetuned: Record) -> int:
    """Return the number of training steps of the saved adapter."""
    validated = finetuned.get("validation")
    return int(validated["adapter_step"] if validated else finetuned["steps"])


def _evaluate(
    config: RunConfig,
    init: Initialised,
    data: RunData,
    prepared: Prepared | None,
    records: Records,
    adapter: Path | None,
    recorder: Loggers,
    steps: int,
) -> Record | None:
    """Return the record of the scores. `steps` is the number of training steps of the scored adapter, 0 without one."""
    if "evaluate" not in config.stages:
        return records.evaluated()
    key = scores_key(records.init_key, adapter, data.eval, config)

    def work() -> Record:
        from loftq_exp.evaluation.score import score

        assert prepared
        digest = adapter_digest(adapter) if adapter else None
        result = score(init, adapter, data.eval, prepared, data.task, config, records.samples(key))
        if ranks.is_main():
            recorder.scores(key, init, result["scores"], records.samples(key), steps)
        result |= {"adapter": "fine-tuned" if adapter else "initial", "adapter_digest": digest}
        return result | {"data": {"eval": data.task.digest("eval")}}

    record = _once("evaluate", records, key, records.evaluated(key), work)
    ranks.from_main(lambda: records.show(key))
    return record


def _once(stage: str, records: Records, key: str, found: Record | None, work: Callable[[], Record]) -> Record:
    """Return the record `found` on rank 0. If there is none, do the work and save its record."""
    if found := ranks.from_main(lambda: found):
        log.info("%s: done before, in %s", stage, records.folder)
        return found
    result = work()
    return ranks.from_main(lambda: records.keep(stage, key, result))


def _unwritable(error: Exception) -> str | None:
    """Return the system's reason why a file could not be written, however a library words it. None for other errors."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in (*UNWRITABLE, errno.ENAMETOOLONG) else None
    # The wording of safetensors and torch.
    found = re.search(r"I/O error: (.+) \(os error|PytorchStreamWriter|unexpected pos \d+", str(error))
    return (found[1] or "no space left, or a limit on file sizes") if found else None
