"""Check, before the long work, that the files of an initialised checkpoint load on their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig, get_peft_model_state_dict

from loftq_exp.artifact.folder import ADAPTER
from loftq_exp.config import ModelConfig
from loftq_exp.errors import UserError
from loftq_exp.integrations.loads import with_adapter
from loftq_exp.source.files import llama_pieces, read_tokenizer
from loftq_exp.source.head import PREFIX
from loftq_exp.source.layout import skeleton

_SAMPLE = "Natalia sold 48/2 = 24 clips,\n  isn't it?\tÜnïcödé — 你好, नमस्ते \N{SLIGHTLY SMILING FACE} <b>x</b> don't"


_WORDS = "the quick brown fox jumps over the lazy dog"


def check_surroundings(source: Path, folder: Path, factors: Mapping[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Raise UserError unless `folder` works without `source`, weights aside.

    The tokenizer must give the same ids, config.json must define the model, and PEFT must have exactly `factors`: shapes by
    their names in the adapter's file.
    """
    _check_tokenizer(source, folder, model)
    _check_adapter(folder, factors, model)


def _check_tokenizer(source: Path, folder: Path, model: ModelConfig) -> None:
    expected, found = (_ids(place, model.trust_remote_code) for place in (source, folder))
    if expected is None:  # stages that need a tokenizer raise
        return
    pieces = llama_pieces(source)
    if found is None or (pieces is None and found != expected):
        raise UserError(f"model.path={model.path}: the tokenizer gives other ids when loaded from the files copied with the "
                        "checkpoint than from the model's folder; save it there again with save_pretrained")  # fmt: skip
    if pieces is None:
        return
    tokens = read_tokenizer(folder, False).tokenize(_WORDS)
    if tokens != pieces.encode(_WORDS, out_type=str) and "<unk>" not in tokens:
        raise UserError(f"model.path={model.path}: transformers gives other tokens with tokenizer.model than SentencePiece does; "
                        "put a tokenizer.json beside it")  # fmt: skip


def _ids(folder: Path, trust_remote_code: bool) -> list[int] | None:
    """The sample's token ids, the vocabulary size and the special ids; None if the tokenizer cannot be used."""
    try:
        tokenizer = read_tokenizer(folder, trust_remote_code)
        return [*tokenizer(_SAMPLE)["input_ids"], len(tokenizer), *tokenizer.all_special_ids]
    except Exception:  # any type, see read_tokenizer
        return None


def _check_adapter(folder: Path, factors: Mapping[str, tuple[int, ...]], model: ModelConfig) -> None:
    place = f"model.path={model.path}"
    try:
        bare = skeleton(folder, model.kind, model.trust_remote_code)
    except (UserError, OSError, ImportError) as error:
        fault = str(error).splitlines()[0]
        raise UserError(f"{place}: the model does not load from the files copied with it ({fault}); "
                        "put all of its code into the folder, beside config.json") from error  # fmt: skip
    advice = f"a {bare.config.model_type} model cannot be fine-tuned with this version of PEFT"
    settings = PeftConfig.from_pretrained(str(folder / ADAPTER))
    adapted = with_adapter(bare, settings, place, advice, low_cpu_mem_usage=True)
    held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = {name: tuple(value.shape) for name, value in held.items() if ".lora_" in name}
    if odd := sorted(set(factors.items()).symmetric_difference(found.items())):
        name = odd[0][0].removeprefix(PREFIX)
        what = "also has" if odd[0][0] not in factors else "has another shape of" if odd[0][0] in found else "loses"
        raise UserError(f"{place}: PEFT {what} {name} ({len(odd)} of {len(factors)} factors differ): it changes the targets of this "
                        f"architecture; {advice}")  # fmt: skip
