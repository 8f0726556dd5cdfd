"""An exception of a library that reads the user's files is one line; one of our own code stays a traceback."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from loftq_exp.errors import UserError
from loftq_exp.foreign import explained, is_foreign

OWN = """
def calls(function, *args):
    return function(*args)

def bug(*_):
    return {}["a bug of ours"]

def wrong_call(torch):
    return torch.ones(2) + torch.ones(3)
"""


@pytest.fixture
def own() -> Any:
    """A module of loftq_exp."""
    module = types.ModuleType("loftq_exp.somewhere")
    exec(OWN, vars(module))
    return module


def foreign_module(name: str, code: str) -> Any:
    module = types.ModuleType(name)
    exec(code, vars(module))
    return module


RAISING = "def raises(*_):\n    raise {}\ndef calls(function, *args):\n    return function(*args)\n"


@pytest.mark.parametrize("error", ["KeyError('hidden_size')", "ZeroDivisionError('division by zero')", "Exception('bare')",
                                   "ValueError('first line\\n\\nsecond' + 9000 * 'x')", "RecursionError()"])  # fmt: skip
@pytest.mark.parametrize("library", ["transformers.models.x", "tokenizers", "peft.config", "json.decoder"])
def test_any_type_of_a_library_becomes_one_line(own: Any, library: str, error: str) -> None:
    module = foreign_module(library, RAISING.format(error))
    line, fault = (
        r"^model\.path: DIR/config\.json cannot be read \(.+\); check it$",
        "model.path: DIR/config.json cannot be read",
    )
    with pytest.raises(UserError, match=line) as caught, explained(fault, "check it"):
        own.calls(module.raises)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.__cause__ is not None


def test_our_own_bugs_stay_tracebacks(own: Any) -> None:
    library = foreign_module("transformers.trainer", RAISING.format("ValueError()"))
    for broken in (
        lambda: own.calls(own.bug),
        lambda: own.calls(library.calls, own.bug),
    ):  # also when a library calls us
        with pytest.raises(KeyError, match="a bug of ours"), explained("a", "b"):
            broken()
    with pytest.raises(RuntimeError, match="must match the size"), explained("a", "b"):
        own.wrong_call(torch)


def test_what_is_raised_on_purpose_passes(own: Any) -> None:
    def raises(error: BaseException) -> Callable[[], None]:
        return foreign_module("transformers.x", "def raises(error):\n    raise error\n").raises(error)

    for error in (UserError("said"), KeyboardInterrupt(), SystemExit(3), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error)) as caught, explained("a", "b"):
            own.calls(raises, error)
        assert caught.value is error


def test_what_the_libraries_really_raise(own: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    broken: list[Callable[[], Any]] = [
        lambda: own.calls(Tokenizer.from_file, str(tmp_path / "tokenizer.json")),
        lambda: own.calls(transformers.AutoConfig.from_pretrained, str(tmp_path)),
        lambda: own.calls(json.loads, "{"),
    ]
    for read in broken:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # any type
            read()
        assert is_foreign(caught.value)
