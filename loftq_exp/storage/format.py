"""The interface of a storage format, and the formats by name.

A format is a module of `loftq_exp.storage` that defines `FORMAT`. `loftq_exp.schemes.FORMATS` lists its name and what it can
hold; these names are the choices of the setting `save_format`.
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
    """Stored tensors that do not represent a weight."""


@dataclass(frozen=True)
class Codes:
    """A quantized weight: the packed codes and the scales of a quantizer."""

    packed: torch.Tensor
    """uint8, (bytes,), from `loftq_exp.storage.codes.pack_codes`."""
    scales: torch.Tensor
    """float32, (groups, numbers per group)."""
    shape: tuple[int, int]
    """(out, in)."""
    quantizer: Quantizer


@dataclass(frozen=True)
class LoadCode:
    """Python code for the model card that loads a dense checkpoint in another format."""

    imports: tuple[str, ...] = ()
    """Names to import from transformers."""
    lines: tuple[str, ...] = ()
    argument: str = ""
    """Argument of from_pretrained."""


class StorageFormat(ABC):
    """How a backbone is stored in files and held in memory. Instances have no state."""

    name: ClassVar[str]
    """Value of `save_format`."""
    method: ClassVar[str | None] = None
    """`quant_method` in config.json; None: no quantization config."""
    first_part: ClassVar[str] = "weight"
    """Name of the tensor that every stored module has."""
    plain: ClassVar[bool] = False
    """Whether a stored backbone is an ordinary checkpoint: one dense tensor per weight, no quantization in config.json."""
    takes_values: ClassVar[bool] = True
    """Whether it can store arbitrary values, such as merged ones, and not only a quantizer's codes."""
    needs_plain_linears: ClassVar[bool] = False
    """Whether transformers loads it only into layers whose class is exactly nn.Linear."""
    holds_parameters: ClassVar[bool] = False
    """Whether it holds parameters, such as experts, that PEFT adapts where they are."""
    keeps_types: ClassVar[bool] = False
    """Whether transformers keeps the stored type of other weights too, so that the model has to be loaded in that type."""
    card_imports: ClassVar[tuple[str, ...]] = ()
    """Python imports needed to load a stored backbone, for the model card."""
    export_note: ClassVar[str] = ""
    """How an export stores the merged weights, if differently from all other tensors."""

    @property
    def capacity(self) -> Capacity:
        """What the format can hold."""
        return FORMATS[self.name]

    @abstractmethod
    def specs(
        self, name: str, shape: tuple[int, int], quantizer: Quantizer | None, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        """Return dtypes and shapes of the tensors that represent a weight, by name.

        Args:
            name: name of the dense weight.
            shape: (out, in).
            quantizer: the quantizer of its codes; None for values without codes.
            dtype: dtype of the values.
        """

    @abstractmethod
    def encode(self, name: str, codes: Codes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the tensors that represent a quantized weight, by name: those of `specs`. Values are unchanged."""

    def encode_values(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Like `encode`, for values (out, in) in their storage dtype. Only for formats that have `takes_values`."""
        raise NotImplementedError(f"{self.name} stores no values without codes")

    @abstractmethod
    def parts(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        """Return those of the `names` in a file that represent the weight `name`."""

    @abstractmethod
    def values(
        self, module: str, name: str, tensors: Tensors, shape: tuple[int, int], quantizer: Quantizer | None
    ) -> torch.Tensor:
        """Return the values of a stored weight: (out, in), float32.

        Args:
            module: name of the weight's module.
            name: name of the dense weight.
            tensors: the tensors that represent it, by the names of `parts`.
            shape: (out, in).
            quantizer: from `quantizer_of`.

        Raises:
            DamagedWeight, UserError: if the tensors do not represent a weight of this shape.
        """

    def quantization_config(
        self,
        scheme: Scheme | None,
        bits: Mapping[str, int],
        other_linears: Sequence[str],
        dtype: torch.dtype,
        parameters: Sequence[str] = (),
    ) -> Any:
        """Return the `quantization_config` for transformers; None if the format has none.

        Args:
            scheme: how the backbone is quantized; None: values without codes.
            bits: bits of each target module, by name.
            other_linears: linear layers that are not targets.
            dtype: dtype of the values.
            parameters: linear layers among the targets whose weight PEFT adapts as a parameter.
        """
        return None

    def modules(self, settings: Mapping[str, Any]) -> Collection[str] | None:
        """Return the modules listed in the `quantization_config` of a checkpoint; None if it does not list them."""
        return None

    def quantizer_of(self, module: str, settings: Mapping[str, Any]) -> Quantizer | None:
        """Return the quantizer of a module by the `quantization_config` of a checkpoint; None if it does not specify one."""
        return None

    def cannot_hold(self, columns: int, device: torch.device) -> str | None:
        """Return why layers of this format compute wrongly on `device` with rows of `columns` values; None if they do not."""
        return None

    def settle(self, model: Any, modules: Iterable[str], dtype: torch.dtype) -> None:  # noqa: B027  # most have nothing to do
        """Finish a loaded model whose `modules` are held in this format and compute in `dtype`."""

    def load_code(self, other_linears: Sequence[str], dtype: str) -> LoadCode:
        """Return code that loads a dense checkpoint in this format. `dtype` is a Python expression."""
        return LoadCode()


def storage_format(name: str) -> StorageFormat:
    """Return the format of this name. Raise UserError if it is unknown."""
    if name not in FORMATS:
        raise UserError(f"storage format {name!r}: unknown; choose one of {', '.join(FORMATS)}")
    found: StorageFormat = importlib.import_module(f"loftq_exp.storage.{name}").FORMAT
    return found


def format_of(settings: Mapping[str, Any]) -> StorageFormat:
    """Return the format of a checkpoint by its `quantization_config`, which may be empty."""
    formats = [storage_format(name) for name in FORMATS]
    method = settings.get("quant_method")
    plain = next(one for one in formats if one.plain)
    return next((one for one in formats if method is not None and one.method == method), plain)
