"""`model.kind=auto`: the kind of a model follows from its config and the task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loftq_exp.commands.run import compose
from loftq_exp.config import ModelConfig
from loftq_exp.errors import UserError
from loftq_exp.source.kind import kind_of, with_kind

KINDS = [  # model type, the kind that the task needs, the model's
    ("qwen3", "causal", "causal"), ("llama", "classification", "classification"), ("llama", "question-answering", "causal"),
    ("gemma3_text", "seq2seq", "causal"), ("t5", "seq2seq", "seq2seq"), ("t5", "causal", "seq2seq"),
    ("bart", "causal", "seq2seq"), ("bart", "classification", "classification"), ("bert", "causal", "classification"),
    ("modernbert", "classification", "classification"), ("distilbert", "question-answering", "question-answering"),
    ("electra", "seq2seq", "classification"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "wanted", "kind"), KINDS)
def test_the_kind_is_the_task_s_where_the_model_has_it(family: str, wanted: str, kind: str) -> None:
    assert kind_of({"model_type": family}, wanted, ModelConfig("a/b")) == kind


def test_a_model_without_text_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model.path=a/b: transformers has no .* for model type 'sam'; choose a text"):
        kind_of({"model_type": "sam"}, "causal", ModelConfig("a/b"))


def test_a_path_alone_takes_no_other_family_s_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = compose([f"model.path={tmp_path}", "stages=[quantize]"])
    assert config.model == ModelConfig(str(tmp_path), "auto")
    assert with_kind(config, "causal").model.kind == "seq2seq"
    assert compose(["model=mistral", f"model.path={tmp_path}"]).model.kind == "causal"


def test_auto_without_a_path_says_what_is_missing() -> None:
    with pytest.raises(
        UserError, match=r"^model.path: no value is set and there is no default; give model.path=VALUE$"
    ):
        compose(["model=auto"])


def test_a_path_that_is_absent_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        with_kind(compose(["model.path=/nowhere", "stages=[quantize]"]), "causal")
    assert with_kind(compose(["model.path=/nowhere", "stages=[evaluate]"]), "causal").model.kind == "causal"
