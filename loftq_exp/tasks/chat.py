"""Conversations: what a row of chat, prompt/completion or Alpaca columns says, and its tokens with those of the assistant.

A conversation is rendered with the tokenizer's chat template. If the template marks the assistant's text with
`{% generation %}`, the marks say which tokens are trained. Otherwise the turns are found by prefixes: the text before the
assistant's answer, as it is rendered for generation, must be a prefix of the whole conversation, in its characters and in
its tokens. A template for which that does not hold is refused for that row, because its mask would be a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.errors import UserError
from loftq_exp.tasks.data import Row, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""One turn: `role` and `content`."""

ROLES = ("system", "user", "assistant", "tool")
SHAPES = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "Alpaca": ("instruction", "output"),
}
"""The columns by which a row's shape is recognised. An Alpaca row may also have `input`."""
ALLOWED = "messages; prompt and completion; or instruction, output and, if wanted, input"

ALPACA = (
    "Below is an instruction that describes a task{and_input}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The published prompt of Stanford Alpaca, which is used without a chat template."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """The ids of a conversation, and for each whether the assistant wrote it."""

    ids: list[int]
    trained: list[bool]


class NotStable(Exception):
    """A chat template renders the start of a conversation in another way when more follows."""


def shape_of(row: Row) -> str | None:
    """Return the shape in `SHAPES` that the columns of `row` have. None: none of them, or more than one."""
    found = [name for name, columns in SHAPES.items() if all(row.get(column) is not None for column in columns)]
    return found[0] if len(found) == 1 else None


def said(row: Row) -> Row:
    """Return the columns of a valid row that its conversation is made of."""
    columns = SHAPES[str(shape_of(row))]
    return {name: row[name] for name in (*columns, *(["input"] if "output" in columns else [])) if name in row}


def flaw_of(row: Row) -> str | None:
    """Return why `row` is not a conversation, as the continuation of "line 7 ...". None for a valid row."""
    shape = shape_of(row)
    if shape is None:
        found = ", ".join(map(str, row)).encode(errors="backslashreplace").decode() or "none"
        return f"has not the columns of exactly one known shape (found: {found}; allowed: {ALLOWED})"
    if row.get("tools"):
        return "holds tools, which are not supported; take the column out"
    if shape == "messages":
        return _messages_flaw(row["messages"])
    columns = [*SHAPES[shape], *(["input"] if shape == "Alpaca" and row.get("input") else [])]
    return next((text for column in columns if (text := _text_flaw(row[column], f"column '{column}'"))), None)


def _messages_flaw(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"holds {shown(messages)} in column 'messages' where a list of role and content is needed"
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"holds {shown(message)} as {where}; its role must be one of: {', '.join(ROLES)}"
        extra = [name for name, value in message.items() if name not in ("role", "content") and value]
        if extra:
            return f"holds '{extra[0]}' in {where}, which is not supported; only role and content are"
        if problem := _text_flaw(message.get("content"), where):
            return problem
    if messages[-1]["role"] != "assistant":
        return f"ends with a message of the {messages[-1]['role']}; the last must be the assistant's"
    return "holds no message before the assistant's first" if messages[0]["role"] == "assistant" else None


def _text_flaw(value: Any, where: str) -> str | None:
    if not isinstance(value, str):
        return f"holds {shown(value)} in {where} where text is needed"
    if not value.strip():
        return f"holds an empty text in {where}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds {value[error.start]!r}, half of a character, in {where}, which no tokenizer reads"
    return None


def conversation(row: Row) -> list[Message]:
    """Return the messages of a valid row. A prompt, or an instruction with its input after a blank line, is the user's."""
    shape = shape_of(row)
    if shape == "messages":
        return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    if shape == "Alpaca":
        asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        return _exchange(asked, row["output"])
    return _exchange(row["prompt"], row["completion"])


def _exchange(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def plain_prompt(row: Row) -> str:
    """Return the prompt of a prompt/completion or Alpaca row without a chat template: as it is, or Alpaca's own."""
    if shape_of(row) != "Alpaca":
        return str(row["prompt"])
    context = row.get("input")
    return ALPACA.format(
        and_input=", paired with an input that provides further context" if context else "",
        instruction=row["instruction"],
        input=f"### Input:\n{context}\n\n" if context else "",
    )


def render_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `messages` as the text after which the assistant's answer begins."""
    return _text(tokenizer, messages, add_generation_prompt=True)


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Return the ids of a whole conversation with the assistant's marked, its end-of-turn tokens among them.

    Raises NotStable if the template has no `{% generation %}` and is not prefix-stable for these messages.
    """
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        found: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Rendered(list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]])
    whole = _text(tokenizer, messages)
    ids = text_ids(tokenizer, whole)
    trained = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _text(tokenizer, messages[:turn], add_generation_prompt=True)
        after = _without_tail(before, _text(tokenizer, messages[: turn + 1]), tokenizer)
        start, end = (_prefix_length(tokenizer, part, whole, ids) for part in (before, after))
        trained[start:end] = [True] * (end - start)
    return Rendered(ids, trained)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a rendered text, which holds its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    """Return the rendered text. Raises UserError, one line, if the template refuses the messages."""
    from jinja2 import TemplateError  # imported here: only templates need it

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"model.path={tokenizer.name_or_path}: its chat template refuses messages of the roles {roles} ({error}); "
            "change those rows, or use a model whose template takes them"
        ) from None


def _without_tail(before: str, after: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `after` without what the template puts behind the answer's end-of-turn token, which no model generates."""
    if not after.startswith(before):
        raise NotStable
    trimmed = after.rstrip()
    return trimmed if len(trimmed) > len(before) and trimmed.endswith(_special_tokens(tokenizer)) else after


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added} - {""})


def _prefix_length(tokenizer: PreTrainedTokenizerBase, part: str, whole: str, ids: list[int]) -> int:
    """Return the number of tokens of `part`. Raises NotStable if its text or tokens are not those `whole` begins with."""
    own = text_ids(tokenizer, part)
    if not whole.startswith(part) or ids[: len(own)] != own:
        raise NotStable
    return len(own)
