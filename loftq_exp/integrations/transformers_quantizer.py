"""Packed checkpoints for transformers: `quant_method: loftq` in config.json, through its public registry of quantizers.

`import loftq_exp` registers both classes (see `loftq_exp.integrations.registration`); then `AutoModel...from_pretrained(DIR)` makes a model
with packed layers, without a dense copy of any of them, and `save_pretrained` writes the same tensors again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import wrapt
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq_exp.errors import UserError
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.loftq import Quantizer
from loftq_exp.storage.packed import PARTS, check_specs
from loftq_exp.storage.packing import METHOD, VERSION, Packing

NEEDS_US = "packed by loftq_exp: pip install loftq_exp and import loftq_exp before loading"
"""Stands in config.json as the name of the weights' file, which transformers reads only where nobody told it of our method:
it refuses the name and shows this text. (By itself it would go on, and load random weights.)"""


@register_quantization_config(METHOD)
class LoftQConfig(QuantizationConfigMixin):
    """What config.json says of a packed backbone.

    Args:
        bits: of each packed module, by its name: its bits a value. All other modules are dense.
        type: the quantizer, see `loftq_exp.loftq.quantizers`.
        block_size: consecutive values that share scales.
        double: whether the scales are quantized themselves.
        scale_dtype: type of the scales, and of the values that the codes stand for.
        version: of the format.
    """

    def __init__(
        self,
        bits: dict[str, int] | None = None,
        type: str = "nf",
        block_size: int = 64,
        double: bool = False,
        scale_dtype: str = "bfloat16",
        version: int = VERSION,
        **unknown: Any,
    ) -> None:
        packing = Packing.of({"bits": bits, "type": type, "block_size": block_size, "double": double,
                              "scale_dtype": scale_dtype, "version": version} | unknown)  # fmt: skip
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enumeration knows its own only
        self.bits, self.type, self.block_size, self.double = (
            packing.bits,
            packing.type,
            packing.block_size,
            packing.double,
        )
        self.scale_dtype, self.version = packing.scale_dtype, VERSION

    def quantizer(self, bits: int) -> Quantizer:
        """The quantizer of the modules with so many bits."""
        return Packing(self.bits, self.type, self.block_size, self.double, self.scale_dtype).quantizer(bits)


@register_quantizer(METHOD)
class LoftQHfQuantizer(HfQuantizer):
    """Puts empty packed layers where the checkpoint has packed weights, and checks what was loaded into them."""

    quantization_config: LoftQConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises UserError where a dense checkpoint is to be packed, which is not done while loading."""
        if not self.pre_quantized:
            raise UserError("quantization_config: LoftQConfig only reads what was packed before; "
                            "the quantize stage of loftq_exp packs a checkpoint")  # fmt: skip

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that is told of the config: takes out what only stops readers who lack this class."""
        if getattr(config, "transformers_weights", None) == NEEDS_US:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> Any:
        modules, layers = dict(model.named_modules()), {}
        for name, bits in self.quantization_config.bits.items():
            found = _module_name(name, model.base_model_prefix, modules)
            if found is None:
                raise UserError(f"quantization_config.bits: {name} is no linear layer of {type(model).__name__}; "
                                "load the class that the checkpoint was made for")  # fmt: skip
            layers[found] = self._packed(modules[found], bits, dtype)
            model.set_submodule(found, layers[found])
            # Some classes draw the weights of all their layers by name (t5), and those that the file has are only then left
            # alone; a packed layer has none to draw.
            for drawn in (layers[found], model.get_submodule(found.rpartition(".")[0])):
                drawn._is_hf_initialized = True
        _check_files(checkpoint_files or (), model.base_model_prefix, layers)
        return model

    def _packed(self, linear: nn.Linear, bits: int, dtype: torch.dtype | None) -> PackedLinear:
        quantizer = self.quantization_config.quantizer(bits)
        has_bias = linear.bias is not None
        return PackedLinear(linear.in_features, linear.out_features, quantizer, has_bias, dtype, "meta")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                # Where a class keeps a module in float32 (t5's wo), transformers widens its scales too; exact either way.
                if not module.quantizer.double:
                    module.scales = module.scales.to(module.quantizer.scale_dtype)
                module.check(name)
        return model

    def is_serializable(self) -> bool:
        """Packed tensors are written as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """An adapter on top of packed layers trains."""
        return True


@wrapt.patch_function_wrapper("transformers.configuration_utils", "PreTrainedConfig.to_diff_dict")
def _stop_other_readers(to_diff_dict: Callable[[], dict[str, Any]], _: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Has config.json stop readers who lack this module, whoever writes it: transformers leaves the setting out."""
    values = to_diff_dict(*args, **kwargs)
    quantization = values.get("quantization_config") or {}
    return values | ({"transformers_weights": NEEDS_US} if quantization.get("quant_method") == METHOD else {})


_TYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of packed tensors, by safetensors' names."""


def _check_files(files: Sequence[str], prefix: str, layers: Mapping[str, PackedLinear]) -> None:
    """Raises UserError where the files do not have what the layers need, before transformers looks at them.

    It would say so in a table, and where it is to ignore mismatched sizes, which it is for a head's sake, not at all.
    """
    found: dict[str, dict[str, tuple[torch.dtype | str, tuple[int, ...]]]] = {name: {} for name in layers}
    renamed = False  # while loading, by transformers
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no dict
                    module, _, part = name.rpartition(".")
                    owner = _module_name(module, prefix, layers)
                    if owner is not None and part in PARTS:
                        header = tensors.get_slice(name)
                        kind = header.get_dtype()
                        found[owner][part] = (_TYPES.get(kind, kind), tuple(header.get_shape()))
                    renamed |= owner is None and part == "qweight"
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); get the file again") from None
    for name, layer in layers.items() if files else ():
        if found[name] or not renamed:
            check_specs(name, found[name], layer.quantizer, layer.shape)


def _module_name(name: str, prefix: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The linear module that the checkpoint calls `name`, in a class with or without a head; None: there is none."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if isinstance(modules.get(candidate), nn.Linear):
            return candidate
    return None
