"""An initialised checkpoint as a model that trains: the backbone in 4-bit or dense layers, the adapter on top."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from torch import nn

from loftq_exp.checkpoint.artifact import ADAPTER, Initialised, bnb4_config
from loftq_exp.checkpoint.layout import AUTO_CLASSES
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError


def load_model(
    init: Initialised, adapter: Path | None, config: RunConfig, device: torch.device, dtype: torch.dtype
) -> PeftModel:
    """The backbone of `init` with an adapter: the one in the folder `adapter`, or where it is None the initial factors.

    The adapter's parameters are trainable, in float32; everything else is frozen. Activations are computed in `dtype`.
    """
    load = _load_four_bit if holds_four_bit(init, config, device) else _load_dense
    with _without_bars():
        backbone = load(init, config, device, dtype)
    backbone.config.use_cache = False  # of no use while training; the evaluation turns it on for itself
    return PeftModel.from_pretrained(backbone, str(adapter or init.folder / ADAPTER), is_trainable=True)


def load_tokenizer(init: Initialised, config: RunConfig) -> transformers.PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises UserError where the checkpoint has none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(init.folder, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"model.path={config.model.path}: no tokenizer to be read ({first}); add its files") from None


def holds_four_bit(init: Initialised, config: RunConfig, device: torch.device) -> bool:
    """Whether the run's backbone is held in bitsandbytes 4-bit layers rather than dense ones.

    Raises UserError where it must be and cannot: bitsandbytes 0.50 reads rows that are not whole blocks wrongly on a
    processor with AVX-512, so that no processor is trusted with them.
    """
    broken = [weight for weight in init.report["weights"] if weight["shape"][1] % 64] if device.type == "cpu" else []
    forced = config.train.backbone == "bnb4" or config.save_format == "bnb4"
    if forced and broken:
        name, shape = broken[0]["name"], broken[0]["shape"]
        raise UserError(f"train.backbone=bnb4: {name} has rows of {shape[1]} values, and on a processor bitsandbytes reads only "
                        "whole blocks of 64 right; use train.backbone=dense and save_format=dense")  # fmt: skip
    return forced or (config.train.backbone == "auto" and config.fits_bnb4 and not broken)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hides transformers' bar for loading weights, a matter of seconds, and leaves those for downloads."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _load_dense(init: Initialised, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Any:
    return AUTO_CLASSES[config.model.kind].from_pretrained(
        init.folder, dtype=dtype, device_map={"": device}, trust_remote_code=config.model.trust_remote_code
    )


def _load_four_bit(init: Initialised, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Any:
    # A packed checkpoint brings its own, which even a None here would hide from transformers; a dense one is quantized to
    # the very same values while it loads. (In a wider type than the stored one, 4-bit layers leave out its rounding.)
    packed = config.save_format == "bnb4"
    quantization = {} if packed else {"quantization_config": bnb4_config(init.report["other_linears"], dtype)}
    model = AUTO_CLASSES[config.model.kind].from_pretrained(
        init.folder,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=config.model.trust_remote_code,
        **quantization,
    )
    for weight in init.report["weights"]:
        module = model.get_submodule(weight["name"])
        if type(module) is nn.Linear:  # kept in float32 by its model class, which reads its type: t5's wo
            continue
        if not isinstance(module, Linear4bit):  # transformers leaves subclasses of nn.Linear dense (falcon's)
            module = _packed(module, dtype)
            model.set_submodule(weight["name"], module)
        module.compute_dtype = dtype
        if dtype != torch.bfloat16:
            # On a processor with AVX512_BF16 the layer would compute in bfloat16 while scoring, whatever it was told.
            module.support_avx512bf16_for_cpu = False
    return model


def _packed(linear: nn.Linear, dtype: torch.dtype) -> Linear4bit:
    """A dense linear layer as a 4-bit one of the same values."""
    has_bias = linear.bias is not None
    layer = Linear4bit(
        linear.in_features, linear.out_features, has_bias, dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4")
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.to(linear.weight.device)
