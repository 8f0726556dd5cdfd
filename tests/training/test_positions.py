from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, BartConfig, BertConfig, LlamaConfig, RobertaConfig

from loftq_exp.errors import UserError
from loftq_exp.training.positions import check_positions

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(**SMALL, max_position_embeddings=16), 16),
        (RobertaConfig(**SMALL, max_position_embeddings=18, pad_token_id=1), 16),
        (BartConfig(vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
                    encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16), 16),
        (LlamaConfig(**SMALL, max_position_embeddings=16), None),
    ],
)  # fmt: skip
def test_as_many_positions_as_the_model_reads(config: object, positions: int | None) -> None:
    model = AutoModel.from_config(config).eval()
    check_positions(model, [{"input_ids": [5] * 16}, {"input_ids": [5] * 3, "labels": 7}])
    model(input_ids=torch.full((1, 16), 5))
    if positions is None:
        check_positions(model, [{"input_ids": [5] * 99}])
        return
    with pytest.raises(UserError, match="examples of 17 tokens, and the model reads 16 at most"):
        check_positions(model, [{"input_ids": [5], "labels": [5] * 17}])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 17), 5))
