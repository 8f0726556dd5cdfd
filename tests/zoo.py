"""Small models of every family, from its real config class, with the results that tests expect of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from loftq_exp.config import RunConfig

DECODER: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.1,
}  # fmt: skip
FALCON: dict[str, Any] = {key: value for key, value in DECODER.items() if key != "intermediate_size"}
ENCODER: dict[str, Any] = {**DECODER, "max_position_embeddings": 64}
RELATIVE: dict[str, Any] = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
V3: dict[str, Any] = {
    **RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 16,
    "position_biased_input": False,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 96, "d_model": 64, "max_position_embeddings": 64, "scale_embedding": True, "init_std": 0.1,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
    "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 128,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
GATED: dict[str, Any] = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def sized(config: dict[str, Any], layers: int | None = None, spread: float | None = None) -> dict[str, Any]:
    """The same config with another number of layers in each stack, and another spread of its drawn values."""
    changes: dict[str, Any] = {}
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if layers is not None and name in config:
            changes[name] = layers
    for name in ("initializer_range", "init_std"):
        if spread is not None and name in config:
            changes[name] = spread
    return config | changes


def llama(**changes: Any) -> hf.LlamaForCausalLM:
    """A Llama of `DECODER`'s sizes, which `changes` may change."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER | changes))


@dataclass(frozen=True)
class Family:
    """A pre-trained model, the class that loads it, and the expected results, counted by hand."""

    make: Callable[[], hf.PreTrainedModel]
    kind: str
    linears: int
    """Linear layers in all blocks."""
    left_dense: int = 0
    """Of these, how many transformers loads only as dense layers."""
    head: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameters that are trained beside the factors."""


CLASSIFIER = {"classifier.weight": (2, 64), "classifier.bias": (2,)}
DENSE = {"weight": (64, 64), "bias": (64,)}
POOLED = {f"pooler.dense.{name}": shape for name, shape in DENSE.items()} | CLASSIFIER
ROBERTA_HEAD = {f"classifier.dense.{name}": shape for name, shape in DENSE.items()}
ROBERTA_HEAD |= {"classifier.out_proj.weight": (2, 64), "classifier.out_proj.bias": (2,)}

FAMILIES = {
    "llama-2": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), "causal", 2 * 7),
    "mistral": Family(
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=16)), "causal", 2 * 7
    ),
    "falcon": Family(  # one key-value head for all, attention beside the feed-forward part, as falcon-7b
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, multi_query=True, parallel_attn=True)), "causal", 2 * 4, 2 * 4
    ),
    "falcon, one after the other": Family(  # as falcon-rw
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True)
        ), "causal", 2 * 4, 2 * 4,
    ),
    "falcon, new decoder": Family(  # as falcon-40b
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
        "causal", 2 * 4, 2 * 4,
    ),
    "phi": Family(lambda: hf.PhiForCausalLM(hf.PhiConfig(**DECODER)), "causal", 2 * 6),
    "bart": Family(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "seq2seq", 2 * 6 + 3 * 10),
    "t5": Family(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "seq2seq", 2 * 6 + 3 * 10, 5),
    "t5 v1.1": Family(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**GATED)), "seq2seq", 2 * 7 + 3 * 11, 5),
    "deberta v1": Family(
        lambda: hf.DebertaForMaskedLM(hf.DebertaConfig(**RELATIVE)), "classification", 2 * 6, head=POOLED
    ),
    "deberta v3": Family(
        lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**V3)), "classification", 2 * 6, head=POOLED
    ),
    "bert": Family(
        lambda: hf.BertForPreTraining(hf.BertConfig(**ENCODER, type_vocab_size=2)), "classification", 2 * 6, head=CLASSIFIER
    ),
    "roberta": Family(
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER, type_vocab_size=1, pad_token_id=1)),
        "classification", 2 * 6, head=ROBERTA_HEAD,
    ),
}  # fmt: skip


def seeded(make: Callable[[], hf.PreTrainedModel]) -> hf.PreTrainedModel:
    """The model with values that depend on nothing else, biases and norms other than zero and one among them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        for value in model.parameters():
            if value.ndim == 1:
                value.data.add_(torch.randn_like(value), alpha=0.1)
    return model


def with_tokenizer(
    model: Callable[[], hf.PreTrainedModel], tokenizer: hf.PreTrainedTokenizerBase, folder: Path
) -> Path:
    """`folder` with the model, drawn from seed 0, and the tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantize_config(folder: Path, root: Path, kind: str, save_format: str, **changes: Any) -> RunConfig:
    """Settings that initialise the model in `folder`, everything under `root`; __ in the changes stands for a dot."""
    values: dict[str, Any] = {
        "model": {"path": str(folder), "kind": kind}, "task": {"kind": "gsm8k"}, "train": {}, "stages": ["quantize"],
        "quant": {"method": "loftq", "type": "nf", "bits": 2, "rank": 8, "iter": 1}, "device": "cpu",
        "save_dir": str(root / save_format), "cache_dir": str(root / "cache"), "save_format": save_format,
    }  # fmt: skip
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (values[group] if group else values)[key] = value
    return RunConfig.from_mapping(values)


GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2}
MIXTURE: dict[str, Any] = {**GROUPED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **DECODER, "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
HYBRID: dict[str, Any] = {
    **{key: value for key, value in GROUPED.items() if key != "intermediate_size"}, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
NEO: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128,
                       "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 16}  # fmt: skip

CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama 3.2": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=16),
    "ministral": lambda: hf.MinistralConfig(**GROUPED, head_dim=16),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=16),
    "gemma 1": lambda: hf.GemmaConfig(**GROUPED, head_dim=16),
    "gemma 2": lambda: hf.Gemma2Config(**GROUPED, head_dim=16),
    "gemma 3": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=16),
    "phi": lambda: hf.PhiConfig(**DECODER),
    "phi3": lambda: hf.Phi3Config(**GROUPED, pad_token_id=0),
    "opt": lambda: hf.OPTConfig(vocab_size=96, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                                max_position_embeddings=64, word_embed_proj_dim=64),
    "gptj": lambda: hf.GPTJConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    "gpt-neo": lambda: hf.GPTNeoConfig(**NEO),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**DECODER),
    "gpt2": lambda: hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "bloom": lambda: hf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    "mpt": lambda: hf.MptConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4),
    "falcon": lambda: hf.FalconConfig(**FALCON, multi_query=True, parallel_attn=True),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "granite": lambda: hf.GraniteConfig(**GROUPED),
    "starcoder2": lambda: hf.Starcoder2Config(**GROUPED),
    "stablelm": lambda: hf.StableLmConfig(**GROUPED),
    "cohere": lambda: hf.CohereConfig(**GROUPED),
    "glm4": lambda: hf.Glm4Config(**GROUPED, head_dim=16, pad_token_id=0),
    "smollm3": lambda: hf.SmolLM3Config(**GROUPED, pad_token_id=0),
    "exaone4": lambda: hf.Exaone4Config(**GROUPED, sliding_window=16),
    "mixtral": lambda: hf.MixtralConfig(**LOCAL),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**MIXTURE, shared_expert_intermediate_size=64),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**MIXTURE | {"head_dim": 16}),
    "qwen3.5": lambda: hf.Qwen3_5TextConfig(**HYBRID, intermediate_size=128),
    "qwen3.5-moe": lambda: hf.Qwen3_5MoeTextConfig(**HYBRID, moe_intermediate_size=32, shared_expert_intermediate_size=64,
                                                   num_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: hf.OlmoeConfig(**{key: value for key, value in MIXTURE.items() if "moe" not in key}),
    "gpt-oss": lambda: hf.GptOssConfig(**LOCAL, head_dim=16),
    "granite-moe": lambda: hf.GraniteMoeConfig(**LOCAL),
    "deepseek-v3": lambda: hf.DeepseekV3Config(**LATENT),
    "mamba": lambda: hf.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2),
    "mamba2": lambda: hf.Mamba2Config(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, n_groups=1),
    "jamba": lambda: hf.JambaConfig(**{**DECODER, "num_hidden_layers": 4}),
    "rwkv": lambda: hf.RwkvConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, intermediate_size=128),
    "xlnet": lambda: hf.XLNetConfig(vocab_size=96, d_model=64, n_layer=2, n_head=4, d_inner=128),
}  # fmt: skip
"""Decoders of today by class, in small; docs/models.md lists them."""

MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    name: functools.partial(lambda config: hf.AutoModelForCausalLM.from_config(config()), config)
    for name, config in CONFIGS.items()
}
