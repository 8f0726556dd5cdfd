"""The number of positions matches the model: one more token is an error inside the model, or is not an error at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from zoo import FAMILIES

from loftq_exp.training.positions import Positions, positions_of

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 29,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "vocab_size": 29, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 29, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "n_ctx": 16}
SIXTEEN: dict[str, Any] = {**SMALL, "max_position_embeddings": 16}

DECODERS_AND_ENCODERS: list[tuple[Any, int | None]] = [
    (hf.BertConfig(**SIXTEEN), 16),
    (hf.RobertaConfig(**SMALL, max_position_embeddings=18, pad_token_id=1), 16),
    (hf.DistilBertConfig(vocab_size=29, dim=16, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16), 16),
    (hf.MPNetConfig(**SMALL, max_position_embeddings=18, pad_token_id=1), 16),
    (hf.YosoConfig(**SIXTEEN), 16),
    (hf.DebertaV2Config(**SIXTEEN, relative_attention=True), 16),
    (hf.DebertaV2Config(**SIXTEEN, relative_attention=True, position_biased_input=False), None),
    (hf.GPT2Config(**GPT), 16),
    (hf.GPTNeoConfig(vocab_size=29, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
                     intermediate_size=16, max_position_embeddings=16), 16),
    (hf.GPTJConfig(**GPT, rotary_dim=4), 16),
    (hf.CodeGenConfig(**(GPT | {"n_head": 4}), rotary_dim=4), 16),
    (hf.OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=16), 16),
    (hf.MptConfig(vocab_size=29, d_model=16, n_layers=1, n_heads=2, max_seq_len=16), 16),
    (hf.BloomConfig(vocab_size=29, hidden_size=16, n_layer=1, n_head=2), None),
    (hf.LlamaConfig(**SIXTEEN), None),
]  # fmt: skip


def computes(model: Any, length: int, **more: Any) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long), **more)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(("config", "expected"), DECODERS_AND_ENCODERS, ids=lambda value: type(value).__name__)
def test_as_many_positions_as_the_model_computes(config: Any, expected: int | None) -> None:
    with torch.device("meta"):
        found = positions_of(hf.AutoModel.from_config(config))
    assert (found.inputs, found.labels) == (expected, None)
    model = hf.AutoModel.from_config(config).eval()
    assert computes(model, expected or 16)
    assert computes(model, (expected or 16) + 1) == (expected is None)


@pytest.mark.parametrize(("config", "inputs", "labels"), [
    (hf.BartConfig(**PAIR, max_position_embeddings=16), 16, 16),
    (hf.MarianConfig(**PAIR, max_position_embeddings=16), 16, 16),
    (hf.LEDConfig(**PAIR, attention_window=8, max_encoder_position_embeddings=32, max_decoder_position_embeddings=16), 32, 16),
    (hf.M2M100Config(**PAIR, max_position_embeddings=16), None, None),
    (hf.T5Config(vocab_size=29, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0), None, None),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_an_encoder_and_its_decoder_have_positions_of_their_own(
    config: Any, inputs: int | None, labels: int | None
) -> None:
    model = hf.AutoModelForSeq2SeqLM.from_config(config).eval()
    assert positions_of(model) == Positions(inputs, labels, None)
    for length, limit in ((inputs or 32, True), ((inputs or 32) + 1, inputs is None)):
        assert computes(model, length, decoder_input_ids=torch.full((1, 4), 5)) == limit
    for length, limit in ((labels or 32, True), ((labels or 32) + 1, labels is None)):
        assert computes(model, 4, decoder_input_ids=torch.full((1, length), 5)) == limit


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """Tables of 64 where the family has some; rotary models say on how many they were trained, and ALiBi's do not."""
    tables = {"bart": Positions(64, 64, None), "roberta": Positions(62, None, None), "bert": Positions(64, None, None),
              "deberta v1": Positions(64, None, None)}  # fmt: skip
    with torch.device("meta"):
        found = positions_of(FAMILIES[family].make())
    rotary = {"llama-2", "mistral", "falcon", "falcon, new decoder", "phi"}
    assert (found.rotary is not None) == (family in rotary)
    assert Positions(found.inputs, found.labels, None) == tables.get(family, Positions(None, None, None))
