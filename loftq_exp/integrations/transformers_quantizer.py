"""Packed checkpoints in transformers: `quant_method: loftq` in config.json, through its public registry of quantizers.

`import loftq_exp` registers both classes (see `loftq_exp.integrations.registration`). `AutoModel...from_pretrained(DIR)`
then creates a model with packed layers, without a dense copy of any. `save_pretrained` writes the same tensors again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import wrapt
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq_exp.errors import UserError
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.integrations.parameter import PackedParameterLinear, hold
from loftq_exp.loftq import Quantizer
from loftq_exp.storage.packed import PARTS, check_specs
from loftq_exp.storage.packing import METHOD, STACK, VERSION, Packing

NEEDS_US = "packed by loftq_exp: pip install loftq_exp and import loftq_exp before loading"
"""Stored in config.json as the name of the weights file. transformers reads it only if our method is not registered.
It then rejects the name and shows this text, instead of loading random weights."""


@register_quantization_config(METHOD)
class LoftQConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed backbone.

    Args:
        bits: bits per value of each packed module, by name. All other modules are dense.
        type: quantizer type, see `loftq_exp.loftq.quantizers`.
        block_size: consecutive values that share scales.
        double: whether the scales are quantized themselves.
        scale_dtype: type of the scales and of the decoded values.
        version: format version.
        levels: levels of type `nf`, see `loftq_exp.loftq.quantizers`.
        parameters: packed linear layers whose weight PEFT adapts as a parameter.
    """

    levels: str = "nf"
    """Written only if it is not `nf`, as an attribute of the instance."""
    parameters: Sequence[str] = ()
    """Written only if there are any."""

    def __init__(
        self,
        bits: dict[str, int] | None = None,
        type: str = "nf",
        block_size: int = 64,
        double: bool = False,
        scale_dtype: str = "bfloat16",
        version: int = VERSION,
        levels: str = "nf",
        parameters: Sequence[str] = (),
        **unknown: Any,
    ) -> None:
        packing = Packing.of({"bits": bits, "type": type, "block_size": block_size, "double": double,
                              "scale_dtype": scale_dtype, "version": version, "levels": levels,
                              "parameters": parameters} | unknown)  # fmt: skip
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enumeration has only its own methods
        self.bits, self.type, self.block_size, self.double = (
            packing.bits,
            packing.type,
            packing.block_size,
            packing.double,
        )
        self.scale_dtype, self.version = packing.scale_dtype, VERSION
        if packing.levels != "nf":
            self.levels = packing.levels
        if packing.parameters:
            self.parameters = list(packing.parameters)

    def quantizer(self, bits: int) -> Quantizer:
        """Return the quantizer of the modules with `bits` bits."""
        packing = Packing(self.bits, self.type, self.block_size, self.double, self.scale_dtype, self.levels)
        return packing.quantizer(bits)


@register_quantizer(METHOD)
class LoftQHfQuantizer(HfQuantizer):
    """Creates packed layers for the packed weights of a checkpoint, and checks what was loaded into them."""

    quantization_config: LoftQConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise UserError for a dense checkpoint, which is not packed while loading."""
        if not self.pre_quantized:
            raise UserError("quantization_config: LoftQConfig only reads what was packed before; "
                            "the quantize stage of loftq_exp packs a checkpoint")  # fmt: skip

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove `NEEDS_US` from the config. This is the first method called with it."""
        if getattr(config, "transformers_weights", None) == NEEDS_US:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # the first one in transformers 5.17

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> Any:
        modules, layers = dict(model.named_modules()), dict[str, PackedLinear]()
        stacks, linears = _by_parameter(self.quantization_config.bits, model.base_model_prefix, modules)
        self._stacks = {place: self._stack(modules[place[0]], place, bits, dtype) for place, bits in stacks.items()}
        for (owner, parameter), matrices in self._stacks.items():
            layers |= {f"{owner}.{STACK}{parameter}.{number}": matrix for number, matrix in enumerate(matrices)}
        for name, bits in linears.items():
            found = _module_name(name, model.base_model_prefix, modules)
            if found is None:
                raise UserError(f"quantization_config.bits: {name} is not a linear layer of {type(model).__name__}; "
                                "load the class that the checkpoint was made for")  # fmt: skip
            kind = PackedParameterLinear if name in self.quantization_config.parameters else PackedLinear
            layers[found] = self._packed(modules[found], bits, dtype, kind)
            model.set_submodule(found, layers[found])
            # Some classes initialise the weights of all their layers by name (t5), unless they are marked as loaded. A packed
            # layer has no `weight` to initialise.
            for drawn in (layers[found], model.get_submodule(found.rpartition(".")[0])):
                drawn._is_hf_initialized = True
        _check_files(checkpoint_files or (), model.base_model_prefix, layers)
        return model

    def _stack(
        self, owner: Any, place: tuple[str, str], bits: Mapping[int, int], dtype: torch.dtype | None
    ) -> list[PackedLinear]:
        """The packed matrices of a parameter of experts, in a module list that replaces it until the weights are loaded."""
        name, parameter = place
        shape = owner.get_parameter(parameter).shape
        if set(bits) != set(range(shape[0])):
            raise UserError(f"quantization_config.bits: {name}.{parameter} has {shape[0]} matrices, and {len(bits)} are packed; "
                            "get config.json again")  # fmt: skip
        rows, columns = (shape[2], shape[1]) if owner.is_transposed else (shape[1], shape[2])
        quantizers = [self.quantization_config.quantizer(bits[number]) for number in range(shape[0])]
        matrices = [PackedLinear(columns, rows, quantizer, False, dtype, "meta") for quantizer in quantizers]
        owner.register_parameter(parameter, None)
        owner.add_module(f"{STACK}{parameter}", nn.ModuleList(matrices))
        for drawn in (owner, *matrices):  # some classes initialise the parameters of experts by name
            drawn._is_hf_initialized = True
        return matrices

    def _packed(
        self, linear: nn.Linear | Conv1D, bits: int, dtype: torch.dtype | None, kind: type[PackedLinear]
    ) -> PackedLinear:
        quantizer = self.quantization_config.quantizer(bits)
        has_bias = linear.bias is not None
        rows, columns = (
            (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)
        )
        return kind(columns, rows, quantizer, has_bias, dtype, "meta")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                # If a class keeps a module in float32 (t5's wo), transformers widens its scales too, which is exact.
                if not module.quantizer.double:
                    module.scales = module.scales.to(module.quantizer.scale_dtype)
                module.check(name)
            if isinstance(module, PackedParameterLinear):
                module.hold_weight()
        for (owner, parameter), stack in self._stacks.items():
            hold(model.get_submodule(owner), parameter, stack)
        return model

    def is_serializable(self) -> bool:
        """True: packed tensors are saved unchanged."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: an adapter on packed layers can be trained."""
        return True


@wrapt.patch_function_wrapper("transformers.configuration_utils", "PreTrainedConfig.to_diff_dict")
def _stop_other_readers(to_diff_dict: Callable[[], dict[str, Any]], _: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Add `NEEDS_US` to every config.json of a packed backbone. transformers omits the setting when it saves."""
    values = to_diff_dict(*args, **kwargs)
    quantization = values.get("quantization_config") or {}
    return values | ({"transformers_weights": NEEDS_US} if quantization.get("quant_method") == METHOD else {})


_TYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of packed tensors, by safetensors' names."""


def _check_files(files: Sequence[str], prefix: str, layers: Mapping[str, PackedLinear]) -> None:
    """Raise UserError if the files lack tensors that the layers need, before transformers reads them.

    transformers would only log a table. With `ignore_mismatched_sizes`, which a new head needs, it would report nothing.
    """
    found: dict[str, dict[str, tuple[torch.dtype | str, tuple[int, ...]]]] = {name: {} for name in layers}
    renamed = False  # whether transformers renames tensors while loading
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dict
                    module, _, part = name.rpartition(".")
                    owner = _module_name(module, prefix, layers)
                    if owner is not None and part in PARTS:
                        header = tensors.get_slice(name)
                        kind = header.get_dtype()
                        found[owner][part] = (_TYPES.get(kind, kind), tuple(header.get_shape()))
                    renamed |= owner is None and part == "qweight"
        except SafetensorError as error:
            raise UserError(f"{file}: not a complete safetensors file ({error}); get the file again") from None
    for name, layer in layers.items() if files else ():
        if found[name] or not renamed:
            check_specs(name, found[name], layer.quantizer, layer.shape)


_Stacks = dict[tuple[str, str], dict[int, int]]
"""Bits by the module and the parameter of experts, and the expert's number."""


def _by_parameter(
    bits: Mapping[str, int], prefix: str, modules: Mapping[str, nn.Module]
) -> tuple[_Stacks, dict[str, int]]:
    """The bits of experts' matrices, whose names end in a number, and those of linear layers."""
    stacks: _Stacks = {}
    linears: dict[str, int] = {}
    for name, width in bits.items():
        path, _, number = name.rpartition(".")
        owner, _, parameter = path.rpartition(".")
        names = (owner, owner.removeprefix(f"{prefix}."), f"{prefix}.{owner}")
        found = next((each for each in names if hasattr(modules.get(each), "is_transposed")), None)
        if found is not None and number.isdigit():
            stacks.setdefault((found, parameter), {})[int(number)] = width
        else:
            linears[name] = width
    return stacks, linears


def _module_name(name: str, prefix: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the linear module that the checkpoint calls `name`, in a class with or without a head; None if none."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if isinstance(modules.get(candidate), nn.Linear | Conv1D):
            return candidate
    return None
