"""Read the backbone Q of an initialised checkpoint, weight by weight, in any storage format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from loftq_exp.artifact.folder import REPORT, Initialised, check_artifact, check_place, read_artifact
from loftq_exp.errors import UserError
from loftq_exp.source.adapted import as_wrapped
from loftq_exp.source.blocks import block_lists, block_of, linear_shape
from loftq_exp.source.experts import expert_targets
from loftq_exp.source.layout import linear_target, skeleton, stored_name
from loftq_exp.source.loading import load_report
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors, open_tensors
from loftq_exp.storage.format import DamagedWeight, StorageFormat, format_of


@dataclass(frozen=True)
class BackboneWeight:
    """One weight of Q: the target, and the tensors that represent it."""

    target: Target
    parts: tuple[str, ...]
    """Names in the file: those of its pieces if dense, several if packed."""

    @property
    def tensor(self) -> str:
        """The name of the dense weight, or of the first tensor with rows of it."""
        return self.target.tensors[0]

    @property
    def own_tensor(self) -> str:
        """The name from which a format with several tensors for a weight derives theirs."""
        return self.target.own_tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.target.shape


@dataclass(frozen=True)
class Backbone:
    """An initialised checkpoint that is open for reading."""

    init: Initialised
    model: transformers.PreTrainedModel
    """The model, on the meta device."""
    tensors: CheckpointTensors
    format: StorageFormat
    """Its storage format."""
    settings: dict[str, Any]
    """`quantization_config` of its config.json; empty if there is none."""
    weights: dict[str, BackboneWeight] = field(default_factory=dict)
    """The weights that init_report.json lists, by module."""

    @property
    def others(self) -> tuple[str, ...]:
        """Names in the file of all other tensors: embeddings, norms, biases, heads."""
        parts = {part for weight in self.weights.values() for part in weight.parts}
        return tuple(name for name in self.tensors.names if name not in parts)

    def values(self, module: str) -> torch.Tensor:
        """Q of one module, (out, in), in float32. Its values are those of the stored type.

        Raises UserError if its tensors do not represent a weight of the shape in init_report.json.
        """
        weight = self.weights[module]
        if self.format.plain and weight.target.pieces:
            return weight.target.read(self.tensors.read).float()
        read = {name: self.tensors.read(name) for name in weight.parts}
        quantizer = self.format.quantizer_of(module, self.settings)
        try:
            return self.format.values(module, weight.own_tensor, read, weight.shape, quantizer)
        except DamagedWeight as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"DIR={self.init.folder}: {what}; quantize again")


@contextmanager
def open_backbone(folder: Path) -> Iterator[Backbone]:
    """Open the initialised checkpoint in `folder`. Its files are closed when the block ends.

    Raises UserError if there is none: without init_report.json the values may be those of W.
    """
    init = read_artifact(folder)
    if init is None:
        raise UserError(f"DIR={folder}: no initialised checkpoint (it has no {REPORT}); give the folder that stages=[quantize] "
                        "wrote: an adapter belongs to its backbone Q and is never merged into a base model")  # fmt: skip
    check_artifact(init, "quantize again")
    with backbone_of(init) as backbone:
        check_place(init)
        yield backbone


@contextmanager
def backbone_of(init: Initialised) -> Iterator[Backbone]:
    """Open the backbone of `init`, whose report need not be written yet. Its files are closed when the block ends."""
    folder = init.folder
    try:
        kind = init.report["model"]["kind"]
        shapes = {weight["name"]: (weight["shape"][0], weight["shape"][1]) for weight in init.report["weights"]}
        settings = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"DIR={folder}: {REPORT} or config.json cannot be read ({error}); quantize again") from None
    model = skeleton(folder, kind)
    stored = format_of(settings)
    named = stored.modules(settings)
    if named is not None and set(named) != set(shapes):
        odd = sorted(set(named).symmetric_difference(shapes))[0]
        raise UserError(f"DIR={folder}: {REPORT} and config.json do not agree on {odd}; quantize again")
    with open_tensors(folder) as tensors:
        backbone = Backbone(init, model, tensors, stored, settings)
        for module, target in _targets(backbone, shapes).items():
            parts = target.tensors if stored.plain else stored.parts(target.own_tensor, tensors.names)
            backbone.weights[module] = BackboneWeight(target, parts)
        yield backbone


def _targets(backbone: Backbone, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """The weights of these shapes, by name, in the model and the file. Raises UserError if one is missing or has another shape."""
    model, folder = backbone.model, backbone.init.folder
    stacks, modules = block_lists(model), dict(model.named_modules())
    found: dict[str, Target] = {}
    if any(module not in modules for module in shapes):
        stored = load_report(model, backbone.tensors.shapes()).parameters if backbone.format.plain else {}
        found = {target.module: target for target in as_wrapped(
            target for target in expert_targets(model, stacks, stored, folder) if target.module in shapes
        )}  # fmt: skip
    for module, shape in shapes.items():
        linear = modules.get(module)
        target = found.get(module)
        if target is None and linear is not None and linear_shape(linear):
            target = linear_target(module, _stored(backbone, module), block_of(module, stacks) or "", linear)
        if target is None or target.shape != shape:
            raise backbone._damaged(
                f"config.json has no linear layer {module} of {shape[0]} x {shape[1]}, but {REPORT} has"
            )
        found[module] = target
    return {module: found[module] for module in shapes}


def _stored(backbone: Backbone, module: str) -> str:
    """The name of a module's dense weight in the file. Raises UserError if the file lacks its first tensor."""
    first = backbone.format.first_part
    stored = stored_name(f"{module}.{first}", backbone.model.base_model_prefix, backbone.tensors.names)
    if stored is None:
        raise backbone._damaged(f"the weights lack {module}.{first}")
    return stored.removesuffix(first) + "weight"
