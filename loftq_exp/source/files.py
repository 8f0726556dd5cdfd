"""The small files copied with a checkpoint: those that its tokenizer and its own code need, and nothing else.

A source folder may hold anything, such as a `.env`, and artifacts are pushed to the hub. A file is therefore copied only
if its name is well known or a tokenizer class or the checkpoint's code refers to it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from loftq_exp.foreign import explained
from loftq_exp.whole import read_object

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of the initialised checkpoint's key. Increment it when the set of copied files changes."""
LICENCES = ("LICENSE*", "NOTICE*")
_KNOWN = ("generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
          "spiece.model", "sentencepiece*", "spm.model", "chat_template*", "*.tiktoken", *LICENCES)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_QUOTED = re.compile(r"""["']([\w.-]+\.\w+)["']""")
"""A quoted file name in Python code."""


def carry_files(source: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Copy the files beside weights and config: tokenizer, generation config, licence.

    With `trust_remote_code` the checkpoint's own code and the files that it names are copied too. The copied configs
    then refer to that local code.
    """
    going = carried_files(source, trust_remote_code)
    for path in going:
        shutil.copyfile(path, folder / path.name)
    for path in sorted(_carried(source, trust_remote_code).difference(going)):
        log.warning("%s: left out, because it is a link to another file; put the file itself there", path)
    for name in ("config.json", "tokenizer_config.json"):
        _point_at_local_code(folder, name)
    if llama_pieces(source) is not None:
        _convert_llama(source, folder)


def carried_files(source: Path, trust_remote_code: bool = False) -> list[Path]:
    """The files that `carry_files` copies from the checkpoint in `source`, sorted."""
    found = _carried(source, trust_remote_code)
    names = {path.name for path in found}
    return sorted(path for path in found if _lies_in(source, path, names))


def llama_pieces(source: Path) -> sentencepiece.SentencePieceProcessor | None:
    """Llama's SentencePiece model `tokenizer.model` if there is no tokenizer.json; None for any other tokenizer.

    transformers 4 took its class from the model type (also for mistral). transformers 5 reads it with a generic class. That
    class silently omits the blank before a text, and <s> unless a setting asks for it.
    """
    config, settings = (read_object(source / name) for name in ("config.json", "tokenizer_config.json"))
    own_class = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or _class_of_model_type(config))
    llama = own_class.removesuffix("Fast") in ("LlamaTokenizer", "LLaMATokenizer", "TokenizersBackend", "None")
    place = source / "tokenizer.model"
    if not llama or "auto_map" in settings or not place.is_file() or (source / "tokenizer.json").is_file():
        return None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(place))
    except (RuntimeError, OSError):  # a tiktoken file may have the same name
        return None


def _convert_llama(source: Path, folder: Path) -> None:
    """Write tokenizer.json with llama's class, so that any class reads the same tokenizer."""
    log.info("tokenizer.model: also saved as tokenizer.json, because transformers 5 reads it with a generic class")
    add_bos_token = read_object(source / "tokenizer_config.json").get("add_bos_token", True)
    with explained(f"model.path: no readable tokenizer in {source}", "put a tokenizer.json beside tokenizer.model"):
        tokenizer = transformers.LlamaTokenizer.from_pretrained(source, add_bos_token=add_bos_token)
    tokenizer.save_pretrained(folder)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Raises a one-line UserError if there is none or it cannot be read."""
    with explained(f"no readable tokenizer in {folder}", "check its tokenizer files"):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _carried(source: Path, trust_remote_code: bool) -> set[Path]:
    found = {path for pattern in _KNOWN for path in source.glob(pattern)}
    found |= {source / name for name in _vocabulary_names(source)}
    if trust_remote_code:
        found |= {*source.glob("*.py"), *(source / name for name in named_in_code(source))}
    return {path for path in found if path.is_file()}


def _vocabulary_names(source: Path) -> Iterator[str]:
    """The file names that the tokenizer's class and its fast or slow counterpart read."""
    config, own = (read_object(source / name) for name in ("config.json", "tokenizer_config.json"))
    classes = (own.get("tokenizer_class"), config.get("tokenizer_class"), _class_of_model_type(config))
    for name in {str(name).removesuffix("Fast") for name in classes if name}:
        for variant in (name, f"{name}Fast"):
            try:
                yield from getattr(tokenizer_class_from_name(variant), "vocab_files_names", {}).values()
            except ImportError:  # the class needs a package that is not installed
                continue


def _class_of_model_type(config: dict[str, Any]) -> str | None:
    return TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type")))


def named_in_code(folder: Path) -> set[str]:
    """File names quoted in the Python files of `folder`, such as a vocabulary's. Weights and config.json are omitted."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.py"))
    names = {name for text in texts for name in _QUOTED.findall(text)}
    return {
        name for name in names if name != "config.json" and not name.startswith(".") and not name.endswith(_WEIGHTS)
    }


def _lies_in(source: Path, path: Path, names: Collection[str]) -> bool:
    """Whether the file is in the folder itself, under one of the `names`, or is a link as the hub's cache stores all files.

    In that cache, SNAPSHOTS/COMMIT/NAME is a link to a file of BLOBS in the same repository. A link to anything else may lead to
    a private file, and what is copied may be published.
    """
    folder, real = source.resolve(), path.resolve()
    if real.parent == folder:
        return real.name in names
    return real.parent.name == "blobs" and folder.parent == real.parent.parent / "snapshots"


def _point_at_local_code(folder: Path, name: str) -> None:
    """Remove the repository from each `auto_map` entry (`OWNER/NAME--module.Class`) whose module is in `folder`."""
    settings = read_object(folder / name)
    entries = settings.get("auto_map")
    if not isinstance(entries, dict):
        return
    local = {key: _local(folder, value) for key, value in entries.items()}
    if local != entries:
        (folder / name).write_text(json.dumps(settings | {"auto_map": local}, indent=2) + "\n")


def _local(folder: Path, entry: Any) -> Any:
    if isinstance(entry, list):
        return [_local(folder, item) for item in entry]
    reference = str(entry).rpartition("--")[2]
    return reference if entry and (folder / f"{reference.split('.')[0]}.py").is_file() else entry
