"""From prompts and targets to the token ids that a causal model trains on, and from any features to padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from loftq_exp.errors import UserError
from loftq_exp.tasks.data import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from loftq_exp.tasks.generation import PromptConfig, PromptTask

Features = dict[str, Any]
"""What a model reads of one example, by argument name: lists of ids (`input_ids`, ...), or one number (a label)."""

IGNORED = -100
"""The label that the loss skips, as torch and transformers define it."""


def encode(
    task: PromptTask, row: Row, tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> dict[str, list[int]]:
    """One training row: `input_ids` = prompt + target, `labels` the same with the prompt replaced by -100.

    Both are made from the same two lists of ids. Tokenizing prompt + target as one string could merge tokens across the
    seam, and the length of the prompt alone would then mask or free a few target tokens.

    Returns two lists of equal length, at most `max_source_length + max_target_length`. Raises UserError if the
    tokenizer has no end-of-sequence token.
    """
    prompt = encode_prompt(task, row, tokenizer, config)
    target = encode_target(task, row, tokenizer, config)
    return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}


def encode_prompt(task: PromptTask, row: Row, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> list[int]:
    """The prompt's ids, `max_source_length` at most, for training and for generation alike.

    They begin with the beginning-of-sequence token where the tokenizer adds one by itself. A prompt that is too long
    loses tokens at its start: its end holds what is asked and how to answer.
    """
    start = _start_ids(tokenizer)
    ids = _ids(tokenizer, task.prompt(row))
    room = max(0, config.max_source_length - len(start))
    return start + ids[max(0, len(ids) - room) :]


def encode_target(task: PromptTask, row: Row, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> list[int]:
    """The target's ids and the end-of-sequence token, cut after `max_target_length` ids (then without that token)."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={tokenizer.name_or_path}: its tokenizer has no end-of-sequence token, so that a model could "
            "not learn to stop; use a model whose tokenizer_config.json names an eos_token"
        )
    return [*_ids(tokenizer, task.target(row)), tokenizer.eos_token_id][: config.max_target_length]


def padding_candidates(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that may pad, the best first: none is missed in a text, and what is padding is masked."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return [int(token_id) for token_id in found if token_id is not None]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's pad token, or else its end-of-sequence or unknown token.

    Never a new token: it would resize the embeddings, and adapters trained with them would not load without them.
    Raises UserError if the tokenizer has none of the three.
    """
    found = padding_candidates(tokenizer)
    if found:
        return found[0]
    raise UserError(
        f"model.path={tokenizer.name_or_path}: its tokenizer has no pad, end-of-sequence or unknown token to pad with; "
        "use a model whose tokenizer_config.json names an eos_token"
    )


@dataclass(frozen=True)
class Collator:
    """Pads features to one length and makes a batch of them.

    Labels of padding are -100. What is padding follows from the features' lengths and never from comparing ids with
    `pad_token_id`, which may also be the end-of-sequence token at the end of every target.
    """

    pad_token_id: int
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Tokens to pad `input_ids` and all that goes with them to, and `labels`; where it is not given, the longest."""
    side: Literal["left", "right"] = "right"
    """Where the padding goes: right for training, left for a decoder to go on writing."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A tensor for each argument, and `attention_mask`.

        Lists become int64 of shape (features, length), numbers int64 or, where they are float, float32 of shape
        (features,).
        """
        filled = [{"attention_mask": [1] * len(feature["input_ids"]), **feature} for feature in features]
        return {name: self._tensor(name, [feature[name] for feature in filled]) for name in filled[0]}

    def _tensor(self, name: str, values: Sequence[Any]) -> torch.Tensor:
        import torch  # here, because the settings of tasks are checked without it

        if not isinstance(values[0], list):
            return torch.tensor(values)
        # Labels of an encoder-decoder have a length of their own.
        length = self.lengths.get("labels" if name == "labels" else "input_ids") or max(map(len, values))
        filler = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(name, 0)
        return torch.tensor([self._padded(ids, filler, length) for ids in values], dtype=torch.long)

    def _padded(self, ids: list[int], filler: int, length: int) -> list[int]:
        padding = [filler] * (length - len(ids))
        return padding + ids if self.side == "left" else ids + padding


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence id where the tokenizer puts it before a text by itself, else nothing."""
    if tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
