"""What libraries raise while they read the user's files, in one line; what our own code raises stays a traceback.

transformers, tokenizers, safetensors, PEFT, datasets and huggingface_hub raise any type of exception for a damaged or odd
file: KeyError, AttributeError, ZeroDivisionError, a bare Exception. The type therefore says nothing. Where it was raised does.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from loftq_exp.errors import UserError

LIBRARIES = ("transformers", "transformers_modules", "tokenizers", "safetensors", "peft", "datasets", "huggingface_hub",
             "sentencepiece", "jinja2", "json", "pyarrow", "accelerate", "bitsandbytes", "gguf")  # fmt: skip
"""Packages that read files of the user. torch is none: it reads what our code hands over."""
_NATIVE = ("safetensors", "safetensors_rust", "pyo3_runtime", "tokenizers", "huggingface_hub", "jinja2", "pyarrow.lib")
"""Modules of exceptions that compiled code raises, which has no frame of its own."""
_WRAPPERS = ("contextlib", "functools", "torch.utils._contextlib")
"""Modules of decorators, whose frames lie between our call and the function that it means."""
_LONGEST = 300


@contextmanager
def explained(fault: str, advice: str) -> Iterator[None]:
    """Raise an exception of a library in the block as the UserError `FAULT (REASON); ADVICE`.

    Args:
        fault: what failed, with the setting and the file, such as "model.path: transformers cannot read DIR/config.json".
        advice: what to do.

    Raises:
        UserError: if a library raised it, see `is_foreign`. Any other exception passes.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of compiled code is no Exception
        if not is_foreign(error):
            raise
        raise UserError(f"{fault} ({reason_of(error)}); {advice}") from error


def is_foreign(error: BaseException) -> bool:
    """Return whether a library raised `error`: our innermost frame called into one, or its type is one of compiled code.

    A library may call our code back, such as the quantizer of packed layers. What that raises is ours.
    """
    if type(error).__name__ == "OutOfMemoryError":  # torch's: the file is sound
        return False
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    called = [name for name in modules[_last_own(modules) + 1 :] if name not in _WRAPPERS]
    if called:
        return called[0].partition(".")[0] in LIBRARIES
    # tokenizers raises a bare Exception, which our code never does.
    return type(error) is Exception or type(error).__module__ in _NATIVE or type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """Return the start of an exception's text in one line, with its type where the text alone says nothing."""
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, OSError, RuntimeError)) or isinstance(error, RecursionError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _last_own(modules: list[str]) -> int:
    """The index of our innermost frame; -1 if there is none."""
    own = [index for index, name in enumerate(modules) if name.partition(".")[0] == "loftq_exp"]
    return own[-1] if own else -1
