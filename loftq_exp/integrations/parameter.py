"""A frozen parameter that stays packed in memory and is dense only in use: the matrices of all experts, or one matrix.

PEFT adapts such a parameter in place (`target_parameters`): in each forward pass its wrapper adds s B A to it. It needs a
parameter with a shape, a floating type and a device, and no values. So the packed one is a tensor without storage, whose
every operation gets the unpacked values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from loftq_exp.errors import UserError
from loftq_exp.integrations.linear import PackedLinear

_aten = torch.ops.aten


class PackedParameter(torch.Tensor):
    """The values of packed matrices (out, in): (experts, out, in), or (experts, in, out) if `transposed`, or one matrix.

    An operation unpacks it into a dense tensor of its type and frees that afterwards, unless autograd keeps it. Indexing by
    one expert unpacks that expert alone. Its values cannot be changed.
    """

    matrices: Sequence[PackedLinear]
    transposed: bool
    stacked: bool

    @staticmethod
    def __new__(
        cls,
        matrices: Sequence[PackedLinear],
        transposed: bool = False,
        stacked: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> PackedParameter:
        """A view of these matrices. `dtype` and `device` default to theirs."""
        rows, columns = matrices[0].shape
        one = (columns, rows) if transposed else (rows, columns)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            (len(matrices), *one) if stacked else one,
            dtype=dtype or matrices[0].compute_dtype,
            device=device or matrices[0].qweight.device,
        )
        made.matrices, made.transposed, made.stacked = matrices, transposed, stacked
        return made

    def matrix(self, number: int) -> torch.Tensor:
        """The values of one matrix, in the parameter's orientation, type and device."""
        values = self.matrices[number].dequantize(self.dtype)
        return (values.T if self.transposed else values).to(self.device)

    def unpacked(self) -> torch.Tensor:
        """All values, dense."""
        if not self.stacked:
            return self.matrix(0)
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for number, place in enumerate(whole):
            place.copy_(self.matrix(number))
        return whole

    def like(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> PackedParameter:
        """The same values in another type or on another device. The packed tensors are moved by their own modules."""
        return PackedParameter(self.matrices, self.transposed, self.stacked, dtype or self.dtype, device or self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedParameter:
        """A parameter of copies of the matrices, the same copies that the modules hold which are copied with it."""
        made = torch.Tensor._make_wrapper_subclass(PackedParameter, self.shape, dtype=self.dtype, device=self.device)
        memo[id(self)] = made
        made.matrices, made.transposed, made.stacked = copy.deepcopy(self.matrices, memo), self.transposed, self.stacked
        made._is_param = True  # nn.Parameter() would ask a matrix that is half copied for its shape
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Its shape and types, without values."""
        return f"PackedParameter(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the unpacked values, or on the parameter itself where no value is needed."""
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, PackedParameter):
            if func in (_aten.detach.default, _aten.alias.default):
                return first.like()
            if func is _aten._to_copy.default:
                return first.like(kwargs.get("dtype"), kwargs.get("device"))
            if func is _aten.set_.source_Tensor and args[1] is first:  # torch's parametrization replaces it by itself
                return first
            if func is _aten.select.int and first.stacked and args[1] == 0:
                return first.matrix(args[2])
            if func is _aten.baddbmm.default:  # PEFT's Q + s B A: into the unpacked values, without another copy
                return first.unpacked().baddbmm_(*args[1:], **kwargs)
            if func._schema.is_mutable:
                raise UserError("merge: an adapter cannot be merged into a packed backbone; python -m loftq_exp.export writes a "
                                "merged checkpoint")  # fmt: skip
        args, kwargs = tree_map_only(PackedParameter, lambda packed: packed.unpacked(), (args, kwargs))
        return func(*args, **kwargs)


def hold(owner: nn.Module, name: str, matrices: Sequence[PackedLinear], stacked: bool = True) -> None:
    """Give `owner` the parameter `name` of these packed matrices. It is no entry of a state dict; its matrices are."""
    packed = PackedParameter(matrices, bool(getattr(owner, "is_transposed", False)), stacked)
    owner._parameters[name] = nn.Parameter(packed, requires_grad=False)
    owner.register_state_dict_post_hook(_without(name))


def _without(name: str) -> Callable[[nn.Module, dict[str, Any], str, Any], None]:
    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        state.pop(prefix + name, None)

    return drop


class PackedParameterLinear(PackedLinear):
    """A packed linear layer whose `weight` is a `PackedParameter`, so that PEFT can adapt it as a parameter."""

    def hold_weight(self) -> None:
        """Make `weight` the parameter, once the packed tensors are there."""
        hold(self, "weight", [self], stacked=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out) with the weight as it is adapted."""
        return nn.functional.linear(input, self.weight, self.bias)
