"""Bad input and failures, through the whole command: one error line, a non-zero exit code, and no partial output."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    CTRLConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from loftq_exp import compose
from loftq_exp.training.preflight import check_optimiser

QUANTIZE = "stages=[quantize]"


def files(folder: Path) -> list[str]:
    """Every file below `folder`, but for locks, which are empty and stay."""
    if not folder.is_dir():
        return []
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(".lock"))


def leftovers(folder: Path) -> list[str]:
    """What is half written, or would be taken for a result, below `folder`; a run's settings and manifest are neither."""
    neither = ("config.json", "manifest.json")
    return [name for name in files(folder) if not name.startswith("cache/") and Path(name).name not in neither]


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp", ".replaced"))]


# The model ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama, to be damaged."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in shards."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="100KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    return model


def refused_model(cli: Any, model: Path, *more: str) -> str:
    message: str = cli.refused(*cli.tiny, f"model.path={model}", QUANTIZE, *more)
    assert leftovers(Path("outputs")) == []
    return message


def test_a_model_folder_that_does_not_exist(cli: Any, tmp_path: Path) -> None:
    assert refused_model(cli, tmp_path / "nowhere").startswith(f"model.path={tmp_path}/nowhere: there is no folder")
    assert not Path("outputs").exists()


def test_an_empty_model_folder(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused_model(cli, tmp_path / "empty")
    assert not Path("outputs").exists()


def test_a_config_without_weights(cli: Any, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "has a config but no weights" in refused_model(cli, model)


def test_a_missing_shard(cli: Any, sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name} (1 of " in refused_model(cli, sharded)


@pytest.mark.parametrize("kept", [0, 5, 1000, 200_000])
def test_a_truncated_file(cli: Any, model: Path, kept: int) -> None:
    os.truncate(model / "model.safetensors", kept)
    message = refused_model(cli, model)
    assert message.startswith(f"model.path: {model / 'model.safetensors'} ")
    assert "download it again" in message


@pytest.mark.parametrize(("value", "quant"), [(float("nan"), "loftq"), (float("inf"), "qlora")])
def test_weights_that_are_not_finite_are_named(cli: Any, model: Path, value: float, quant: str) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    message = refused_model(cli, model, f"quant={quant}")
    assert "tensor model.layers.1.mlp.down_proj.weight" in message
    assert "NaN or infinite" in message


def rewrite_config(model: Path, **settings: Any) -> None:
    place = model / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | settings))


@pytest.mark.parametrize(("settings", "message"), [
    ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "the weights have another architecture than config.json"),
    ({"hidden_size": 128}, "config.json expects (64, 128)"),
    ({"num_hidden_layers": 3}, "no weight named model.layers.2."),
    ({"model_type": "t5"}, "model.kind=causal: a t5 checkpoint"),
    ({"model_type": "no-such-type"}, "transformers cannot read the config"),
    ({"model_type": None}, "transformers cannot read the config"),
    ({"hidden_act": "no-such-activation"}, "no-such-activation"),
    ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
    ({"vocab_size": "many"}, "vocab_size"),
])  # fmt: skip
def test_a_config_of_something_else(cli: Any, model: Path, settings: dict[str, Any], message: str) -> None:
    rewrite_config(model, **settings)
    assert message in refused_model(cli, model)


def test_a_config_that_is_not_json(cli: Any, model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "lla')
    assert "is not readable JSON" in refused_model(cli, model)


@pytest.mark.parametrize("kind", ["seq2seq", "classification"])
def test_a_model_of_another_kind(cli: Any, model: Path, kind: str) -> None:
    outcome = cli(*cli.tiny, f"model.path={model}", f"model.kind={kind}", QUANTIZE)
    if kind == "seq2seq":
        assert outcome.err.startswith("error: model.kind=seq2seq: a llama checkpoint")
    else:
        assert outcome.code == 0  # a llama can classify


def test_a_model_without_tokenizer(cli: Any, model: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()
    message = cli.refused(*cli.tiny, f"model.path={model}")
    assert message.startswith(f"model.path={model}: no readable tokenizer")


# The settings that only the checkpoint can refuse ---------------------------------------------------------------------


def test_a_rank_over_every_dimension(cli: Any, tiny_llama_dir: Path) -> None:
    message = refused_model(cli, tiny_llama_dir, "quant.rank=100000")
    assert message.startswith("quant.rank=100000: no weight has such a rank, model.layers.0.self_attn.")
    assert message.endswith("choose a rank of at most 64")
    assert cli(*cli.tiny, QUANTIZE, "quant.rank=32").code == 0


def test_a_block_size_that_does_not_divide(cli: Any, tiny_llama_dir: Path) -> None:
    message = refused_model(cli, tiny_llama_dir, "quant.block_size=4096")  # a key projection is 32 x 64
    assert message.startswith(
        "quant.block_size=4096: does not divide the 2048 values of model.layers.0.self_attn.k_proj"
    )


def test_five_bits_with_nf(cli: Any, tiny_llama_dir: Path) -> None:
    assert refused_model(cli, tiny_llama_dir, "quant.bits=5").startswith("quant.bits=5: type nf has 2, 3, 4 bits")
    assert not Path("outputs").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps"])
def test_an_unknown_device(cli: Any, device: str) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there are CUDA devices here")
    assert cli.refused(*cli.tiny, f"device={device}").startswith(f"device={device}: ")
    assert not Path("outputs").exists()


def test_a_task_that_does_not_fit_the_model(cli: Any) -> None:
    message = cli.refused("model=bert", "task=gsm8k")
    assert message.startswith("task=gsm8k: needs a causal model, model.kind is classification; these fit: ")
    assert "causal with gsm8k, arithmetic, commonsense, " in message
    assert "classification with anli, glue; question-answering with squad; choose another" in message
    message = cli.refused("model=llama-2", "task=glue", "task.name=rte")
    assert message.startswith("task=glue: needs a classification model, model.kind is causal; these fit: ")
    assert not Path("outputs").exists()


@pytest.mark.parametrize("stages", ["finetune", "evaluate"])
def test_later_stages_without_a_checkpoint(cli: Any, stages: str) -> None:
    message = cli.refused(*cli.tiny, f"stages=[{stages}]")
    assert message.startswith(f"stages=[{stages}]: there is no initialised checkpoint at outputs/inits/")
    assert message.endswith("; add quantize to stages")
    assert not Path("outputs").exists()


def test_later_stages_on_a_checkpoint_of_other_settings(cli: Any) -> None:
    """One save_dir holds one initialisation of a model at a width and rank: another method's must not be trained as ours."""
    assert cli(*cli.tiny, QUANTIZE, "save_dir=kept").code == 0
    message = cli.refused(*cli.tiny, "stages=[finetune]", "save_dir=kept", "quant=qlora")
    assert message.startswith("quant.method=qlora: the checkpoint at kept/tiny-llama0-4bit-4rank was made with loftq")
    assert cli(*cli.tiny, "stages=[evaluate]", "save_dir=kept").code == 0


def test_a_report_that_is_damaged(cli: Any) -> None:
    cli(*cli.tiny, QUANTIZE, "save_dir=kept")
    (report,) = Path("kept").glob("*/init_report.json")
    for text in ("{", "[]"):
        report.write_text(text)
        assert "delete kept/tiny-llama0-4bit-4rank to make it again" in cli.refused(
            *cli.tiny, QUANTIZE, "save_dir=kept"
        )


# The data -------------------------------------------------------------------------------------------------------------

ROW = json.dumps({"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"})


@pytest.mark.parametrize(("split", "name", "text", "message"), [
    ("train", "rows.jsonl", None, "there is no such file"),
    ("eval", "rows.jsonl", None, "there is no such file"),
    ("train", "rows.jsonl", "", "the file is empty"),
    ("eval", "rows.jsonl", "\n \n", "the file is empty"),
    ("train", "rows.json", "[]", "there are no rows in it"),
    ("train", "rows.jsonl", f"{ROW}\n{ROW}\n{{oops\n{ROW}\n", "line 3 is malformed"),
    ("eval", "rows.jsonl", f"{ROW}\n[1, 2]\n", "line 2 is not an object"),
    ("train", "rows.jsonl", f'{ROW}\n{{"question": "?"}}\n', "line 2 has no column 'answer'"),
    ("train", "rows.jsonl", ROW.replace("####", "so"), "line 1 holds an answer without '#### NUMBER'"),
    ("train", "rows.csv", "question,reply\na,b\n", "line 2 has no column 'answer'"),
    ("eval", "rows.csv", "question,answer\na,b,c\n", "line 2 is malformed"),
    ("train", "rows.txt", ROW, "the extension '.txt' is not known"),
])  # fmt: skip
def test_a_file_of_rows(cli: Any, tmp_path: Path, split: str, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    other = tmp_path / "sound.jsonl"
    other.write_text(ROW + "\n")
    given = {"train": other, "eval": other} | {split: tmp_path / name}
    told = cli.refused(*cli.tiny, "task=gsm8k", *(f"task.{which}_file={path}" for which, path in given.items()))
    assert told.startswith(f"task.{split}_file={tmp_path / name}: {message}")
    assert not Path("outputs").exists()


# What the rows and the settings ask of the model, refused before it is quantized ---------------------------------------


def written(folder: Path, config: Any, tokenizer: Any) -> Path:
    """A random model of `config` in `folder`, for the kind of model that reads and writes text."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_opt(**settings: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64,
             "vocab_size": 512, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    return OPTConfig(**(sizes | settings))


LONG = {
    "question": "What is 123456789 + 987654321 + 123456789 + 987654321?",
    "answer": "a b c d e f g h i j k l\n#### 2",
}


def rows_of(tmp_path: Path, *rows: dict[str, str]) -> tuple[str, ...]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "task=gsm8k", f"task.train_file={file}", f"task.eval_file={file}"


@pytest.mark.parametrize(("positions", "target", "stages", "message"), [
    (64, 8, "quantize,finetune", "reading takes 7"),
    (96, 60, "quantize,evaluate", "generating takes 1"),
])  # fmt: skip
def test_more_tokens_than_positions(
    cli: Any, tmp_path: Path, tiny_tokenizer: Any, positions: int, target: int, stages: str, message: str
) -> None:
    model = written(tmp_path / "opt", small_opt(max_position_embeddings=positions), tiny_tokenizer)
    rows = rows_of(
        tmp_path, json.loads(ROW) | {"answer": "#### 2"}, LONG if "finetune" in stages else LONG | {"answer": "#### 2"}
    )
    limits = ("task.max_source_length=64", f"task.max_target_length={target}")
    told = cli.refused(*cli.tiny, f"model.path={model}", *rows, *limits, f"stages=[{stages}]")
    assert told.startswith(f"task.max_source_length=64, task.max_target_length={target}: {message}")
    assert f"and the model has {positions}" in told
    assert not Path("outputs").exists()
    if stages == "quantize,finetune":
        padded = cli.refused(*cli.tiny, f"model.path={model}", *rows_of(tmp_path, json.loads(ROW)), *limits,
                             "task.pad_to_max_length=true", f"stages=[{stages}]")  # fmt: skip
        assert "reading takes 72 positions" in padded


def test_exactly_as_many_tokens_as_positions(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The last token that is generated is never read: it needs no position."""
    rows = rows_of(tmp_path, LONG | {"answer": "#### 2"})
    settings = (*cli.tiny, *rows, "task.max_source_length=40", "task.max_target_length=25", "train.bf16=false")
    model = written(tmp_path / "opt", small_opt(max_position_embeddings=63), tiny_tokenizer)
    assert "generating takes 64 positions" in cli.refused(
        *settings, f"model.path={model}", "stages=[quantize,evaluate]"
    )
    model = written(tmp_path / "opt", small_opt(max_position_embeddings=64), tiny_tokenizer)
    assert cli(*settings, f"model.path={model}", "stages=[quantize,evaluate]").code == 0


def test_a_block_longer_than_the_positions(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = written(tmp_path / "opt", small_opt(), tiny_tokenizer)
    (tmp_path / "text.txt").write_text("What is 1 + 1?\n" * 99)
    text = ("task=wikitext", f"task.eval_file={tmp_path / 'text.txt'}", "task.block_size=97")
    told = cli.refused(*cli.tiny, *text, f"model.path={model}", "stages=[quantize,evaluate]")
    assert told.startswith("task.block_size=97: reading takes 97 positions (")


def test_a_summary_longer_than_the_decoders_positions(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    settings = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 512, "max_position_embeddings": 32,
                "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 1}  # fmt: skip
    model = written(tmp_path / "bart", BartConfig(**settings), tiny_tokenizer)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"document": "one and one", "summary": "two"}) + "\n")
    told = cli.refused(*cli.tiny, "model=bart", f"model.path={model}", "task=summarization", f"task.eval_file={file}",
                       "task.max_target_length=33", "stages=[quantize,evaluate]")  # fmt: skip
    assert told.startswith("task.max_source_length=512, task.max_target_length=33: writing takes 33 positions")
    assert "row 1" in told


def test_an_encoder_decoder_classifies_at_end_tokens(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """With none in a row, or more than in the row beside it, bart and t5 raise in the middle of training."""
    settings = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 512, "max_position_embeddings": 64,
                "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 1}  # fmt: skip
    model = written(tmp_path / "bart", BartConfig(**settings), tiny_tokenizer)
    file = tmp_path / "rows.jsonl"
    for texts, row, times in ((("one", "two"), 1, 0), (("one</s>", "two</s></s>"), 2, 2)):
        file.write_text(
            "".join(json.dumps({"sentence1": text, "sentence2": text[:3], "label": 1.0}) + "\n" for text in texts)
        )
        told = cli.refused(*cli.tiny, "model=bart", "model.kind=classification", f"model.path={model}", "task=glue",
                           "task.name=stsb", f"task.eval_file={file}", "stages=[quantize,evaluate]")  # fmt: skip
        assert told.startswith(f"task.eval_file={file}: row {row} holds the end token '</s>' {times} times")
    assert not Path("outputs").exists()


def test_rotary_models_compute_beyond_their_positions(cli: Any, model: Path, tmp_path: Path) -> None:
    rewrite_config(model, max_position_embeddings=32)
    outcome = cli(*cli.tiny, f"model.path={model}", *rows_of(tmp_path, LONG), "stages=[quantize,evaluate]")
    assert outcome.code == 0
    lines = [line for line in outcome.out.splitlines() if "the model was trained on 32 positions" in line]
    assert len(lines) == 1
    assert lines[0].startswith("task.max_source_length=")


def test_a_token_without_an_embedding(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["monday"])
    model = written(tmp_path / "opt", small_opt(max_position_embeddings=512), tokenizer)
    rows = rows_of(tmp_path, json.loads(ROW), {"question": "Is it monday?", "answer": "#### 1"})
    for stages, split in (("quantize,finetune", "train"), ("quantize,evaluate", "eval")):
        told = cli.refused(*cli.tiny, f"model.path={model}", *rows, f"stages=[{stages}]")
        assert told.startswith(
            f"task.{split}_file={tmp_path / 'rows.jsonl'}: row 2 holds the token 'monday' with id 512, "
        )
    assert not Path("outputs").exists()
    assert cli(*cli.tiny, f"model.path={model}", *rows_of(tmp_path, json.loads(ROW))).code == 0  # where no row uses it


def test_a_pad_token_without_an_embedding_is_not_padded_with(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = rows_of(tmp_path, json.loads(ROW), LONG)
    scores = []
    for name in ("plain", "padded"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        if name == "padded":
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            assert tokenizer.pad_token_id == 512
        torch.manual_seed(0)
        model = written(tmp_path / name, small_opt(max_position_embeddings=512), tokenizer)
        assert cli(*cli.tiny, f"model.path={model}", *rows, f"output_dir={name}").code == 0
        (metrics,) = Path(name).glob("runs/*/metrics.json")
        scores.append(json.loads(metrics.read_text())["scores"])
    assert scores[0] == scores[1]


def test_a_tokenizer_without_an_end_of_sequence(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    model = written(tmp_path / "opt", small_opt(), tokenizer)
    told = cli.refused(*cli.tiny, f"model.path={model}", *rows_of(tmp_path, json.loads(ROW)))
    assert told.startswith(f"model.path={model}: its tokenizer has no end-of-sequence token")
    assert not Path("outputs").exists()


def test_a_tokenizer_that_makes_no_tokens(cli: Any, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    model = written(tmp_path / "opt", small_opt(), tokenizer)
    told = cli.refused(
        *cli.tiny, f"model.path={model}", *rows_of(tmp_path, json.loads(ROW)), "stages=[quantize,evaluate]"
    )
    assert "row 1 has no tokens" in told
    assert not Path("outputs").exists()


@pytest.mark.parametrize("text", ["", "{}", '{"version": "1.0"'])
def test_a_damaged_tokenizer(cli: Any, model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    told = cli.refused(*cli.tiny, f"model.path={model}")
    assert told.startswith(f"model.path={model}: no readable tokenizer in {model} (")
    assert not Path("outputs").exists()


@pytest.mark.parametrize(("settings", "message"), [
    (["train.optim=schedule_free_adamw"], "train.optim=schedule_free_adamw: cannot be used here (You need to install"),
    (["train.optim=galore_adamw"], "train.optim=galore_adamw: cannot be used here ("),
    (["train.optim=adamw_torch_xla"], "train.optim=adamw_torch_xla: cannot be used here ("),
    (["train.optim=adamw"], "train.optim=adamw: transformers has no such optimiser; choose one of its OptimizerNames, such as "),
    (["train.lr_scheduler_type=polynomial", "train.learning_rate=1e-8"], "train.lr_scheduler_type=polynomial, train.learning_rate="),
])  # fmt: skip
def test_an_optimiser_or_a_schedule_that_cannot_be(cli: Any, settings: list[str], message: str) -> None:
    assert cli.refused(*cli.tiny, *settings).startswith(message)
    assert not Path("outputs").exists()


@pytest.mark.parametrize("optimiser", ["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "adafactor", "sgd"])
def test_optimisers_that_work_are_not_refused(optimiser: str) -> None:
    config = compose(["model=llama-2", "task=arithmetic", f"train.optim={optimiser}"])
    check_optimiser(config, torch.device("cpu"), torch.float32)


def test_a_model_that_cannot_recompute_its_activations(cli: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    ctrl = CTRLConfig(vocab_size=512, n_embd=64, dff=128, n_layer=1, n_head=4, n_positions=512)
    model = written(tmp_path / "ctrl", ctrl, tiny_tokenizer)
    told = cli.refused(
        *cli.tiny, f"model.path={model}", *rows_of(tmp_path, json.loads(ROW)), "train.gradient_checkpointing=true"
    )
    assert told.startswith("train.gradient_checkpointing=true: CTRLLMHeadModel cannot recompute its activations")
    assert not Path("outputs").exists()


# The disk -------------------------------------------------------------------------------------------------------------


class Disk:
    """A small disk of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def remount(self, options: str) -> None:
        """Other size, or read-only."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.place)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    """Mounts a disk of a given size; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(size: str) -> Disk:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here ({error})")
        if done.returncode:
            pytest.skip(f"no disk may be mounted here ({done.stderr.strip()})")
        mounted.append(place)
        return Disk(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("setting", ["save_dir", "cache_dir"])
def test_a_full_disk(cli: Any, disk: Callable[[str], Disk], setting: str) -> None:
    small = disk("200k")
    command = (*cli.tiny, QUANTIZE, "quant.rank=32", f"{setting}={small.place}")
    message = cli.refused(*command)
    assert message == (f"{setting}={small.place}: cannot be written (No space left on device); "
                       f"free space there or set another {setting}")  # fmt: skip
    assert half_written(small.place) == half_written(Path("outputs")) == []
    assert leftovers(Path("outputs")) == []
    if setting == "save_dir":
        assert files(small.place) == []
    small.remount("size=10m")
    assert cli(*command).code == 0


@pytest.mark.parametrize(
    "size", [pytest.param("12k", marks=pytest.mark.slow), pytest.param("40k", marks=pytest.mark.slow), "150k"]
)
def test_a_full_disk_in_the_later_stages(cli: Any, disk: Callable[[str], Disk], size: str) -> None:
    """The log, the adapter's file and the optimizer's state run out of space: three libraries, three sorts of errors."""
    small = disk(size)
    command = (*cli.tiny, f"output_dir={small.place}", "save_dir=kept", "cache_dir=cache")
    message = cli.refused(*command)
    assert message == (f"output_dir={small.place}: cannot be written (No space left on device); "
                       "free space there or set another output_dir") or "or a limit on file sizes" in message  # fmt: skip
    small.remount("size=20m")
    assert cli(*command).code == 0
    assert half_written(small.place) == []


@pytest.mark.parametrize(
    ("setting", "below"), [("save_dir", ""), ("save_dir", "a/b"), ("cache_dir", ""), ("output_dir", "")]
)
def test_a_read_only_disk(cli: Any, disk: Callable[[str], Disk], setting: str, below: str) -> None:
    small = disk("1m")
    small.remount("ro")
    message = cli.refused(*cli.tiny, QUANTIZE, f"{setting}={small.place / below}")
    assert message.startswith(f"{setting}={small.place / below}: cannot be written (Read-only file system); ")
    assert message.endswith(f"set another {setting}")
    assert leftovers(Path("outputs")) == []
    small.remount("rw")
    assert cli(*cli.tiny, QUANTIZE, f"{setting}={small.place / below}").code == 0


@pytest.mark.parametrize("setting", ["save_dir", "cache_dir", "output_dir"])
def test_a_folder_below_a_file(cli: Any, tmp_path: Path, setting: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    message = cli.refused(*cli.tiny, QUANTIZE, f"{setting}={tmp_path / 'file' / 'below'}")
    assert message.startswith(f"{setting}={tmp_path}/file/below: ")
    assert f"({os.strerror(errno.ENOTDIR)}); " in message
    assert leftovers(Path("outputs")) == []
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("name", ["", "weights.bin"])
def test_somebody_elses_things_where_the_checkpoint_should_be(cli: Any, name: str) -> None:
    """The name is LoftQ's usual one, so that another tool may have put hours of work there."""
    place = Path("kept/tiny-llama0-4bit-4rank")
    theirs = place / name if name else place
    theirs.parent.mkdir(parents=True)
    theirs.write_text("hours of work")
    message = cli.refused(*cli.tiny, QUANTIZE, "save_dir=kept")
    assert message.startswith("save_dir=kept: tiny-llama0-4bit-4rank in it is no initialised checkpoint")
    assert files(Path("kept")) == [str(theirs.relative_to("kept"))]
    theirs.unlink()
    assert cli(*cli.tiny, QUANTIZE, "save_dir=kept").code == 0


def test_a_name_too_long_for_the_disk(cli: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    long = tmp_path / ("m" * 250)
    long.symlink_to(tiny_llama_dir)
    assert "(File name too long)" in cli.refused(*cli.tiny, f"model.path={long}", QUANTIZE)


# Ctrl-C and kill ------------------------------------------------------------------------------------------------------

INTERRUPTED = "interrupted: finished work is kept; run the same command again to resume"


def after(calls: int, function: Any, action: Callable[[], None]) -> Callable[..., Any]:
    """`function`, which does `action` instead once it was called so many times."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if count == calls:
            action()
        count += 1
        return function(*args, **kwargs)

    return wrapped


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "place", "calls"), [
    ("quantize", "loftq_exp.initialise.decomposer.decompose", 5),
    pytest.param("quantize", "loftq_exp.initialise.stage.check_written", 0, marks=pytest.mark.slow),
    ("finetune", "transformers.Trainer.training_step", 1),
    pytest.param("finetune", "peft.PeftModel.save_pretrained", 0, marks=pytest.mark.slow),
    ("finetune", "peft.PeftModel.save_pretrained", 1),
    pytest.param("evaluate", "loftq_exp.evaluation.evaluate._likelihoods", 0, marks=pytest.mark.slow),
    ("evaluate", "transformers.generation.utils.GenerationMixin.generate", 0),
    pytest.param("evaluate", "loftq_exp.report.tensorboard.Recorder.scores", 0, marks=pytest.mark.slow),
])  # fmt: skip
def test_ctrl_c_in_each_stage(cli: Any, stage: str, place: str, calls: int) -> None:
    owner, _, name = place.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        target = pytest.importorskip(owner.removesuffix(".Trainer").removesuffix(".PeftModel")
                                     .removesuffix(".GenerationMixin").removesuffix(".Recorder"))  # fmt: skip
        for part in owner.removeprefix(target.__name__).strip(".").split("."):
            target = getattr(target, part) if part else target
        patch.setattr(target, name, after(calls, getattr(target, name), interrupt))
        assert cli.refused(*cli.tiny, "task.max_eval_samples=2", code=130) == INTERRUPTED
    (run,) = Path("outputs/runs").iterdir()
    assert half_written(Path("outputs")) == []
    assert not (run / f"{stage}.json").exists()
    assert not (run / "metrics.json").exists()
    assert len(list(Path("outputs/inits").glob("tiny-llama0-4bit-4rank-*"))) == (stage != "quantize")
    assert (run / "adapter").is_dir() == (stage == "evaluate")

    again = cli(*cli.tiny, "task.max_eval_samples=2")
    assert (again.code, again.err) == (0, "")
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["seconds"]) == {"quantize", "finetune", "evaluate"}
    if stage == "quantize":
        assert metrics["init"]["cache_hits"] == (calls or 14)  # what was done before was kept
    else:
        assert "14 weights, 0 computed" in again.out
    assert ("finetune: done before" in again.out) == (stage == "evaluate")


DYING = """
import os, signal, sys
from loftq_exp.initialise import decomposer
decompose, count = decomposer.decompose, 0
def dying(*args, **kwargs):
    global count
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return decompose(*args, **kwargs)
decomposer.decompose = dying
from loftq_exp.commands.run import main
main()
"""


@pytest.mark.slow
def test_after_kill_9_the_next_run_starts_from_the_weights_already_done(cli: Any) -> None:
    command = (*cli.tiny, QUANTIZE, "save_dir=kept")
    killed = subprocess.run([sys.executable, "-c", DYING, *command], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert half_written(Path("kept"))  # nobody could tidy up
    assert not Path("kept/tiny-llama0-4bit-4rank").exists()
    outcome = cli(*command)
    assert "14 weights, 9 computed, 5 from the cache" in outcome.out
    report = json.loads(Path("kept/tiny-llama0-4bit-4rank/init_report.json").read_text())
    assert report["totals"]["cache_hits"] == 5
    assert half_written(Path("kept")) == half_written(Path("outputs")) == []


@pytest.mark.slow
def test_sigint_to_a_real_process(cli: Any) -> None:
    """With all that libraries do around it: the line on stderr is the only one."""
    command = [sys.executable, "-m", "loftq_exp", *cli.tiny, "train.num_train_epochs=100000", "train.save_steps=5"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(Path("outputs").glob("runs/*/checkpoints/checkpoint-*/trainer_state.json")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=180)
        finally:
            process.kill()
    assert err == f"error: {INTERRUPTED}\n"
    assert process.returncode == 130
    (run,) = Path("outputs/runs").iterdir()
    assert not (run / "adapter").exists()
    assert half_written(Path("outputs")) == []


# Tasks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "message"), [
    (["task=glue", "task.name=sst"], "task.name=sst: not a data set of task glue; choose from: cola, sst2, mrpc"),
    (["task=glue", "task.name=null"], "task.name=null: not a data set of task glue; choose from: cola"),
    (["task=summarization", "task.name=cnn"], "task.name=cnn: not a data set of task summarization; choose from: xsum, cnn_"),
    (["task=gsm8k", "task.name=main"], "task.name=main: task gsm8k is one data set and has no names; leave it out"),
    (["task=glue"], "task=glue: needs a classification model, model.kind is causal; these fit: causal with gsm8k"),
    (["task=squad"], "task=squad: needs a question-answering model, model.kind is causal; these fit: causal"),
    (["task=summarization"], "task=summarization: needs a seq2seq model, model.kind is causal; these fit: causal"),
    (["task=wikitext", "task.block_size=1"], "task.block_size=1: out of range; give a value at least 2"),
    (["task=summarization", "task.num_beams=0"], "task.num_beams=0: out of range"),
    (["task=squad", "task.doc_stride=-1"], "task.doc_stride=-1: out of range"),
])  # fmt: skip
def test_a_task_that_cannot_be(cli: Any, task: list[str], message: str) -> None:
    assert cli.refused(*cli.tiny, *task).startswith(message)
    assert not Path("outputs").exists()


@pytest.mark.parametrize(("task", "text", "message"), [
    (["model=bert", "task=glue", "task.name=rte"], '{"sentence1": "x", "label": 0}', "line 1 has no column 'sentence2'"),
    (["model=bert", "task=glue", "task.name=rte"], '{"sentence1": "x", "sentence2": "y", "label": 2}', "line 1 holds 2 in column"),
    (["model=bert", "task=glue", "task.name=cola"], '{"sentence": "x", "label": "bad"}', "line 1 holds 'bad' in column 'label'"),
    (["model=bert", "task=anli"], "", "the file is empty"),
    (["model=bert", "model.kind=question-answering", "task=squad"], '{"id": "1", "context": "x", "question": "y"}',
     "line 1 has no column 'answers'"),
    (["model=bart", "task=summarization"], '{"article": "x", "highlights": "y"}', "line 1 has no column 'document'"),
    (["task=wikitext"], '{"line": "x"}', "line 1 has no column 'text'"),
])  # fmt: skip
def test_rows_that_a_task_cannot_use(cli: Any, tmp_path: Path, task: list[str], text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    told = cli.refused(*cli.tiny, *task, f"task.eval_file={file}", "stages=[quantize,evaluate]")
    assert told.startswith(f"task.eval_file={file}: {message}")


@pytest.mark.parametrize("setting", ["model.path", "task.train_file", "output_dir"])
def test_a_home_folder_of_nobody(cli: Any, setting: str) -> None:
    told = cli.refused(*cli.tiny, f'{setting}="~nobody-of-this-name/x.json"')
    assert told == "~nobody-of-this-name/x.json: there is no such user's home folder; write the path out"
