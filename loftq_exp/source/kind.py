"""Determine the kind of model that `model.kind=auto` means, from the checkpoint's config.json and the task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from transformers.models.auto import modeling_auto as auto

from loftq_exp.config import ModelConfig, RunConfig
from loftq_exp.errors import UserError
from loftq_exp.source.locate import NotHere, config_folder

_ENCODERS = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
_CLASSES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "causal": ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "classification": ("AutoModelForSequenceClassification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "question-answering": ("AutoModelForQuestionAnswering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
}
"""The class that loads each kind, and the model types that transformers has it for."""


def with_kind(config: RunConfig, wanted: str) -> RunConfig:
    """The settings with the kind that `model.kind=auto` means for a task that needs a model of kind `wanted`.

    Of a hub model only config.json is downloaded. Raises UserError if the model is not found, or is of no kind.
    """
    if config.model.kind != "auto":
        return config
    try:
        folder = config_folder(config.model, config.cache_path)
    except NotHere:
        if "quantize" in config.stages:
            raise
        return _replaced(config, wanted)  # the other stages need no more than an earlier run's checkpoint
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _replaced(config, kind_of(stated, wanted, config.model))


def kind_of(stated: Mapping[str, Any], wanted: str, model: ModelConfig) -> str:
    """The kind of a checkpoint with the config `stated`: `wanted` where its model type has such a class, else its own.

    Its own kind is seq2seq for an encoder-decoder, classification for an encoder, causal for a decoder. Raises UserError
    for a model type without any such class.
    """
    fitting = [kind for kind in _CLASSES if _fits(stated, kind, model.trust_remote_code)]
    if wanted in fitting:
        return wanted
    own = next((kind for kind in ("seq2seq", "causal", "classification") if kind in fitting), None)
    if own is None:
        known = " or ".join(name for name, _ in _CLASSES.values())
        raise UserError(f"model.path={model.path}: transformers has no {known} for model type {stated.get('model_type')!r}; "
                        "choose a text model, or set model.kind and model.trust_remote_code=true for a model with code of its own")  # fmt: skip
    return own


def _fits(stated: Mapping[str, Any], kind: str, trusted: bool) -> bool:
    """Whether a class of that kind loads the whole checkpoint: a decoder class would load half of an encoder-decoder."""
    name, types = _CLASSES[kind]
    if trusted and name in (stated.get("auto_map") or {}):
        return True
    family = stated.get("model_type")
    paired = bool(stated.get("is_encoder_decoder", family in _CLASSES["seq2seq"][1]))
    encoder = family in _ENCODERS and not paired and not stated.get("is_decoder")
    if kind == "question-answering":
        return family in types and encoder
    return family in types and not (kind == "causal" and (paired or encoder)) and not (kind == "seq2seq" and not paired)


def _replaced(config: RunConfig, kind: str) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, kind=kind))
