"""The config.json entry of a packed backbone: the format version, and the quantizer of each packed module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loftq_exp.errors import UserError
from loftq_exp.loftq import Quantizer, make_quantizer

METHOD = "loftq"
VERSION = 1
"""Version of the packed format. A reader rejects any other."""
STACK = "packed_"
"""The packed matrices of `experts.down_proj` are the module list `experts.packed_down_proj`."""


@dataclass(frozen=True)
class Packing:
    """`quantization_config` of a packed backbone. Raises UserError if this version cannot read it."""

    bits: dict[str, int]
    """Bits per value of each packed module, by name. All other modules are dense."""
    type: str = "nf"
    """Quantizer type, see `loftq_exp.loftq.quantizers`."""
    block_size: int = 64
    """Consecutive values that share scales."""
    double: bool = False
    """Whether the scales are quantized themselves."""
    scale_dtype: str = "bfloat16"
    """Type of the scales and of the decoded values."""
    levels: str = "nf"
    """Levels of type `nf`: `nf` or `optimal`."""
    parameters: Sequence[str] = ()
    """Packed linear layers whose weight PEFT adapts as a parameter."""

    def __post_init__(self) -> None:
        if not isinstance(self.bits, dict):
            raise UserError("quantization_config.bits: not a mapping of module names to bits; get config.json again")
        if not isinstance(getattr(torch, str(self.scale_dtype), None), torch.dtype):
            raise UserError(
                f"quantization_config.scale_dtype={self.scale_dtype}: not a torch dtype; get config.json again"
            )
        for width in set(self.bits.values()):
            self.quantizer(width)  # raises UserError for invalid settings

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Packing:
        """Parse a `quantization_config`."""
        known = ("bits", "type", "block_size", "double", "scale_dtype", "levels", "parameters")
        version = settings.get("version", VERSION)
        unknown = [name for name in settings if name not in (*known, "version", "quant_method")]
        if version != VERSION or unknown:
            names = f" and {', '.join(unknown)}" if unknown else ""
            raise UserError(f"quantization_config: packed by another loftq_exp (format {version}{names}; this one reads "
                            f"{VERSION}); update loftq_exp, or quantize again")  # fmt: skip
        return cls(settings.get("bits"), **{name: settings[name] for name in known[1:] if name in settings})  # type: ignore[arg-type]

    @property
    def settings(self) -> dict[str, Any]:
        """The `quantization_config`. It has `levels` only if they are not `nf`, and `parameters` only if there are any: older
        versions can read the rest."""
        settings = {"quant_method": METHOD, "bits": self.bits, "type": self.type, "block_size": self.block_size,
                    "double": self.double, "scale_dtype": self.scale_dtype, "version": VERSION}  # fmt: skip
        settings |= {"levels": self.levels} if self.levels != "nf" else {}
        return settings | ({"parameters": list(self.parameters)} if self.parameters else {})

    def quantizer(self, bits: int) -> Quantizer:
        """Return the quantizer of the modules with `bits` bits."""
        dtype = getattr(torch, self.scale_dtype)
        return make_quantizer(self.type, bits, self.block_size, dtype, self.double, levels=self.levels)
