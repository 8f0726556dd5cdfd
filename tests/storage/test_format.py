"""Every storage format with the quantizers that it can hold."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from loftq_exp.errors import UserError
from loftq_exp.loftq import make_quantizer
from loftq_exp.schemes import BITS_OF_TYPE, BLOCKLESS_TYPES, FORMATS, Scheme
from loftq_exp.storage.codes import pack_codes
from loftq_exp.storage.format import Codes, DamagedWeight, format_of, storage_format

MODULE, NAME, SHAPE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight", (96, 128)
SCHEMES = [
    (Scheme(kind, (bits,), 64, double), bits)
    for kind, widths in BITS_OF_TYPE.items()
    if kind != "none"
    for bits in sorted({widths[0], widths[-1]})  # those between add kernels to compile, no other code
    for double in ((False,) if kind in BLOCKLESS_TYPES else (False, True))
]
SCHEMES += [(Scheme("nf", (bits,), 64, double, "optimal"), bits) for bits in (2, 3, 4) for double in (False, True)]
HELD = [(name, scheme, bits) for name in FORMATS for scheme, bits in SCHEMES if FORMATS[name].holds(scheme)]


@pytest.mark.parametrize("name", FORMATS)
def test_no_value_that_a_format_can_hold_moves(name: str) -> None:
    form, dtype, seen = storage_format(name), torch.bfloat16, 0
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for held, scheme, bits in HELD:
        if held != name:
            continue
        levels, scale = scheme.levels, "search" if scheme.levels == "optimal" else "absmax"
        quantizer = make_quantizer(scheme.type, bits, scheme.block_size, dtype, scheme.double, levels, scale)
        quantized = quantizer.encode(weight)
        codes = Codes(pack_codes(quantized.codes, bits), quantized.scales, SHAPE, quantizer)
        tensors = form.encode(NAME, codes, dtype)
        specs = form.specs(NAME, SHAPE, quantizer, dtype)
        assert {part: (spec.dtype, spec.shape) for part, spec in specs.items()} == {
            part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()
        }
        parts = form.parts(NAME, [*tensors, "model.layers.0.mlp.down_proj.weight", "lm_head.weight"])
        assert set(parts) == set(tensors)
        assert any(part == f"{MODULE}.{form.first_part}" for part in parts)
        settings = json.loads(json.dumps(as_dict(form.quantization_config(scheme, {MODULE: bits}, [], dtype))))
        assert format_of(settings) is form
        assert form.modules(settings) is None or set(form.modules(settings)) == {MODULE}
        values = form.values(MODULE, NAME, tensors, SHAPE, form.quantizer_of(MODULE, settings))
        assert values.dtype == torch.float32
        assert torch.equal(values, quantizer.decode_stored(quantized)), (scheme, bits)
        seen += 1
    assert seen == {"dense": len(SCHEMES), "packed": len(SCHEMES), "bnb4": 5}[name]


def as_dict(settings: object) -> dict[str, object]:
    if isinstance(settings, transformers.BitsAndBytesConfig):
        return settings.to_dict()
    assert settings is None or isinstance(settings, dict)
    return settings or {}


@pytest.mark.parametrize("name", [name for name in FORMATS if storage_format(name).takes_values])
def test_values_that_no_quantizer_made_come_near(name: str) -> None:
    form, values = storage_format(name), torch.linspace(-1, 1, 96 * 128).reshape(SHAPE)
    tensors = form.encode_values(NAME, values)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in tensors.items()} == {
        part: (spec.dtype, spec.shape) for part, spec in form.specs(NAME, SHAPE, None, torch.float32).items()
    }
    found = form.values(MODULE, NAME, tensors, SHAPE, None)
    assert float((found - values).abs().max()) <= (0.0 if form.plain else 0.16)


def test_codes_alone_cannot_stand_for_any_values() -> None:
    with pytest.raises(NotImplementedError, match="packed stores no values"):
        storage_format("packed").encode_values(NAME, torch.zeros(SHAPE))


@pytest.mark.parametrize("name", ["dense", "bnb4"])
def test_a_weight_of_another_shape_is_damaged(name: str) -> None:
    form = storage_format(name)
    tensors = form.encode_values(NAME, torch.zeros(SHAPE))
    with pytest.raises(DamagedWeight, match=r"is torch.float32 \(96, 128\), not \(128, 96\)"):
        form.values(MODULE, NAME, tensors, SHAPE[::-1], None)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(UserError, match="storage format 'gguf': unknown; choose one of dense, bnb4, packed"):
        storage_format("gguf")
    assert format_of({"quant_method": "gptq"}).name == "dense"
