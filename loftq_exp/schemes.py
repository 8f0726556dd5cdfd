"""What quantizers and storage formats there are, as tables without torch: settings are checked against them at once.

`loftq` implements the types, `storage` the formats. Imports nothing.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

BITS_OF_TYPE: dict[str, tuple[int, ...]] = {
    "nf": (2, 3, 4),
    "nf-symmetric": (2,),
    "uniform": (2, 3, 4, 5, 6, 7, 8),
    "uniform-clipped": (2, 3, 4, 5, 6, 7, 8),
    "uniform-sigma": (2, 3, 4, 5, 6, 7, 8),
    "int": (8,),
    "none": (16,),
}
"""The bit widths of each `quant.type`; `none` keeps the weights as they are (16-bit LoRA)."""

BLOCKLESS_TYPES = ("uniform-clipped", "int", "none")
"""Types without blocks: their scales are those of the whole weight or of its rows, or there are none."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of a backbone are quantized, their own bits aside."""

    type: str
    widths: tuple[int, ...]
    """The bits that a weight may have."""
    block_size: int
    double: bool

    def __str__(self) -> str:
        widths = "/".join(map(str, self.widths))
        return f"{self.type} at {widths} bits with blocks of {self.block_size}{' and double' if self.double else ''}"


@dataclass(frozen=True)
class Capacity:
    """What a storage format holds exactly, and how a backbone that is stored so can be held while it trains."""

    layers: str
    """The layers that a load makes of it, as an error names them."""
    forms: tuple[str, ...]
    """Formats that the loaded backbone can have in memory, the smallest first."""
    codes: bool = True
    """Whether it needs the codes that a quantizer chose; dense values come without."""
    types: Container[str] = tuple(BITS_OF_TYPE)
    widths: frozenset[int] | None = None
    """The bits that it holds; None: any."""
    block_size: int | None = None
    """The block size that it holds; None: any."""
    double: bool = True
    """Whether it holds scales that are quantized themselves."""
    instead: str = ""
    """Settings that it can hold, as an error advises."""

    def holds(self, scheme: Scheme) -> bool:
        """Whether it holds every value of a backbone that is quantized so."""
        return (
            scheme.type in self.types
            and (self.widths is None or self.widths.issuperset(scheme.widths))
            and self.block_size in (None, scheme.block_size)
            and (self.double or not scheme.double)
        )


FORMATS: dict[str, Capacity] = {
    "dense": Capacity("dense layers", ("bnb4", "dense"), codes=False),
    "bnb4": Capacity(
        "4-bit layers",
        ("bnb4",),
        types=("nf",),
        widths=frozenset({2, 4}),  # every NF2 level is an NF4 level
        block_size=64,
        double=False,
        instead="quant.type=nf with 4 or 2 bits and blocks of 64",
    ),
    "packed": Capacity("packed layers", ("packed",)),
}
"""The storage formats, `save_format`. Each is the module of its name in `loftq_exp.storage`."""
