"""Report how a plain `from_pretrained` would load a checkpoint, from names and shapes alone.

transformers itself runs the load on the meta device, so no value is read. Renamed, merged, tied and ignored tensors are
thus handled exactly as in a real load.
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
    """What transformers reports about a load, and the parameter that each tensor becomes."""

    missing: tuple[str, ...]
    """Parameters that would be initialised at random, in the model's order."""
    unexpected: tuple[str, ...]
    """Tensors that would be ignored, by their names in the checkpoint."""
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    """Parameters whose shape in the checkpoint (second) differs from the model's (third), in the model's order."""
    parameters: Mapping[str, str]
    """The model's name for each tensor of the checkpoint."""

    @property
    def tensors(self) -> dict[str, str]:
        """The checkpoint's name for each parameter that it holds; for a merged parameter the first tensor's."""
        found: dict[str, str] = {}
        for tensor, parameter in self.parameters.items():
            found.setdefault(parameter, tensor)
        return found

    @property
    def as_transformers(self) -> dict[str, Any]:
        """The report in the format of transformers' `output_loading_info=True`."""
        return {"missing_keys": self.missing, "unexpected_keys": self.unexpected, "mismatched_keys": self.mismatched,
                "error_msgs": ()}  # fmt: skip


def load_report(model: transformers.PreTrainedModel, shapes: Mapping[str, Shape]) -> LoadReport:
    """Report the load of tensors with these `shapes` into the class of `model`, which is on the meta device."""
    config = copy.deepcopy(model.config)
    for name in (
        "quantization_config",
        "transformers_weights",
    ):  # the shapes are of dense weights, and no files are read
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
    """A parameter's name in the files of its family, followed by its name in the model if that differs.

    For a parameter that transformers merges from several tensors, the first tensor's name.
    """
    stored = next(iter(revert_weight_conversion(model, {parameter: model.state_dict()[parameter]})))
    return parameter if stored == parameter else f"{stored} (in the model: {parameter})"


def _parameters(model: transformers.PreTrainedModel, names: Mapping[str, Shape]) -> dict[str, str]:
    """The parameter that transformers loads each tensor into. Tensors that are merged share one parameter."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    renamed = {}
    for name in names:
        renamed[name], _ = rename_source_key(name, renamings, converters, prefix, own)
        if renamed[name] not in own and name in own:  # transformers then reverts the rename
            renamed[name], _ = rename_source_key(name, [], [], prefix, own)
    return renamed


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the progress bar and the table of a load. Their content is in the report."""
    log = logging.getLogger("transformers.modeling_utils")
    before, shown = log.disabled, transformers.utils.logging.is_progress_bar_enabled()
    log.disabled = (
        True  # setting a level instead would make transformers check and report the placement of layers on devices
    )
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        log.disabled = before
        if shown:
            transformers.utils.logging.enable_progress_bar()
