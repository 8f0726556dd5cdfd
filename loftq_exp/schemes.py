"""Tables of the quantizers and storage formats. They need no torch, so settings are checked against them at once.

`loftq` implements the types, `storage` the formats. Imports nothing.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

BITS_OF_TYPE: dict[str, tuple[int, ...]] = {
    "nf": (2, 3, 4),
    "nf-symmetric": (2,),
    "uniform": (2, 3, 4, 5, 6, 7, 8),
    "uniform-clipped": (2, 3, 4, 5, 6, 7, 8),
    "uniform-sigma": (2, 3, 4, 5, 6, 7, 8),
    "int": (8,),
    "none": (16,),
}
"""The bit widths of each `quant.type`; `none` does not quantize (16-bit LoRA)."""

BLOCKLESS_TYPES = ("uniform-clipped", "int", "none")
"""Types without blocks: one scale per weight or per row, or no scales."""

SEARCHED_TYPES = ("nf", "nf-symmetric", "uniform")
"""Types with a range per block, which `quant.scale=search` can shrink."""

TYPES_OF_LEVELS: dict[str, tuple[str, ...]] = {"nf": tuple(BITS_OF_TYPE), "optimal": ("nf",)}
"""The types that each `quant.levels` goes with. Other types than `nf` have only their own levels, and ignore `nf`."""

SCALES = ("absmax", "search")
"""The values of `quant.scale`."""


def variation(settings: Mapping[str, Any]) -> str:
    """Return what differs from the published algorithm in settings or an identity, such as " optimal searched calibrated"."""
    words = [
        "optimal" if settings.get("levels") == "optimal" else "",
        "searched" if settings.get("scale") == "search" else "",
        {"full": "calibrated", "diagonal": "calibrated by diagonal"}.get(settings.get("calibration", ""), ""),
        "GPTQ" if settings.get("rounding") == "gptq" else "",
        "sequential" if settings.get("order") == "sequential" else "",
        f"polished {settings['polish_steps']}" if settings.get("polish_steps") else "",
    ]
    return "".join(f" {word}" for word in words if word)


@dataclass(frozen=True)
class Scheme:
    """How the weights of a backbone are quantized, except for the bits of each weight."""

    type: str
    widths: tuple[int, ...]
    """Bits that a weight may have."""
    block_size: int
    double: bool
    levels: str = "nf"

    def __str__(self) -> str:
        widths = "/".join(map(str, self.widths))
        levels = " with optimal levels" if self.levels == "optimal" else ""
        return f"{self.type}{levels} at {widths} bits with blocks of {self.block_size}{' and double' if self.double else ''}"


@dataclass(frozen=True)
class Capacity:
    """What a storage format can hold exactly, and the formats its backbone can have in memory during training."""

    layers: str
    """The loaded layers, for error messages."""
    forms: tuple[str, ...]
    """Formats that the loaded backbone can have in memory, the smallest first."""
    codes: bool = True
    """Whether it needs a quantizer's codes."""
    types: Container[str] = tuple(BITS_OF_TYPE)
    widths: Mapping[str, frozenset[int]] | None = None
    """Bits that it can hold, by levels; None: any."""
    block_size: int | None = None
    """Block size that it can hold; None: any."""
    double: bool = True
    """Whether it can hold double-quantized scales."""
    instead: str = ""
    """Settings that it can hold, for error messages."""

    def holds(self, scheme: Scheme) -> bool:
        """Return whether it holds every value of a backbone quantized with `scheme`."""
        return (
            scheme.type in self.types
            and (self.widths is None or self.widths[scheme.levels].issuperset(scheme.widths))
            and self.block_size in (None, scheme.block_size)
            and (self.double or not scheme.double)
        )


FORMATS: dict[str, Capacity] = {
    "dense": Capacity("dense layers", ("bnb4", "dense"), codes=False),
    "bnb4": Capacity(
        "4-bit layers",
        ("bnb4",),
        types=("nf",),
        # Every NF2 level and every optimal one is an NF4 level; NF3's are not.
        widths={"nf": frozenset({2, 4}), "optimal": frozenset({2, 3, 4})},
        block_size=64,
        double=False,
        instead="quant.type=nf with 4 or 2 bits (3 with quant.levels=optimal) and blocks of 64",
    ),
    "packed": Capacity("packed layers", ("packed",)),
}
"""The storage formats by `save_format`. Each has a module of this name in `loftq_exp.storage`."""
