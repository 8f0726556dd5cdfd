"""Refuse checkpoints that are adapters, or quantized in a format that is not read as values (loftq_exp.source.dequantized)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loftq_exp.artifact.folder import ADAPTER, REPORT, read_artifact
from loftq_exp.errors import UserError
from loftq_exp.source.dequantized import READ, method_of
from loftq_exp.source.tensors import CheckpointTensors
from loftq_exp.storage.format import storage_format
from loftq_exp.storage.packing import METHOD

_OTHER_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files that older quantization tools write, with the method that each implies."""
_PARTS = {
    "weight_scale_inv": "fp8", "weight_scale": "compressed-tensors or fp8", "weight_packed": "compressed-tensors",
    "qweight": "gptq or awq", "qzeros": "gptq or awq", "absmax": "bitsandbytes", "SCB": "bitsandbytes int8",
    "weight_format": "bitsandbytes int8", "_blocks": "mxfp4",
}  # fmt: skip
"""Name endings of tensors that belong to a quantized weight, with the method that each implies."""
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_ADVICE = (
    f"give the 16-bit checkpoint that it was made from (only {', '.join(READ[:-1])} and {READ[-1]} are read as values)"
)


def check_files(folder: Path) -> None:
    """Raise UserError if files in `folder` indicate an initialised checkpoint or already quantized weights."""
    for name in (REPORT, ADAPTER, "loft_init", "adapter_config.json"):
        if (folder / name).exists():
            raise UserError(f"model.path={folder}: a checkpoint with an adapter (it has {name}), whose backbone Q is no pre-trained "
                            f"model; {_instead(folder)}")  # fmt: skip
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for settings in _settings(config):
        if settings is config.get("quantization_config") and method_of(folder):
            continue
        method = settings.get("quant_method") or settings.get("quant_algo") or "a method that it does not name"
        what = "packed by loftq_exp" if method == METHOD else f"already quantized by {method}"
        raise UserError(f"model.path={folder}: {what}, as quantization_config in config.json says; {_ADVICE}")
    for name, method in _OTHER_CONFIGS.items():
        if (folder / name).is_file():
            raise UserError(f"model.path={folder}: already quantized by {method}, as {name} says; {_ADVICE}")


def _instead(folder: Path) -> str:
    """What to give instead of an initialised checkpoint. A dense one with a single rank can be used off the shelf."""
    advice = "give the model that it was made from"
    try:
        init = read_artifact(folder)
        adapter = json.loads((folder / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
        if init is not None:
            advice += f" ({init.report['model']['requested']})"
            beyond = (
                init.report.get("head")
                or adapter.get("rank_pattern")
                or not storage_format(init.report["quant"]["save_format"]).plain
            )
            if not beyond:
                advice += (
                    f", or set quant=off-the-shelf quant.path={folder} quant.rank={adapter['r']} to use it unchanged"
                )
    except (OSError, ValueError, KeyError, TypeError, UserError):
        pass  # a damaged file only shortens the advice
    return advice


def _settings(config: Any) -> Iterator[dict[str, Any]]:
    """The quantization settings of the config and its nested configs."""
    if not isinstance(config, dict):
        return
    for name, value in config.items():
        if name in ("quantization_config", "compression_config", "quantization") and isinstance(value, dict) and value:
            yield value
        elif name.endswith("_config"):
            yield from _settings(value)


def check_types(tensors: CheckpointTensors, folder: Path) -> None:
    """Raise UserError if a tensor belongs to a quantized weight, whatever config.json states."""
    for name in tensors.names:
        dtype = tensors.dtype(name)
        method = _method(name)
        if method is None and dtype.is_floating_point and dtype.itemsize == 1:
            method = "fp8"
        if method is None and dtype in _INTEGERS and name.endswith(".weight"):
            method = f"a method of {str(dtype).removeprefix('torch.')} weights"
        if method:
            raise UserError(f"model.path={folder}: already quantized by {method}, as tensor {name} of "
                            f"{str(dtype).removeprefix('torch.')} shows; {_ADVICE}")  # fmt: skip


def _method(name: str) -> str | None:
    if ".quant_state." in name:
        return "bitsandbytes"
    last = name.rpartition(".")[2]
    if re.fullmatch(r"\w+_blocks", last):
        return _PARTS["_blocks"]
    return _PARTS.get(last)
