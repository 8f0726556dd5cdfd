"""Repeating a finished run from its record: `python -m loftq_exp.rerun RUN_DIR`.

Everything is recomputed, in a new folder with its own cache. The results are compared with the record number by number.
Exit codes: 0 if all results are equal; 1 if one differs or for an error, which is one line on standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp import ranks
from loftq_exp.commands.terminal import OneLineParser, exit_code, log_to, only_rank_0_speaks, quiet_libraries
from loftq_exp.config import RunConfig, local_path
from loftq_exp.errors import UserError
from loftq_exp.manifest import fault_of

log = logging.getLogger(__name__)

_HEADINGS = ("what", "old", "new", "difference")
_MOST_ROWS = 60
"""Maximum number of differing results that are listed. Of the rest only the number is shown."""
_NOT_RESULTS = ("computed", "cache_hits", "phases")
"""Totals of an initialisation that describe the work and not the result."""
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "config": dict, "scores": dict, "finetune": (dict, type(None)), "losses": list, "init": dict, "data": dict, "provenance": dict
}  # fmt: skip
"""Required entries of a finished run's metrics, with their types."""

Flat = dict[str, Any]
"""Values by dotted name."""


@dataclass(frozen=True)
class Recorded:
    """The files of a finished run: metrics.json, and the records of the stages that were run."""

    folder: Path
    metrics: dict[str, Any]
    finetune: dict[str, Any]
    evaluate: dict[str, Any]

    @property
    def initialisation(self) -> str | None:
        """The key of the run's initialisation; None for a run that neither trained nor scored."""
        return self.finetune.get("initialisation") or self.evaluate.get("initialisation")

    @property
    def passes(self) -> list[tuple[str, ...]]:
        """The stages to run, in one pass, or in two if the initial factors were scored before training."""
        trained, scored = bool(self.metrics["finetune"]), bool(self.metrics["scores"])
        if trained and scored and self.metrics["scored_adapter"] == "initial":
            return [("quantize", "evaluate"), ("quantize", "finetune")]
        return [("quantize", *(["finetune"] if trained else []), *(["evaluate"] if scored else []))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 equal, 1 for a difference or an error, 130 interrupted."""

    def work() -> int:
        options = _parser().parse_args(argv)
        log_to(sys.stdout)
        quiet_libraries()
        only_rank_0_speaks()
        old = read_recorded(local_path(options.run_dir))
        config = ranks.from_main(lambda: _prepared(old, options))
        from loftq_exp.pipeline import run  # imported late: torch takes seconds

        done = [run(dataclasses.replace(config, stages=stages)) for stages in old.passes]
        return ranks.from_main(lambda: 0 if _report(old, read_recorded(done[-1].run_dir)) else 1)

    return exit_code(work, "finished work is kept, and the recorded run is unchanged")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m loftq_exp.rerun",
        description="Repeats a finished run from its record, in a new folder, and reports what differs. The exit code is 0 if "
        "all results are equal, and 1 if one differs.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder, with config.json and metrics.json")
    parser.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="output_dir of the new run (default: reruns/NAME/TIME in the run's own output_dir)",
    )
    parser.add_argument("--cache-dir", metavar="FOLDER",
                        help="cache to read decompositions from (default: recompute each weight)")  # fmt: skip
    parser.add_argument("--anyway", action="store_true", help="run even if the data or the model changed since")
    return parser


def read_recorded(folder: Path) -> Recorded:
    """Return the record in a run's folder. Raises UserError if the run is not finished or the record is damaged."""
    metrics = _json(folder, "metrics.json")
    if metrics is None:
        raise UserError(
            f"{folder}: no finished run (there is no metrics.json); give a folder of OUTPUT_DIR/runs whose run ended"
        )
    stages = {stage: _json(folder, f"{stage}.json") for stage in ("finetune", "evaluate")}
    for name, kinds in _NEEDED.items():
        if not isinstance(metrics.get(name, ...), kinds):
            raise UserError(
                f"{folder / 'metrics.json'}: damaged, or of another version: it has no sound '{name}'; run its command again"
            )
    for stage, made in (("finetune", metrics["finetune"]), ("evaluate", metrics["scores"])):
        if made and stages[stage] is None:
            raise UserError(
                f"{folder}: {stage}.json is missing, and metrics.json has results of it; run the command again"
            )
    return Recorded(folder, metrics, stages["finetune"] or {}, stages["evaluate"] or {})


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no file."""
    if (folder / name).exists() and (fault := fault_of(folder / name)):
        raise UserError(f"{fault}; run its command again")
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{folder / name}: cannot be read ({error.strerror}); change its permissions") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{folder / name}: damaged: not an object in JSON; run the command again")
    return found


def _prepared(old: Recorded, options: argparse.Namespace) -> RunConfig:
    """Return the settings to run with. Raises UserError if the inputs differ from those of the record."""
    config = config_of(old, options)
    _check_inputs(old, config, options.anyway)
    return config


def config_of(old: Recorded, options: argparse.Namespace) -> RunConfig:
    """Return the settings of the recorded run for a new folder, without a push to the Hub."""
    settings, name = old.metrics["config"], old.folder.resolve().name
    began = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    place = old.folder.resolve().parent.parent / "reruns" / name / began
    output = local_path(options.output_dir) if options.output_dir else place
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output-dir={output}: is not empty; give a new folder, so that no earlier result is reused")
    ours = {
        "output_dir": str(output),
        "cache_dir": options.cache_dir,
        "save_dir": None,
        "stages": ["quantize"],
        "hub": {},
    }
    try:
        return RunConfig.from_mapping(settings | ours)
    except UserError as error:
        raise UserError(f"{old.folder / 'metrics.json'}: its settings are not those of this version: {error}") from None


def _check_inputs(old: Recorded, config: RunConfig, anyway: bool) -> None:
    """Raise UserError, before any work, if rows or model are missing, or if they changed and `anyway` is false."""
    changed = [*_changed_data(old, config), *_changed_model(old, config)]
    for line in changed if anyway else ():
        log.warning("%s: run anyway", line)
    if changed and not anyway:
        raise UserError(f"{'; '.join(changed)}; bring back what the run used, or add --anyway")


def _changed_data(old: Recorded, config: RunConfig) -> Iterator[str]:
    from loftq_exp.tasks import load_task

    task = load_task(config.task)
    for split, name in (("train", "training"), ("eval", "evaluation")):
        digest = old.metrics["data"].get(split)
        if digest is None:
            continue
        found = task.digest(split)  # type: ignore[arg-type]
        if found != digest:
            yield f"the {name} rows changed since {old.folder.name} (digest {_short(digest)}, now {_short(found)})"


def _changed_model(old: Recorded, config: RunConfig) -> Iterator[str]:
    from loftq_exp.keys import identify

    if old.initialisation is None:
        return
    key = identify(config).init_key
    if key != old.initialisation:
        yield (f"model.path={config.model.path}: the model, or what this version makes of it, changed since {old.folder.name} "
               f"(key {_short(old.initialisation)}, now {_short(key)})")  # fmt: skip


def results(run: Recorded) -> Flat:
    """Return every result of a run by name: scores, losses, weight errors, sizes, digests of data, adapter and samples."""
    metrics = run.metrics
    init = {name: value for name, value in metrics["init"].items() if name not in _NOT_RESULTS}
    adapter = run.finetune.get("adapter") if metrics["finetune"] else None
    found = {
        "scores": metrics["scores"],
        "scored_adapter": metrics.get("scored_adapter"),
        "init": init,
        "bits_plan": metrics.get("bits_plan"),
        "finetune": {"ranks": 1} | metrics["finetune"] if metrics["finetune"] else None,  # absent from older records
        "loss at step": {str(step): loss for step, loss in metrics["losses"]},
        "backbone_bytes": metrics.get("backbone_bytes"),
        "adapter_bytes": metrics.get("adapter_bytes"),
        # Weights only, because adapter_config.json holds the path of the backbone.
        "adapter digest": adapter.rpartition("+")[2] if adapter else None,
        "samples digest": run.evaluate.get("samples") if metrics["scores"] else None,
        "data": metrics["data"],
    }
    return dict(_flat(found))


def surroundings(run: Recorded) -> Flat:
    """Return the environment of a run: versions, commit and hardware."""
    return {name: value for name, value in _flat(run.metrics["provenance"]) if name != "created"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(old: Flat, new: Flat) -> list[tuple[str, str, str, str]]:
    """Return a row for each name whose values are not identical: name, old, new, difference."""
    names = [*old, *(name for name in new if name not in old)]
    return [_row(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _row(name: str, old: Any, new: Any) -> tuple[str, str, str, str]:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    change = "none" if old == new else f"{new - old:+.3g}" if numbers else "differs"
    return name, _shown(old), _shown(new), change


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return _short(value) if isinstance(value, str) else repr(value) if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    """Return a text shortened for a table cell."""
    return text if len(text) <= 24 else f"{text[:20]}..."


def _report(old: Recorded, new: Recorded) -> bool:
    """Print scores, differences and the verdict. Returns whether every result is equal."""
    from loftq_exp.report.console import print_table

    before, after = results(old), results(new)
    changed = differences(before, after)
    scores = [
        _row(name, before.get(name), after.get(name)) for name in {**before, **after} if name.startswith("scores.")
    ]
    listed = [row for row in changed if row not in scores]
    made_with = differences(surroundings(old), surroundings(new))
    print_table(f"{old.folder.name}: results", _HEADINGS, [*scores, *listed[:_MOST_ROWS]])
    if len(listed) > _MOST_ROWS:
        log.info("and %d more that differ", len(listed) - _MOST_ROWS)
    if made_with:
        print_table("environment", _HEADINGS, made_with)
    total = len({**before, **after})
    verdict = f"{len(changed)} of {total} results differ" if changed else f"all {total} results are equal, bit for bit"
    log.info("%s; the new run is in %s", verdict, new.folder)
    return not changed
