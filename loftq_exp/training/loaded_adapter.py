"""Loading an adapter onto a backbone, with a check that the model holds exactly the factors and values of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from loftq_exp.errors import UserError
from loftq_exp.foreign import explained
from loftq_exp.integrations.loads import with_adapter
from loftq_exp.source.finite import is_finite
from loftq_exp.training.placement import adapter_to_layers

WEIGHTS = "adapter_model.safetensors"


def read_adapter(folder: Path, advice: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter in `folder` by name.

    Raises UserError, which ends with `advice`, if the file is missing or damaged, or holds values that are not finite.
    """
    with explained(f"{folder}: {WEIGHTS} cannot be read", advice):
        values = load_file(folder / WEIGHTS)
    for name, value in values.items():
        if not is_finite(value):
            raise UserError(f"{folder}: {name} has NaN or infinite values; {advice}")
    return values


def put_adapter(
    backbone: transformers.PreTrainedModel, values: Mapping[str, torch.Tensor], folder: Path, advice: str
) -> PeftModel:
    """Return `backbone` with a trainable adapter of these `values`, configured by adapter_config.json in `folder`.

    PEFT's own loader skips tensors without a place in the model and initialises missing ones at random. Both raise
    UserError here, which ends with `advice`.
    """
    with explained(f"{folder}: adapter_config.json cannot be read", advice):
        settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = False  # in inference mode nothing is trainable
    adapted = with_adapter(backbone, settings, str(folder), advice)
    adapter_to_layers(adapted)
    _check_places(values, _held(adapted), folder, advice)
    set_peft_model_state_dict(adapted, dict(values))
    _check_values(values, _held(adapted), folder, advice)
    return adapted


def _held(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors in the model, by the names that they have in a file."""
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def _check_places(
    values: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], folder: Path, advice: str
) -> None:
    """Raise UserError unless file and model have the same names and shapes."""
    if odd := sorted(set(values).symmetric_difference(held)):
        what = "has no place in the model and would be lost" if odd[0] in values else f"is missing from {WEIGHTS}"
        raise UserError(f"{folder}: {odd[0]} {what} ({len(odd)} of {len(values)} names differ); the adapter is damaged, or this "
                        f"version of PEFT changes its targets; {advice}")  # fmt: skip
    for name, value in values.items():
        if value.shape != held[name].shape:
            raise UserError(f"{folder}: {name} has shape {tuple(value.shape)}, the model means {tuple(held[name].shape)}; the "
                            f"adapter is another model's, or damaged; {advice}")  # fmt: skip


def _check_values(
    values: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], folder: Path, advice: str
) -> None:
    """Raise UserError unless the model holds the file's values, cast to its own dtype."""
    for name, value in values.items():
        if not torch.equal(held[name], value.to(held[name])):
            raise UserError(f"{folder}: {name} has other values in the model than in {WEIGHTS}; {advice}")
