"""The names with which PEFT finds exactly the weights to adapt: modules, and parameters of modules.

PEFT renames targets of mixtures (`gate_proj` becomes the experts' `gate_up_proj`), which would lose the linear layers of these
names. As parameters they keep their names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import transformers
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.conversion_mapping import get_model_conversion_mapping

from loftq_exp.source.target import Target


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The settings `target_modules` and `target_parameters` for PEFT."""

    modules: tuple[str, ...]
    """The shortest module name endings that match the targets and nothing else."""
    parameters: tuple[str, ...]
    """The same of parameter names. PEFT has no dropout for their adapters."""


def adapted(model: transformers.PreTrainedModel, targets: Iterable[Target]) -> Adapted:
    """The names for PEFT of the `targets` in `model`."""
    parameters: dict[str, None] = {}
    modules: list[str] = []
    renamed: dict[str, bool] = {}
    for target in targets:
        last = target.chosen_by.rpartition(".")[2]
        if target.expert is None and not renamed.setdefault(last, _renames(model, last)):
            modules.append(target.module)
        else:
            parameters[target.parameter] = None
    own = dict(model.named_modules())
    return Adapted(shortest_endings(modules, own), shortest_endings(parameters, dict(model.named_parameters())))


def as_wrapped(targets: Iterable[Target]) -> tuple[Target, ...]:
    """The targets with the PEFT layer of each expert's factors.

    PEFT wraps a module once for each adapted parameter, the first one innermost.
    """
    targets = tuple(targets)
    order: dict[str, dict[str, None]] = {}
    for target in targets:
        if target.expert is not None:
            order.setdefault(target.parameter.rpartition(".")[0], {})[target.parameter] = None

    def layer(target: Target) -> str:
        module = target.parameter.rpartition(".")[0]
        names = list(order[module])
        return module + ".base_layer" * (len(names) - 1 - names.index(target.parameter))

    return tuple(
        target if target.expert is None else dataclasses.replace(target, wrapped=layer(target)) for target in targets
    )


def _renames(model: transformers.PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes a module of this name for something else in this model class."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    except ValueError:  # it demands another target beside it
        return True
    return set(config.target_modules or ()) != {name}


def shortest_endings(inside: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The shortest dotted suffixes that match every name in `inside` and no other one of `names` under PEFT's rules."""
    inside = set(inside)
    others = [name for name in names if name not in inside]
    endings: dict[str, None] = {}
    for name in sorted(inside):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not any(other == ending or other.endswith("." + ending) for other in others):
                endings[ending] = None
                break
    return tuple(endings)
