"""Write a tokenizer into a GGUF: its tokens, merges or scores, special tokens, and the name of its pre-tokenizer.

llama.cpp has its own code for each pre-tokenizer and finds it by that name. A wrong name changes how text is split, which no
error shows. The name is therefore derived from the tokenizer's own steps, and a tokenizer whose steps are not known here is
refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from loftq_exp.errors import UserError
from loftq_exp.source.files import read_tokenizer

log = logging.getLogger(__name__)

_QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")  # fmt: skip
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
_BYTES, _BYTES_ALONE = ("ByteLevel", False, False), ("ByteLevel", False, True)
"""Bytes as characters, without and with GPT-2's own pattern."""
_PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (_BYTES_ALONE, False): "gpt-2",
    (("Digits", True), _BYTES_ALONE, False): "smollm",
    (("Split", _QWEN2), _BYTES, False): "qwen2",
    (("Split", _LLAMA3), _BYTES, True): "llama-bpe",
    (("Split", _LLAMA3), _BYTES, False): "smaug-bpe",  # the same pattern, without ignore_merges
    (("Split", _TEKKEN), _BYTES, True): "tekken",
}
"""llama.cpp's name for the steps of a byte-level tokenizer, the last being whether a word that is a token skips the merges."""
_SPACE = "\u2581"


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Add the tokenizer in `folder` to the header, padded to the `rows` of the embeddings.

    Raises UserError if it has no form in GGUF here, or more tokens than `rows`.
    """
    tokenizer = read_tokenizer(folder, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(folder, f"its class {type(tokenizer).__name__} has no tokenizer.json")
    described = json.loads(backend.to_str())
    model, vocabulary = described["model"], tokenizer.get_vocab()
    if model.get("type") != "BPE" or any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise _refused(folder, f"its model is {model.get('type')} and not plain BPE")
    if max(vocabulary.values()) >= rows:
        raise _refused(folder, f"it has the token {max(vocabulary.values())}, and the embeddings have {rows} rows")
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, described, vocabulary, added, rows, folder)
    else:
        _add_byte_level(writer, described, folder)
    texts = {number: token for token, number in vocabulary.items()}
    tokens = [_text(texts.get(number, f"[PAD{number}]"), added) for number in range(rows)]
    types = [_type(texts.get(number), added, tokenizer.unk_token) for number in range(rows)]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def _add_byte_level(writer: gguf.GGUFWriter, described: Mapping[str, Any], folder: Path) -> None:
    """Add the pre-tokenizer's name and the merges of a byte-level tokenizer."""
    steps, model = _steps(described["pre_tokenizer"]), described["model"]
    name = _PRE_TOKENIZERS.get((*steps, bool(model.get("ignore_merges"))))
    if name is None:
        shown = " + ".join(str(step[0]) for step in steps) or "none"
        raise _refused(folder, f"its pre-tokenizer ({shown}{', ignore_merges' if model.get('ignore_merges') else ''}) is none "
                               f"of {', '.join(sorted(set(_PRE_TOKENIZERS.values())))}")  # fmt: skip
    normalizer = described.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":
        raise _refused(folder, f"it normalizes text by {normalizer.get('type')}, which llama.cpp does not")
    if normalizer:
        log.warning(
            "gguf: the tokenizer composes characters first (NFC), and llama.cpp does not: give it composed text"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]])


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    """The steps of a pre-tokenizer as comparable tuples; one of an unknown form matches nothing."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    found: list[tuple[Any, ...]] = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            found.append((kind, step["add_prefix_space"], step.get("use_regex", True)))
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append((kind, step["pattern"].get("Regex")))
        elif kind == "Digits":
            found.append((kind, step["individual_digits"]))
        else:
            found.append((kind, json.dumps(step)))
    return found


def _add_sentencepiece(
    writer: gguf.GGUFWriter,
    described: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    added: Mapping[str, Any],
    rows: int,
    folder: Path,
) -> None:
    """Add the scores of a SentencePiece tokenizer, such as llama 2's and gemma's, and whether it puts a blank first."""
    normalizer, pre = json.dumps(described.get("normalizer")), described.get("pre_tokenizer")
    known = pre is None or (pre["type"] == "Metaspace" and pre["replacement"] == _SPACE) or (
        pre["type"] == "Split" and pre["pattern"] == {"String": " "} and pre["behavior"] == "MergedWithPrevious")  # fmt: skip
    replaces = json.dumps({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    prepends = json.dumps({"type": "Prepend", "prepend": _SPACE})
    both = json.dumps({"type": "Sequence", "normalizers": [json.loads(prepends), json.loads(replaces)]})
    if not known or normalizer not in ("null", replaces, both) or (normalizer == "null" and pre is None):
        raise _refused(folder, "it is neither byte-level nor splits text at blanks as SentencePiece does")
    first = normalizer == both or (pre is not None and pre["type"] == "Metaspace" and pre["prepend_scheme"] != "never")
    if first and normalizer != both:
        log.warning(
            "gguf: llama.cpp puts a blank before every text, and this tokenizer not before one that begins with a blank"
        )
    ranks = _ranks(described["model"]["merges"], vocabulary, added, folder)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(first)
    scores = [0.0] * rows
    for token, rank in ranks.items():
        scores[vocabulary[token]] = float(-1 - rank)
    writer.add_token_scores(scores)


def _ranks(
    merges: Sequence[Any], vocabulary: Mapping[str, int], added: Mapping[str, Any], folder: Path
) -> dict[str, int]:
    """The rank of each token that merges make. llama.cpp has no merges: it joins any two tokens to the best one.

    Raises UserError if the merges would not do that: if a pair that makes a token is no merge, or if the merges of two tokens
    are mixed.
    """
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]
    ranks: dict[str, int] = {}
    last = ""
    for left, right in pairs:
        token = left + right
        if token != last and token in ranks:
            raise _refused(folder, f"its merges make {token!r} at two ranks, and GGUF has one score per token")
        ranks.setdefault(token, len(ranks))
        last = token
    known = set(pairs)
    for token in vocabulary:
        if token in added or re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known and not added.keys() & set(pair):
                raise _refused(
                    folder, f"{pair[0]!r} and {pair[1]!r} are no merge, and llama.cpp would join them to {token!r}"
                )
    return ranks


def _text(token: str, added: Mapping[str, Any]) -> str:
    """A token as llama.cpp matches it: user-defined ones are found in the text before blanks are replaced."""
    if token in added and not added[token].special:
        return token.replace(_SPACE, " ")
    return token


def _type(token: str | None, added: Mapping[str, Any], unknown: str | None) -> gguf.TokenType:
    if token is None:
        return gguf.TokenType.UNUSED
    if token == unknown and token in ("<unk>", "[UNK]"):
        return gguf.TokenType.UNKNOWN
    if token in added:
        return gguf.TokenType.CONTROL if added[token].special else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else gguf.TokenType.NORMAL


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the ids of the special tokens, which of them each text gets, and the chat template."""
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    writer.add_add_bos_token(len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _refused(folder: Path, why: str) -> UserError:
    return UserError(f"--to=gguf: the tokenizer in {folder} has no form in GGUF here: {why}; use --to dense and llama.cpp's "
                     "convert_hf_to_gguf.py")  # fmt: skip
