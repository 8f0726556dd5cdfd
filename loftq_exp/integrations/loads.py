"""Check that a load is complete, from what transformers and PEFT report of missing and unexpected weights."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from peft import PeftConfig, PeftModel, get_peft_model

from loftq_exp.errors import UserError
from loftq_exp.foreign import explained


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' progress bar for loading weights, which takes seconds. Bars for downloads stay."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def collected_log() -> Iterator[list[str]]:
    """Collect transformers' log of a load instead of showing it, at any verbosity; see `failed_conversion`."""
    log, lines = logging.getLogger("transformers.modeling_utils"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def failed_conversion(lines: Iterable[str]) -> str | None:
    """Return the first weight that transformers could not convert, by its load report; None if there is none."""
    found = re.search(r"^(\S.*?) +\| CONVERSION", "\n".join(lines), re.MULTILINE)
    return found[1] if found else None


def check_report(
    report: Mapping[str, Any], place: str, advice: str, head: Iterable[str] = (), resized: bool = False
) -> None:
    """Raise UserError if a weight is missing, or the model has no place for one.

    Args:
        report: transformers' loading info (`output_loading_info=True`).
        place: start of the message: the setting or the folder.
        advice: end of the message: what to do.
        head: modules whose parameters may be missing, because they come from elsewhere.
        resized: whether these may also have other shapes.
    """
    inside = tuple(f"{module}." for module in head)
    mismatched = {name: shapes for name, *shapes in report["mismatched_keys"]}
    faults = {
        name: "is missing from the weights" for name in sorted(report["missing_keys"]) if not name.startswith(inside)
    }
    faults |= {name: f"has shape {tuple(stored)}, config.json means {tuple(expected)}"
               for name, (stored, expected) in mismatched.items() if not (resized and name.startswith(inside))}  # fmt: skip
    faults |= dict.fromkeys(report["unexpected_keys"], "has no place in the model")
    faults |= dict.fromkeys(report["error_msgs"], "is what transformers reports")
    if faults:
        name = next(iter(faults))  # missing ones come first: for a renamed tensor, that is the name to look for
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{place}: {name} {faults[name]}{more}; {advice}")


@contextmanager
def ranks_of_parameters(settings: PeftConfig) -> Iterator[None]:
    """Hide PEFT's warning that it ignores ranks of parameters: it looks for them among the modules, and uses them all the same.

    Shapes and scaling of the factors are checked elsewhere.
    """
    with warnings.catch_warnings():
        if getattr(settings, "target_parameters", None):
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def with_adapter(
    model: transformers.PreTrainedModel, settings: PeftConfig, place: str, advice: str, **options: Any
) -> PeftModel:
    """Return `model` with PEFT's adapter of these `settings`. Raise UserError, with PEFT's reason, if PEFT cannot."""
    base, settings.base_model_name_or_path = settings.base_model_name_or_path, None  # PEFT warns if it differs
    try:
        with (
            explained(f"{place}: PEFT cannot put the adapter on a {model.config.model_type} model", advice),
            ranks_of_parameters(settings),
        ):
            return get_peft_model(model, settings, **options)
    finally:
        settings.base_model_name_or_path = base
