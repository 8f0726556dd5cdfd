"""Check a written checkpoint: a plain load uses every tensor and misses none, and tensors that are not targets are unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.source.layout import Layout, check_complete, skeleton
from loftq_exp.source.loading import load_report
from loftq_exp.source.tensors import CheckpointTensors, open_tensors, same_values, some

VERSION = 1
"""Part of an initialised checkpoint's key. Increment it when other tensors are kept, or more is checked or counted."""
Forms = Mapping[str, tuple[tuple[int, ...], Sequence[str]]]
"""For the tensor of each target: its dense shape, and the names under which it was written."""


def check_written(folder: Path, source: CheckpointTensors, layout: Layout, forms: Forms, config: RunConfig) -> None:
    """Raise UserError if a load of `folder` would miss, ignore or resize a tensor, or if a non-target differs from `source`.

    Packed targets are checked as the dense weights that they represent. The transformers quantizer reports which modules
    load packed parts. A new task head may be missing.
    """
    model = skeleton(folder, config.model.kind, config.model.trust_remote_code)
    parts = {part for _, names in forms.values() for part in names}
    with open_tensors(folder) as written:
        others = [name for name in written.names if name not in parts]
        shapes = {name: written.shape(name) for name in others} | {name: shape for name, (shape, _) in forms.items()}
        if absent := sorted(parts.difference(written.names)):
            raise UserError(f"model.path: {some(absent)} was not written to {folder}; quantize again")
        report = load_report(model, shapes)
        check_complete(model, layout.head, report, folder)
        if report.unexpected:
            raise UserError(f"model.path: {some(report.unexpected)} would be ignored by {type(model).__name__}, loaded from "
                            f"what was written; update transformers, or give another checkpoint")  # fmt: skip
        for name in others:
            if not same_values(source.read(name), written.read(name)):
                raise UserError(
                    f"model.path: {name} differs from the source after writing; check the disk, and quantize again"
                )
    if getattr(model.config, "quantization_config", None):
        _check_modules(model, folder, layout)


def _check_modules(model: transformers.PreTrainedModel, folder: Path, layout: Layout) -> None:
    """Raise UserError if the quantizer of config.json packs modules other than the targets, or finds other parts for one."""
    settings, before = model.config.quantization_config, dict(model.named_modules())
    files = sorted(str(path) for path in folder.glob("model*.safetensors"))
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    quantizer.preprocess_model(
        model, dtype=torch.bfloat16, device_map={"": "cpu"}, checkpoint_files=files, use_kernels=False
    )
    packed = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not before.get(name)
    }
    if odd := sorted(
        packed.symmetric_difference(
            target.own_tensor.removesuffix(".weight") if target.expert is not None else target.module
            for target in layout.targets
        )
    ):
        raise UserError(
            f"save_format: transformers would not load {some(odd)} as it was written; use save_format=dense"
        )
