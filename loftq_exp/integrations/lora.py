"""LoRA on a packed layer, for PEFT: its own linear layer, but for merging, which a packed weight cannot take."""

from __future__ import annotations

from typing import NoReturn

from peft.tuners.lora.layer import Linear

from loftq_exp.errors import UserError


class PackedLoraLayer(Linear):
    """y = x Q' + s x A' B' on a `PackedLinear`. PEFT makes it through its custom modules, see `loftq_exp.integrations.registration`."""

    @property
    def weight(self) -> None:  # type: ignore[override]
        """None, as the packed layer's own. PEFT would give the packed bytes, and t5 turn its activations into their type."""
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuses: Q + s B A is no packed weight. Raises UserError."""
        raise UserError("merge: a packed backbone cannot take the adapter's values; python -m loftq_exp.export writes a merged "
                        "checkpoint, dense or bnb4")  # fmt: skip

    def unmerge(self) -> None:
        """Nothing: an adapter is never merged here."""

    def __repr__(self) -> str:
        return f"loftq_exp.{super().__repr__()}"
