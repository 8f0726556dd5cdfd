"""Fixtures: small checkpoints of every family with a tokenizer like the family's own, which a whole run can be started from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from zoo import FAMILIES, seeded

from loftq_exp.tasks.arithmetic import generate

SPECIAL = ("<s>", "</s>", "<pad>")


def without_manifests(folder: Path) -> Path:
    """`folder` as older versions write it. Its files may then be changed to what only the deeper checks notice."""
    for place in folder.rglob("manifest.json"):
        place.unlink()
    return folder


def byte_level_bpe(texts: Sequence[str], size: int, special: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of `size` tokens trained on `texts`, without special tokens in its output yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def pair_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that makes <s> A </s> B </s> of a pair and has a pad token, as encoders' tokenizers do."""
    tokenizer = byte_level_bpe([row["question"] for row in islice(generate("train", 0), 100)], 400, SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    pair_tokenizer: PreTrainedTokenizerFast,
) -> Callable[[str], tuple[str, str]]:
    """Gives the overrides that choose a family's model, with a tokenizer like the one that the family has."""
    made: dict[str, Path] = {}

    def make(name: str) -> tuple[str, str]:
        if name not in made:
            family = FAMILIES[name]
            tokenizer = tiny_tokenizer if family.kind == "causal" else pair_tokenizer
            source = family.make()
            source.config.update(
                {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                 "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": 1, "max_position_embeddings": 164}
            )  # fmt: skip
            if (
                source.config.model_type == "t5"
            ):  # transformers 5.23 cannot generate with a decoder deeper than the encoder
                source.config.num_decoder_layers = source.config.num_layers
            folder = saved(seeded(lambda: type(source)(source.config)), tokenizer, tmp_path_factory.mktemp("family"))
            if (
                name == "roberta"
            ):  # its tokenizer does not mark the texts of a pair: the model has no embeddings for that
                settings = folder / "tokenizer_config.json"
                inputs = {"model_input_names": ["input_ids", "attention_mask"]}
                settings.write_text(json.dumps(json.loads(settings.read_text()) | inputs))
            made[name] = folder
        choice = {"phi": "phi-2"}.get(name, name.replace(",", "").split()[0])
        return f"model={choice}", f"model.path={made[name]}"

    return make
