"""PEFT's flags: each becomes the override that docs/migrating.md names, and the commands run on a tiny llama."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loftq_exp.commands.run import compose
from loftq_exp.config import RunConfig
from loftq_exp.config.schema import dotted_names
from loftq_exp.tasks.arithmetic import generate

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = ("quantize_save_load", "train_gsm8k_llama")
Script = Callable[..., Any]


@pytest.fixture
def script(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A script of examples/, called in this process as `python examples/NAME.py ARGUMENTS`."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_TOKEN", "")  # the scripts set it; this puts it back

    def call(name: str, *arguments: str) -> Any:
        def main() -> None:
            sys.argv = [f"{name}.py", *arguments]
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

        return cli.call(main)

    return call


@pytest.fixture
def translated(script: Script, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """The run that a script makes of its flags, which is not run; the command that it prints is checked to make the same."""

    def translate(name: str, *arguments: str) -> RunConfig:
        monkeypatch.setattr("loftq_exp.commands.run.main", lambda overrides: 0)
        sys.modules.pop("peft_flags", None)
        try:
            outcome = script(name, *arguments)
        finally:
            sys.modules.pop("peft_flags", None)
        assert outcome.code == 0, outcome
        (printed,) = outcome.out.splitlines()
        program, overrides = shlex.split(printed)[:3], shlex.split(printed)[3:]
        assert program == ["python", "-m", "loftq_exp"]
        return compose(overrides)

    return translate


def test_the_example_of_pefts_page_quantizes_what_it_names(translated: Callable[..., RunConfig]) -> None:
    flags = "--model_name_or_path meta-llama/Llama-2-7b-hf --token hf_secret --bits 4 --iter 5 --rank 16 --save_dir model_zoo/loftq/"
    run = translated("quantize_save_load", *flags.split())
    assert run == compose(
        ["model=llama-2", "quant.iter=5", "quant.rank=16", "save_dir=model_zoo/loftq/", "stages=[quantize]"]
    )
    assert str(run.inits_path / run.init_name) == "model_zoo/loftq/Llama-2-7b-hf-4bit-16rank"
    assert os.environ["HF_TOKEN"] == "hf_secret"


def test_the_example_of_pefts_page_trains_what_it_names(translated: Callable[..., RunConfig]) -> None:
    flags = """--model_name_or_path LoftQ/Llama-2-13b-hf-4bit-64rank --output_dir exp_results/lr1e-4 --learning_rate 1e-4
        --weight_decay 0.1 --lr_scheduler_type cosine --num_warmup_steps 100 --seed 202 --dataset_name gsm8k
        --dataset_config main --pad_to_max_length --max_source_length 128 --max_target_length 256 --num_train_epochs 5
        --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 4 --with_tracking
        --report_to tensorboard"""
    run = translated("train_gsm8k_llama", *flags.split())
    assert run == compose([
        "quant=off-the-shelf", "quant.path=LoftQ/Llama-2-13b-hf-4bit-64rank", "model=llama-2", "model.path=Llama-2-13b-hf",
        "task=gsm8k", "output_dir=exp_results/lr1e-4", "train.learning_rate=1e-4", "train.weight_decay=0.1",
        "train.lr_scheduler_type=cosine", "train.warmup_steps=100", "train.warmup_ratio=0", "train.max_grad_norm=0", "seed=202",
        "task.pad_to_max_length=true", "task.max_source_length=128", "task.max_target_length=256", "train.num_train_epochs=5",
        "train.per_device_train_batch_size=4", "train.per_device_eval_batch_size=4", "train.gradient_accumulation_steps=4",
    ])  # fmt: skip
    assert run.plain_label == "Llama-2-13b-hf-4bit-64rank-off-the-shelf-gsm8k"


def test_without_flags_pefts_defaults_hold(translated: Callable[..., RunConfig]) -> None:
    run = translated("quantize_save_load", "--model_name_or_path", "x/t5-small")
    assert (run.quant.bits, run.quant.iter, run.quant.rank, run.save_dir) == (4, 1, 16, "./model_zoo/loftq/")
    assert run.model.kind == "seq2seq"
    run = translated("train_gsm8k_llama", "--model_name_or_path", "somebody/model", "quant.rank=8")
    assert (run.train.learning_rate, run.train.num_train_epochs, run.train.lr_scheduler_type) == (5e-5, 3, "linear")
    assert (run.train.weight_decay, run.train.warmup_steps, run.train.warmup_ratio) == (0, 0, 0)
    assert (run.train.per_device_train_batch_size, run.task.max_source_length, run.task.max_target_length) == (
        8,
        128,
        128,
    )
    assert (run.quant.rank, run.model.basename, run.task.pad_to_max_length) == (8, "model", False)


@pytest.mark.parametrize(("name", "group"), [
    ("mistralai/Mistral-7B", "causal"), ("tiiuae/falcon-7b", "causal"), ("facebook/bart-large", "seq2seq"),
    ("microsoft/deberta-v3-base", "classification"), ("FacebookAI/roberta-base", "classification"), ("bert-base", "classification"),
])  # fmt: skip
def test_the_family_is_taken_from_the_name(translated: Callable[..., RunConfig], name: str, group: str) -> None:
    assert translated("quantize_save_load", "--model_name_or_path", name).model.kind == group


def test_values_with_blanks_and_signs_reach_the_run(translated: Callable[..., RunConfig]) -> None:
    place = "/data/my llamas/{a=1, b}\"'"
    run = translated("quantize_save_load", "--model_name_or_path", place, "--save_dir", "~/out, here")
    assert (run.model.path, run.save_dir) == (place, "~/out, here")


def test_what_the_framework_lacks_is_said_in_one_line(script: Script) -> None:
    model = ("--model_name_or_path", "some/llama-4bit-4rank")
    outcome = script("quantize_save_load", *model, "--bits", "8")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert outcome.err.startswith("error: quant.bits=8: type nf has 2, 3, 4 bits")
    outcome = script("train_gsm8k_llama", *model, "--report_to", "neptune")
    assert outcome.err.startswith(
        "error: train.report_to=neptune: not a choice; choose from: tensorboard, wandb, mlflow"
    )
    outcome = script("train_gsm8k_llama", *model, "--lr_scheduler_type", "cosine_with_restarts")
    assert outcome.err.startswith("error: train.lr_scheduler_type=cosine_with_restarts: not a choice")
    outcome = script("quantize_save_load", "--model_name_or_path", "EleutherAI/gpt-j")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "none of llama, mistral, falcon, " in outcome.err


def test_quantize_then_train_on_a_tiny_llama(script: Script, tiny_llama_dir: Path) -> None:
    model = ("--model_name_or_path", str(tiny_llama_dir), "--token", "hf_secret")
    outcome = script("quantize_save_load", *model, "--rank", "4", "--iter", "2", "--save_dir", "zoo", "device=cpu")
    assert outcome.code == 0, outcome
    assert outcome.out.startswith(
        f"python -m loftq_exp model=llama-2 model.path={tiny_llama_dir} quant.bits=4 quant.iter=2 "
    )
    (checkpoint,) = (path.parent for path in Path("zoo").glob("*/init_report.json"))
    assert checkpoint.name == f"{tiny_llama_dir.name}-4bit-4rank"
    Path("rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row, _ in zip(generate("train", 0), range(8), strict=False))
    )
    flags = f"""--model_name_or_path {checkpoint} --train_file rows.jsonl --validation_file rows.jsonl --output_dir out
        --max_source_length 64 --max_target_length 8 --num_train_epochs 1 --per_device_train_batch_size 4 --with_tracking"""
    trained = script("train_gsm8k_llama", *flags.split(), "device=cpu")
    assert trained.code == 0, trained
    (record,) = Path("out/runs").glob("*/metrics.json")
    metrics = json.loads(record.read_text())
    assert metrics["finetune"]["steps"] == 2
    assert metrics["model"]["requested"] == str(checkpoint)
    nlls = [json.loads(line)["nll"] for line in (record.parent / "samples.jsonl").read_text().splitlines()]
    assert len(nlls) == 8
    assert metrics["scores"]["nll"] == pytest.approx(sum(nlls) / 8), "each target is cut to the same 8 tokens"
    written = [path for place in ("zoo", "out", "outputs") for path in Path(place).rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in written)
    assert "hf_secret" not in outcome.out + outcome.err + trained.out + trained.err


def test_the_page_lists_every_flag_with_its_override() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text()
    rows = dict(re.findall(r"^\| `--(\w+)` \| `([\w.]+)=`", page, re.MULTILINE))
    listed: dict[str, str] = {}
    sys.path.insert(0, str(EXAMPLES))
    try:
        for name in SCRIPTS:
            table = runpy.run_path(str(EXAMPLES / f"{name}.py"))["OVERRIDES"]
            listed |= {flag: setting for flag, setting in table.items() if flag != "model_name_or_path"}
            assert set(table.values()) <= set(dotted_names(RunConfig))
    finally:
        sys.path.remove(str(EXAMPLES))
    assert rows == listed
