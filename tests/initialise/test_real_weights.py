"""Real weights on real text: whether LoftQ starts nearer to the pre-trained model's outputs than QLoRA."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from loftq_exp.commands.run import compose
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import Source, locate
from loftq_exp.training.load import load_model

METHODS = {"QLoRA": ["quant=qlora"], "LoftQ, 1 step": ["quant.iter=1"], "LoftQ, 5 steps": ["quant.iter=5"]}
CPU = torch.device("cpu")

# Nearer as distributions: the divergence from the pre-trained model's next token is 18.5, 6.9 and 6.5 nats.
NOT_NEARER = pytest.mark.xfail(strict=True, reason="measured: QLoRA 1.165, LoftQ 1.202 after 1 step, 1.168 after 5")


def paragraphs(shared_data: Path) -> list[str]:
    """The first long paragraphs of WikiText-2's test part."""
    lines = (shared_data / "wikitext-2" / "test.raw.txt").read_text(encoding="utf-8").splitlines()
    return list(islice((line.strip() for line in lines if len(line) > 400), 16))


def outputs(overrides: list[str], source: Source, texts: list[str]) -> torch.Tensor:
    """What the initialised model computes of each token, in float32: a decoder's logits, an encoder's last hidden states.

    MiniLM comes without a head. Two logits of a new one are two random directions, in which chance decides what is nearer.
    """
    config = compose(overrides)
    model = load_model(initialise(source, config), None, config, CPU, torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    found = []
    for text in texts:
        batch: Any = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        found.append(out.logits[0] if config.model.kind == "causal" else out.hidden_states[-1][0])
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rank", "bits"),
    [("minilm", 16, 4), ("minilm", 16, 2), ("smollm2", 64, 4), pytest.param("smollm2", 64, 2, marks=NOT_NEARER)],
)
def test_loftq_starts_nearer_to_the_pretrained_model_than_qlora(
    model: str, rank: int, bits: int, shared_data: Path, tmp_path: Path
) -> None:
    common = [f"model={model}", f"quant.rank={rank}", "device=cpu", "stages=[quantize]", "train.backbone=dense",
              "save_dtype=float32", f"output_dir={tmp_path}"]  # fmt: skip
    source = locate(compose(common).model, tmp_path / "cache")
    texts = paragraphs(shared_data)
    # 16-bit LoRA starts at the pre-trained model itself.
    expected = outputs([*common, "quant=lora"], source, texts)
    distance = {}
    for name, quant in METHODS.items():
        found = outputs([*common, *quant, f"quant.bits={bits}"], source, texts)
        distance[name] = float((found - expected).norm() / expected.norm())
    sys.stdout.write(f"\n{model}, NF{bits}, rank {rank}, ||output - pre-trained|| / ||pre-trained||: {distance}\n")
    assert distance["LoftQ, 5 steps"] < distance["LoftQ, 1 step"] < distance["QLoRA"]
