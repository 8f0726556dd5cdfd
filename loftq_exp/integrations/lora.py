"""LoRA on a packed layer: PEFT's linear layer without merging, which a packed weight does not support."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora.layer import Linear, ParamWrapper

from loftq_exp.errors import UserError


class PackedLoraLayer(Linear):
    """y = x Q' + s x A' B' on a `PackedLinear`. PEFT creates it as a custom module, see `loftq_exp.integrations.registration`."""

    @property
    def weight(self) -> None:  # type: ignore[override]
        """None, like the packed layer's. PEFT would return the packed bytes, and t5 would cast activations to their dtype."""
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise UserError: Q + s B A is not a packed weight."""
        raise UserError("merge: an adapter cannot be merged into a packed backbone; python -m loftq_exp.export writes a "
                        "merged checkpoint, dense or bnb4")  # fmt: skip

    def unmerge(self) -> None:
        """Do nothing: the adapter is never merged."""

    def __repr__(self) -> str:
        return f"loftq_exp.{super().__repr__()}"


def adapted_layer(
    target: Any, adapter_name: str, parameter_name: str | None = None, **settings: Any
) -> PackedLoraLayer | ParamWrapper:
    """PEFT's layer on a `PackedLinear`: of its weight as a parameter, or of the layer."""
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, **settings)
    return PackedLoraLayer(target, adapter_name, **settings)
