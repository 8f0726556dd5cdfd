"""What a plain `from_pretrained` makes of a checkpoint: asked of transformers itself, by names and shapes alone.

The load runs on the meta device, so that no value is read. Renamed, merged, tied and ignored tensors then mean what they
mean when the checkpoint is loaded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What transformers reports of a load, and which parameter it makes of each tensor."""

    missing: tuple[str, ...]
    """Parameters that would be drawn at random, in the model's order."""
    unexpected: tuple[str, ...]
    """Tensors, by their names in the checkpoint, that would be ignored."""
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    """Parameters whose shape in the checkpoint (second) is not the model's (third), in the model's order."""
    parameters: Mapping[str, str]
    """The model's name for each tensor of the checkpoint."""

    @property
    def tensors(self) -> dict[str, str]:
        """The checkpoint's name for each parameter that it holds. The first one of several that are merged."""
        found: dict[str, str] = {}
        for tensor, parameter in self.parameters.items():
            found.setdefault(parameter, tensor)
        return found

    @property
    def as_transformers(self) -> dict[str, Any]:
        """The report under the names that `output_loading_info=True` gives to its parts."""
        return {"missing_keys": self.missing, "unexpected_keys": self.unexpected, "mismatched_keys": self.mismatched,
                "error_msgs": ()}  # fmt: skip


def load_report(model: transformers.PreTrainedModel, shapes: Mapping[str, Shape]) -> LoadReport:
    """The report of loading tensors with these `shapes` into the class of `model`, which is on the meta device."""
    config = copy.deepcopy(model.config)
    for name in (
        "quantization_config",
        "transformers_weights",
    ):  # the shapes are those of dense weights, and stand for files
        if getattr(config, name, None) is not None:
            delattr(config, name)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with _quietly():
        loaded: Any = type(model).from_pretrained(
            None, config=config, state_dict=empty, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    info, parameters = loaded[1], _parameters(model, shapes)
    order = {name: position for position, name in enumerate(model.state_dict())}
    return LoadReport(
        missing=tuple(sorted(info["missing_keys"], key=lambda name: order.get(name, len(order)))),
        unexpected=tuple(name for name in shapes if parameters[name] in info["unexpected_keys"]),
        mismatched=tuple(
            (name, tuple(found), tuple(own))
            for name, found, own in sorted(info["mismatched_keys"], key=lambda entry: order.get(entry[0], len(order)))
        ),
        parameters=parameters,
    )


def name_in_files(model: transformers.PreTrainedModel, parameter: str) -> str:
    """What a parameter is called in the files of its family, and in the model where that is another name.

    For a parameter that transformers merges of several tensors, the first of these.
    """
    stored = next(iter(revert_weight_conversion(model, {parameter: model.state_dict()[parameter]})))
    return parameter if stored == parameter else f"{stored} (in the model: {parameter})"


def _parameters(model: transformers.PreTrainedModel, names: Mapping[str, Shape]) -> dict[str, str]:
    """What transformers calls each tensor while it loads; for one of several that are merged, their common parameter."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    renamed = {}
    for name in names:
        renamed[name], _ = rename_source_key(name, renamings, converters, prefix, own)
        if renamed[name] not in own and name in own:  # transformers then takes the rename back
            renamed[name], _ = rename_source_key(name, [], [], prefix, own)
    return renamed


@contextmanager
def _quietly() -> Iterator[None]:
    """Hides the bar and the table of a load that is only asked about: what they say is in the report."""
    log = logging.getLogger("transformers.modeling_utils")
    before, shown = log.disabled, transformers.utils.logging.is_progress_bar_enabled()
    log.disabled = (
        True  # a level of its own would have transformers check, and report, how layers are spread over devices
    )
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        log.disabled = before
        if shown:
            transformers.utils.logging.enable_progress_bar()
