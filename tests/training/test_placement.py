"""A model that is spread over CPU memory and disk has the scores of one that is not. Several GPUs were not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook

from loftq_exp import compose
from loftq_exp.config import EvaluateConfig
from loftq_exp.errors import UserError
from loftq_exp.training import placement

OFFLOAD = ("evaluate.device_map=auto", "evaluate.max_memory={cpu:130KB}")
"""Memory for the embeddings, or a few layers, of the tiny llama. The rest is read from disk when it is computed."""


def scored(cli: Any, *overrides: str) -> dict[str, Any]:
    outcome = cli(*overrides)
    assert outcome.code == 0, outcome
    (record,) = Path("out/runs").glob("*/metrics.json")
    found = {
        "scores": json.loads(record.read_text())["scores"],
        "samples": (record.parent / "samples.jsonl").read_text(),
    }
    record.parent.rename(f"scored-{len(list(Path().glob('scored-*')))}")
    return found


@pytest.mark.parametrize(
    "storage", [("train.backbone=dense",), ("save_format=packed", "quant.bits=3")], ids=["dense", "packed"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offloaded_scores_are_the_same(
    cli: Any, monkeypatch: pytest.MonkeyPatch, storage: tuple[str, ...], dtype: str
) -> None:
    settings = (*cli.tiny, "train.bf16=false", "output_dir=out", "train.max_steps=1", f"save_dtype={dtype}", *storage)
    base = scored(cli, *settings)
    offloaded, pre_forward = set(), AlignDevicesHook.pre_forward

    def counted(self: AlignDevicesHook, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.offload:
            offloaded.add(id(module))
        return pre_forward(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    assert scored(cli, *settings, *OFFLOAD) == base
    assert len(offloaded) >= 7, "a layer's weights at least"
    assert not list(Path("out/cache").glob(".offload-*"))


@pytest.mark.slow
def test_an_encoder_decoder_generates_the_same(cli: Any, checkpoint: Any) -> None:
    file = Path("rows.jsonl")
    file.write_text(4 * (json.dumps({"document": "Two and two are four.", "summary": "Four."}) + "\n"))
    settings = (*checkpoint("bart"), "task=summarization", "task.name=xsum", f"task.train_file={file}", f"task.eval_file={file}",
                "task.max_source_length=64", "task.max_target_length=16", "train.backbone=dense", "output_dir=out",
                "train.max_steps=1", "quant.rank=4", "device=cpu", "train.bf16=false")  # fmt: skip
    base = scored(cli, *settings)
    assert scored(cli, *settings, *OFFLOAD) == base


def test_bitsandbytes_layers_are_not_offloaded(cli: Any) -> None:
    for backbone in ("bnb4", "auto"):
        line = cli.refused(*cli.tiny, "output_dir=out", "train.max_steps=1", f"train.backbone={backbone}", *OFFLOAD)
        assert line.startswith(
            "evaluate.max_memory: without a GPU it keeps layers on the disk, and bitsandbytes' cannot "
        )
    assert not list(Path("out/runs").glob("*/adapter")), "it is refused before the fine-tune"


@pytest.mark.parametrize(("given", "told"), [
    ({"max_memory": {"cpu": "1GiB"}}, "evaluate.max_memory: evaluate.device_map spreads the layers"),
    ({"device_map": "auto", "max_memory": {"gpu": "1GiB"}}, "evaluate.max_memory.gpu=1GiB: not a device"),
    ({"device_map": "auto", "max_memory": {"0": "much"}}, "evaluate.max_memory.0=much: not a size"),
    ({"device_map": "auto", "max_memory": {"cpu": "1TiB"}}, "evaluate.max_memory.cpu=1TiB: not a size"),
    ({"device_map": "auto", "max_memory": {"cpu": "..GiB"}}, "evaluate.max_memory.cpu=..GiB: not a size"),
    ({"device_map": "auto", "max_memory": {"cpu": "100Gb"}}, "evaluate.max_memory.cpu=100Gb: not a size"),
])  # fmt: skip
def test_what_is_no_placement(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        EvaluateConfig(**given)


def test_what_cannot_be_spread_is_refused_before_the_work(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = cli.refused(
        *cli.tiny, "evaluate.device_map=auto", "model.kind=classification", "task=glue", "task.name=qnli"
    )
    assert "evaluate.device_map=auto: model.kind=classification has a trained head" in line
    line = cli.refused(*cli.tiny, "evaluate.device_map=auto", "evaluate.max_memory={99:1GiB}")
    assert line.startswith("evaluate.max_memory.99: there is no such GPU")
    monkeypatch.setattr(placement.ranks, "count", lambda: 2)
    spread = compose([*cli.tiny, "evaluate.device_map=auto"])
    with pytest.raises(UserError, match=r"^evaluate.device_map=auto: each of 2 processes has a device of its own"):
        placement.check_placement(spread)
