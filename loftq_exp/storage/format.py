"""What a storage format does, and the formats by name.

A format is one module of `loftq_exp.storage` that has a `FORMAT`. Its name and what it can hold stand in
`loftq_exp.schemes.FORMATS`, from which the setting `save_format` takes its choices.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loftq_exp.errors import UserError
from loftq_exp.loftq import Quantizer
from loftq_exp.schemes import FORMATS, Capacity, Scheme
from loftq_exp.storage.specs import TensorSpec

Tensors = Mapping[str, torch.Tensor]


class DamagedWeight(ValueError):
    """Tensors that do not stand for a weight."""


@dataclass(frozen=True)
class Codes:
    """A quantized weight: what a quantizer made of it."""

    packed: torch.Tensor
    """uint8, one row of bytes, as `loftq_exp.storage.codes.pack_codes` gives it."""
    scales: torch.Tensor
    """float32, (groups, numbers a group)."""
    shape: tuple[int, int]
    """(out, in)."""
    quantizer: Quantizer


@dataclass(frozen=True)
class LoadCode:
    """Python that has transformers load a dense checkpoint in another form: what the model card shows."""

    imports: tuple[str, ...] = ()
    """Names from transformers."""
    lines: tuple[str, ...] = ()
    argument: str = ""
    """Of from_pretrained."""


class StorageFormat(ABC):
    """How a backbone is stored, and held in memory. An instance has no state."""

    name: ClassVar[str]
    """As `save_format` has it."""
    method: ClassVar[str | None] = None
    """Its `quant_method` in config.json; None: there is none."""
    first_part: ClassVar[str] = "weight"
    """The tensor of a module that is there for every weight."""
    plain: ClassVar[bool] = False
    """Whether a stored backbone is a checkpoint like any other: one dense tensor a weight, no quantization in config.json."""
    takes_values: ClassVar[bool] = True
    """Whether it stores any values, such as merged ones, and not just codes that a quantizer chose."""
    needs_plain_linears: ClassVar[bool] = False
    """Whether transformers loads it into layers whose class is exactly nn.Linear alone."""
    card_imports: ClassVar[tuple[str, ...]] = ()
    """Lines of Python without which a stored backbone cannot be loaded."""
    export_note: ClassVar[str] = ""
    """How an export has stored the merged weights, where that is not as all else."""

    @property
    def capacity(self) -> Capacity:
        """What it can hold."""
        return FORMATS[self.name]

    @abstractmethod
    def specs(
        self, name: str, shape: tuple[int, int], quantizer: Quantizer | None, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        """Types and shapes of the tensors that stand for a weight, by name.

        Args:
            name: of the weight where it is dense.
            shape: (out, in).
            quantizer: what made its codes; None for values that no quantizer made.
            dtype: of the values.
        """

    @abstractmethod
    def encode(self, name: str, codes: Codes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that stand for a quantized weight, by name: those of `specs`. No value moves."""

    def encode_values(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `encode`, of values (out, in) in the type that they are stored in. Only where it `takes_values`."""
        raise NotImplementedError(f"{self.name} stores no values without codes")

    @abstractmethod
    def parts(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        """Which of the `names` in a file stand for the weight `name`."""

    @abstractmethod
    def values(
        self, module: str, name: str, tensors: Tensors, shape: tuple[int, int], quantizer: Quantizer | None
    ) -> torch.Tensor:
        """The values of a stored weight: (out, in), float32.

        Args:
            module: which the weight is of.
            name: of the weight where it is dense.
            tensors: what stands for it, by the names of `parts`.
            shape: (out, in).
            quantizer: from `quantizer_of`.

        Raises:
            DamagedWeight, UserError: where the tensors do not stand for a weight of this shape.
        """

    def quantization_config(
        self, scheme: Scheme | None, bits: Mapping[str, int], other_linears: Sequence[str], dtype: torch.dtype
    ) -> Any:
        """`quantization_config` for transformers; None: there is none.

        Args:
            scheme: how the backbone is quantized; None: its values are no quantizer's own.
            bits: of each target, by module.
            other_linears: linear layers that are no targets.
            dtype: of the values.
        """
        return None

    def modules(self, settings: Mapping[str, Any]) -> Collection[str] | None:
        """The modules that the `quantization_config` of a checkpoint names; None where it does not name them."""
        return None

    def quantizer_of(self, module: str, settings: Mapping[str, Any]) -> Quantizer | None:
        """What made the codes of a module, by the `quantization_config` of a checkpoint; None where that does not say."""
        return None

    def cannot_hold(self, columns: int, device: torch.device) -> str | None:
        """Why layers of this form do not compute right with rows of so many values on `device`; None: they do."""
        return None

    def settle(self, model: Any, modules: Iterable[str], dtype: torch.dtype) -> None:  # noqa: B027  # most have nothing to do
        """What is left to do on a loaded model whose `modules` are held so and compute in `dtype`."""

    def load_code(self, other_linears: Sequence[str], dtype: str) -> LoadCode:
        """How to load a dense checkpoint in this form; `dtype` as Python writes it."""
        return LoadCode()


def storage_format(name: str) -> StorageFormat:
    """The format of this name. Raises UserError where there is none."""
    if name not in FORMATS:
        raise UserError(f"storage format {name!r}: unknown; choose one of {', '.join(FORMATS)}")
    found: StorageFormat = importlib.import_module(f"loftq_exp.storage.{name}").FORMAT
    return found


def format_of(settings: Mapping[str, Any]) -> StorageFormat:
    """The format of a checkpoint with this `quantization_config` (empty: it has none)."""
    formats = [storage_format(name) for name in FORMATS]
    method = settings.get("quant_method")
    plain = next(one for one in formats if one.plain)
    return next((one for one in formats if method is not None and one.method == method), plain)
