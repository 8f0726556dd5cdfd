"""Encoding of prompts and targets for causal models, and collation of features into padded batches."""

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
"""The model inputs of one example by argument name: lists of ids (`input_ids`, ...), or one number (a label)."""

IGNORED = -100
"""The label that the loss ignores, as in torch and transformers."""


def encode(
    task: PromptTask, row: Row, tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> dict[str, list[int]]:
    """Return one training row: `input_ids` = prompt + target, and `labels` with the prompt replaced by -100.

    Prompt and target are tokenized separately. Tokenizing them as one string could merge tokens across the boundary, and
    the mask would then cover the wrong tokens.

    Both lists have the same length, at most `max_source_length + max_target_length`. Raises UserError if the tokenizer has
    no end-of-sequence token.
    """
    prompt = encode_prompt(task, row, tokenizer, config)
    target = encode_target(task, row, tokenizer, config)
    return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}


def encode_prompt(task: PromptTask, row: Row, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> list[int]:
    """Return the prompt's ids, at most `max_source_length`, for training and generation.

    They begin with the beginning-of-sequence token if the tokenizer adds one. A prompt that is too long is truncated at its
    start, because its end holds the question and the instruction.
    """
    start, ids = _start_ids(tokenizer), _ids(tokenizer, task.prompt(row, tokenizer))
    available = max(0, config.max_source_length - len(start))
    return start + ids[max(0, len(ids) - available) :]


def encode_target(task: PromptTask, row: Row, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> list[int]:
    """Return the target's ids and the end-of-sequence token, truncated to `max_target_length` ids in all."""
    return target_ids(tokenizer, task.target(row))[: config.max_target_length]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a whole prompt, after the beginning-of-sequence token if the tokenizer adds one."""
    return _start_ids(tokenizer) + _ids(tokenizer, text)


def target_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a whole target and the end-of-sequence token. Raises UserError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={tokenizer.name_or_path}: its tokenizer has no end-of-sequence token, without which a model cannot "
            "learn to stop; use a model whose tokenizer_config.json names an eos_token"
        )
    return [*_ids(tokenizer, text), tokenizer.eos_token_id]


def padding_candidates(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that may serve as pad token, best first. Padding is masked, so any of them is safe."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return [int(token_id) for token_id in found if token_id is not None]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's pad token, or else its end-of-sequence or unknown token.

    No token is added, because that would resize the embeddings, and adapters would not load without the resized ones.
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
    """Pads features to one length and stacks them into a batch.

    Labels of padding are -100. Padding is determined from the features' lengths, not by comparing ids with `pad_token_id`,
    which may also be the end-of-sequence token of every target.
    """

    pad_token_id: int
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Lengths to pad to: of `input_ids` and parallel inputs, and of `labels`. Default: the longest feature."""
    side: Literal["left", "right"] = "right"
    """Padding side: right for training, left for generation with a decoder."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return one tensor per argument, and `attention_mask`.

        Lists become int64 of shape (features, length). Numbers become int64, or float32 if they are floats, of shape
        (features,).
        """
        filled = [{"attention_mask": [1] * len(feature["input_ids"]), **feature} for feature in features]
        return {name: self._tensor(name, [feature[name] for feature in filled]) for name in filled[0]}

    def _tensor(self, name: str, values: Sequence[Any]) -> torch.Tensor:
        import torch  # imported here, because settings are checked without torch

        if not isinstance(values[0], list):
            return torch.tensor(values)
        # Labels of an encoder-decoder have their own length.
        length = self.lengths.get("labels" if name == "labels" else "input_ids") or max(map(len, values))
        filler = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(name, 0)
        return torch.tensor([self._padded(ids, filler, length) for ids in values], dtype=torch.long)

    def _padded(self, ids: list[int], filler: int, length: int) -> list[int]:
        padding = [filler] * (length - len(ids))
        return padding + ids if self.side == "left" else ids + padding


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence id if the tokenizer prepends it, else an empty list."""
    if tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
