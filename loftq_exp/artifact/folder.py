"""The initialised checkpoint as a folder that is complete or absent, and the small files beside its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType

from loftq_exp import manifest
from loftq_exp.config import QuantConfig, RunConfig
from loftq_exp.errors import UserError
from loftq_exp.loftq.allocation import Precision
from loftq_exp.source.files import carry_files
from loftq_exp.source.layout import TASK_TYPES, Layout, load_config
from loftq_exp.source.locate import Source
from loftq_exp.storage.format import storage_format
from loftq_exp.whole import locked, whole_folder

REPORT = "init_report.json"
ADAPTER = "loftq_init"
_PEFT_HEADS = ("classifier", "score", "qa_outputs")
"""Heads that PEFT itself adds to `modules_to_save` whenever it loads an adapter of their task type."""


@dataclass(frozen=True)
class Initialised:
    """An initialised checkpoint on disk: its folder and the content of init_report.json."""

    folder: Path
    report: dict[str, Any]

    @property
    def backbone_bytes(self) -> int:
        """The size of the backbone's weight files, in bytes."""
        return sum(path.stat().st_size for path in self.folder.glob("model*.safetensors"))

    @property
    def adapter_bytes(self) -> int:
        """The size of the stored factors and of a trained head, in bytes."""
        return (self.folder / ADAPTER / "adapter_model.safetensors").stat().st_size


def read_artifact(folder: Path) -> Initialised | None:
    """The initialised checkpoint in `folder`, or None. The report is written last, so its presence means completeness.

    Raises UserError if the report is not valid JSON.
    """
    try:
        report = json.loads((folder / REPORT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        report = None
    if not isinstance(report, dict):
        raise UserError(f"{folder / REPORT}: not a report in JSON; delete {folder} to make it again")
    return Initialised(folder, report)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report, and complete the manifests of the checkpoint in `folder`, whose other files are written."""
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    for place in (folder / ADAPTER, folder):
        if place.is_dir():
            manifest.complete(place)


def check_artifact(init: Initialised, advice: str) -> None:
    """Raise UserError, which ends with `advice`, if a file of `init` is not as it was written, or the folder is another's now.

    The initial adapter is not checked, see `loftq_exp.manifest.check`.
    """
    manifest.check(init.folder, advice)
    check_place(init)


def check_place(init: Initialised) -> None:
    """Raise UserError if another initialisation is in the folder of `init` now."""
    now = read_artifact(init.folder)
    if now is None or now.report.get("key") != init.report.get("key"):
        raise UserError(f"{init.folder}: another initialisation took its place while this run worked; run it again")


def faults_of(folder: Path, most: float = math.inf) -> list[str]:
    """What is wrong with the checkpoint's files of at most `most` bytes, its initial adapter included, a line each."""
    return [fault for place in (folder, folder / ADAPTER) for fault in manifest.faults(place, most)]


@contextmanager
def exclusive(final: Path, setting: str = "save_dir") -> Iterator[None]:
    """Hold the lock for writing `final`. Other processes wait and then find it done. Errors name the `setting` it is from."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{setting}={final.parent}: cannot be written ({error.strerror}); set another {setting}"
        ) from None
    with locked(final.parent / f".{final.name}.lock", f"writing {final}", setting):
        yield


@contextmanager
def written_whole(final: Path, setting: str = "save_dir") -> Iterator[Path]:
    """Yield a folder to write to. It replaces `final` when the block ends, and is removed if the block fails.

    Use it under `exclusive`. Leftovers of a killed process are removed first. Raises UserError if `final` exists but is not
    an initialised checkpoint: foreign files are never replaced. Errors name the `setting` that the path is from.
    """
    if final.exists() and not (final / REPORT).is_file() and not _is_empty(final):
        raise UserError(f"{setting}={final.parent}: {final.name} in it is no initialised checkpoint (it has no {REPORT}); "
                        f"move it away or set another {setting}")  # fmt: skip
    try:
        with whole_folder(final) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{setting}={final.parent}: cannot be written ({error.strerror}); "
                        f"free space there or set another {setting}") from None  # fmt: skip


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def write_surroundings(
    folder: Path,
    final: Path,
    source: Source,
    layout: Layout,
    plan: Mapping[str, Precision],
    config: RunConfig,
    dtype: str | None = None,
) -> None:
    """Write everything but the weights: the model's config, unchanged tokenizer files, and the adapter's config.

    `plan` has the bits and rank of each target, by module. `dtype` is the type in which the model is loaded; None: the
    config's save_dtype.
    """
    model_config = load_config(source.folder, config.model.trust_remote_code, config.model.kind)
    model_config.dtype = getattr(torch, dtype or config.save_dtype)
    bits = {module: precision.bits for module, precision in plan.items()}
    quantization = storage_format(config.save_format).quantization_config(
        config.quant.scheme,
        bits,
        layout.other_linears,
        getattr(torch, config.save_dtype),
        [target.module for target in layout.targets if target.expert is None and layout.as_parameter(target)],
    )
    if quantization is not None:
        model_config.quantization_config = quantization
    elif hasattr(model_config, "quantization_config"):
        del model_config.quantization_config  # of a source that was quantized; its values are written
    model_config.save_pretrained(folder)
    carry_files(source.folder, folder, config.model.trust_remote_code)
    adapter = adapter_config(layout, plan, config.quant, config.model.kind, str(final.resolve()))
    # PEFT's own writer would save the target modules in set order, which differs between processes.
    text = json.dumps(adapter.to_dict(), indent=2, sort_keys=True, default=sorted)
    (folder / ADAPTER).mkdir()
    (folder / ADAPTER / "adapter_config.json").write_text(text + "\n")


def adapter_config(
    layout: Layout, plan: Mapping[str, Precision], quant: QuantConfig, kind: str, base: str | None
) -> LoraConfig:
    """The adapter's config for PEFT, with one s for all ranks. `base` is the backbone's folder; None: it is in memory."""
    ranks = {
        target.parameter if layout.as_parameter(target) else target.module: plan[target.module].rank
        for target in layout.targets
        if target.module in plan
    }
    others = {name: rank for name, rank in ranks.items() if rank != quant.rank}
    return LoraConfig(
        task_type=TaskType(TASK_TYPES[kind]),
        base_model_name_or_path=base,
        r=quant.rank,
        lora_alpha=_number(quant.lora_alpha),
        rank_pattern=others,
        alpha_pattern={module: _number(quant.scaling * rank) for module, rank in others.items()},
        lora_dropout=quant.dropout,
        target_modules=list(layout.target_modules),
        target_parameters=list(layout.target_parameters) or None,
        fan_in_fan_out=layout.transposed,
        modules_to_save=[name for name in layout.head if name not in _PEFT_HEADS] or None,
        init_lora_weights=True,  # the factors are given; PEFT must not compute new ones
        inference_mode=base is not None,
    )


def _number(alpha: float) -> int:
    """An alpha as PEFT writes it: an integer if it is whole. Any number works, as PEFT only divides it."""
    return int(alpha) if alpha == int(alpha) else alpha  # type: ignore[return-value]
