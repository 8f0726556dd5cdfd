"""Write a decoder as one GGUF, the format of llama.cpp, tensor by tensor, with the `gguf` package's writer and names.

llama.cpp computes some families from differently stored weights: llama's rotary halves are interleaved in q and k, and
gemma's norms hold weight + 1. It also fixes some properties of a family in its code. A config that differs from those is
refused, since llama.cpp would compute something else without an error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from loftq_exp.artifact.gguf_tokenizer import add_tokenizer
from loftq_exp.errors import UserError

log = logging.getLogger(__name__)

_Type = gguf.GGMLQuantizationType
TYPES = {
    "float32": (_Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (_Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (_Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""The type of matrices in the file, and the name of the file's type. Vectors are always float32."""
_CHUNK = 1 << 24
"""Values that are quantized at once, as numpy makes several copies of them."""


@dataclass(frozen=True)
class _Family:
    """What llama.cpp assumes of a model type."""

    arch: gguf.MODEL_ARCH
    activation: str
    interleaved: bool = False
    """Whether q and k are stored with interleaved rotary halves."""
    norm_offset: float = 0.0
    """What is added to the weights of norms."""
    period: int = 0
    """Every so many layers one attends to all tokens; 0: all layers do."""


FAMILIES = {
    "llama": _Family(gguf.MODEL_ARCH.LLAMA, "silu", interleaved=True),
    "mistral": _Family(gguf.MODEL_ARCH.LLAMA, "silu", interleaved=True),
    "qwen2": _Family(gguf.MODEL_ARCH.QWEN2, "silu"),
    "qwen3": _Family(gguf.MODEL_ARCH.QWEN3, "silu"),
    "gemma2": _Family(gguf.MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", norm_offset=1.0, period=2),
    "gemma3_text": _Family(gguf.MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", norm_offset=1.0, period=6),
}
"""By model type."""


def check_config(config: transformers.PretrainedConfig) -> None:
    """Raise UserError if llama.cpp would not compute this model, or not in the same way."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"--to=gguf: model type {config.model_type} is not written; it is written for {', '.join(FAMILIES)}"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise _differs(config, "activation", activation, family.activation)
    if family.period:
        layers = list(config.layer_types)
        usual = ["full_attention" if number % family.period == family.period - 1 else "sliding_attention"
                 for number in range(len(layers))]  # fmt: skip
        if layers != usual:
            raise _differs(config, "layer_types", layers, f"full_attention at every {family.period}th layer")
        head, usual_scale = _head(config), (config.head_dim, config.hidden_size // config.num_attention_heads)
        # llama.cpp recognises the 27B models, which divide by the second number, by their number of layers.
        expected = usual_scale[1] if (config.model_type, len(layers)) in (("gemma2", 46), ("gemma3_text", 62)) else head
        if config.query_pre_attn_scalar != expected:
            raise _differs(config, "query_pre_attn_scalar", config.query_pre_attn_scalar, expected)
    elif getattr(config, "sliding_window", None) and config.sliding_window < config.max_position_embeddings:
        log.warning("gguf: llama.cpp attends to all tokens of a %s model, and this one to the last %d only: longer texts give "
                    "other outputs", config.model_type, config.sliding_window)  # fmt: skip
    if getattr(config, "use_bidirectional_attention", False):
        raise _differs(config, "use_bidirectional_attention", True, False)
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping:
        raise _differs(config, "attn_logit_softcapping", config.attn_logit_softcapping, None)
    rope, _ = _rope(config)
    known = ("default", "linear") if family.period else ("default", "linear", "yarn", "llama3")
    if rope.get("rope_type", "default") not in known:
        raise _differs(config, "rope_type", rope["rope_type"], " or ".join(known))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise _differs(config, "partial_rotary_factor", rope["partial_rotary_factor"], 1)


def _differs(config: transformers.PretrainedConfig, name: str, found: Any, needed: Any) -> UserError:
    return UserError(f"--to=gguf: {name}={found} in config.json, and llama.cpp computes a {config.model_type} model with {needed}; "
                     "use --to dense")  # fmt: skip


def write_gguf(
    place: Path,
    config: transformers.PretrainedConfig,
    tokenizer: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], torch.Tensor],
    kind: str,
    name: str,
) -> None:
    """Write the model with these parameters to the new file `place`.

    Args:
        config: the model's config, which `check_config` accepted.
        tokenizer: a folder with its tokenizer.
        shapes: the shape of each parameter, by its name in the model.
        values: a parameter's values. Each is read once, in the order of `shapes`.
        kind: the type of matrices, one of TYPES.
        name: the model's name in the file.

    Raises UserError if the tokenizer has no form in GGUF, or a value is not finite in the type.
    """
    family = FAMILIES[config.model_type]
    names = _names(config, family, shapes)
    tied = bool(config.tie_word_embeddings)
    written = {own: stored for own, stored in names.items() if not (tied and stored == "output.weight")}
    writer = gguf.GGUFWriter(place, gguf.MODEL_ARCH_NAMES[family.arch])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_config(writer, config, family)
        add_tokenizer(writer, tokenizer, shapes["model.embed_tokens.weight"][0])
        factors = _rope_factors(config)
        types = {own: _type_of(stored, shapes[own], kind) for own, stored in written.items()}
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes, _Type.F32)
        for own, stored in written.items():
            shape, dtype, size = _form(shapes[own], types[own])
            writer.add_tensor_info(stored, shape, dtype, size, types[own])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for own, stored in written.items():
            writer.write_tensor_data(_encoded(own, _as_stored(stored, values(own).float(), config, family), types[own]))
    finally:
        writer.close()
    if wide := sum(found is _Type.F16 for found in types.values() if kind == "q8_0"):
        log.warning("gguf: %d matrices are written in float16, as their rows are no multiple of 32 values", wide)


def _names(config: Any, family: _Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The name in GGUF of each parameter. Raises UserError for a parameter without one."""
    known = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    names = {own: known.get_name(own, try_suffixes=(".weight", ".bias")) for own in shapes}
    for own, stored in names.items():
        if stored is None:
            raise UserError(
                f"--to=gguf: {own} has no place in a GGUF of model type {config.model_type}; use --to dense"
            )
    return {own: str(stored) for own, stored in names.items()}


def _add_config(writer: gguf.GGUFWriter, config: Any, family: _Family) -> None:
    """Add the model's dimensions and constants to the header."""
    head = _head(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    if family.period:
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    rope, local = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if local is not None:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                         ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                         ("beta_slow", writer.add_rope_scaling_yarn_beta_slow)):  # fmt: skip
            if rope.get(key) is not None:
                add(rope[key])


def _head(config: Any) -> int:
    """The values of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotary settings of layers that attend to all tokens, and of the others if they have their own."""
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:
        return dict(rope["full_attention"]), dict(rope["sliding_attention"])
    return rope, None


def _rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Llama 3.1's divisors of the rotary frequencies, (head / 2,) in float32; None for other models.

    As transformers' `_compute_llama3_parameters`: low frequencies are divided by `factor`, high ones kept, others in between.
    """
    rope, _ = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    head, window = _head(config), rope["original_max_position_embeddings"]
    low, high = window / rope["low_freq_factor"], window / rope["high_freq_factor"]
    divisors = []
    for pair in range(0, head, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (pair / head)
        share = (window / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        between = 1 / ((1 - share) / rope["factor"] + share)
        divisors.append(1.0 if length < high else rope["factor"] if length > low else between)
    return np.array(divisors, dtype=np.float32)


def _type_of(stored: str, shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """The type of one tensor. llama.cpp needs vectors in float32, and whole blocks of 32 values in a row of Q8_0."""
    if len(shape) == 1 or stored.endswith("_norm.weight"):
        return _Type.F32
    chosen = TYPES[kind][0]
    return _Type.F16 if chosen is _Type.Q8_0 and shape[-1] % 32 else chosen


def _form(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> tuple[tuple[int, ...], Any, int]:
    """Shape, numpy type and bytes of an encoded tensor."""
    if kind in (_Type.F32, _Type.F16):
        dtype: Any = np.dtype(np.float32 if kind is _Type.F32 else np.float16)
        return shape, dtype, math.prod(shape) * dtype.itemsize
    stored = gguf.quant_shape_to_byte_shape(shape, kind)
    return stored, np.dtype(np.uint8), math.prod(stored)


def _as_stored(stored: str, values: torch.Tensor, config: Any, family: _Family) -> torch.Tensor:
    """A parameter's values as llama.cpp reads them."""
    if family.interleaved and (".attn_q." in stored or ".attn_k." in stored):
        heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)
    return values + family.norm_offset if stored.endswith("norm.weight") else values


def _encoded(name: str, values: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The values in a type. Raises UserError if they are not finite in it."""
    largest = float(values.abs().max())
    if not math.isfinite(largest):
        raise UserError(f"{name}: NaN or infinite values; the adapter's training diverged, or a file is damaged")
    if kind in (_Type.F16, _Type.Q8_0) and largest > (65504 if kind is _Type.F16 else 65504 * 127):
        raise UserError(f"--dtype: {name} has values up to {largest:.3g}, beyond {kind.name}; use bfloat16 or float32")
    array = values.contiguous().numpy()
    if array.ndim == 1:
        return gguf.quantize(array, kind)
    rows = max(1, _CHUNK // array.shape[1])
    return np.concatenate([gguf.quantize(array[start : start + rows], kind) for start in range(0, len(array), rows)])
