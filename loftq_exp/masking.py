"""Secrets, such as the token of the model hub, masked in any text that leaves the process.

Text leaves in three places: the terminal (`mask_output`), a `UserError`, and a setting, which every record, card and
TensorBoard log repeats. A setting with a secret is refused, see `loftq_exp.config.schema`.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

MASK = "***"
_NAMED = re.compile(
    r"(?:^|_)(?:TOKEN|API_?KEY|SECRET|SECRET_?KEY|ACCESS_?KEY|SECRET_ACCESS_KEY|PASSWORD|PASSWD)$", re.IGNORECASE
)
"""Names of environment variables that hold a secret: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY ..."""
_LEAST = 8
"""Characters of a secret. A shorter one stands in words that are none."""
_FORMS = (
    (re.compile(r"(?<=://)[^/\s@'\"<>]+(?=@)"), MASK),  # https://user:password@host
    (
        re.compile(r"(?i)(authorization\W{1,6}(?:bearer|basic|token)\s+)[\w.~+/=-]+"),
        rf"\1{MASK}",
    ),  # the header of a request
    (re.compile(r"\b(Bearer )[\w.~+/=-]{16,}"), rf"\1{MASK}"),
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"), MASK),  # tokens of the hub
)


def masked(text: str) -> str:
    """Return `text` with `***` for each secret: values of the environment, the stored token, and what has a token's form."""
    for secret in _secrets():
        text = text.replace(secret, MASK)
    for form, mask in _FORMS:
        text = form.sub(mask, text)
    return text


def mask_output() -> None:
    """Mask what this process prints from now on, libraries' logs and tracebacks included."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Masked):
            setattr(sys, name, _Masked(stream))


class _Masked:
    """A text stream that masks secrets in what is written to it, and is the stream itself otherwise."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        text = masked(text)
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # the terminal's encoding is that of the locale C, or a text holds half a character
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()


def _secrets() -> list[str]:
    """The secrets of this process, the longest first, because one may contain another."""
    found = {value for name, value in os.environ.items() if _NAMED.search(name)}
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = os.environ.get("HF_HOME") or caches / "huggingface"
    found.add(_stored(os.environ.get("HF_TOKEN_PATH") or f"{home}/token"))
    stripped = {secret.strip() for secret in found}
    return sorted((secret for secret in stripped if len(secret) >= _LEAST), key=lambda secret: (-len(secret), secret))


@functools.lru_cache(maxsize=8)
def _stored(place: str) -> str:
    """The token that `hf auth login` stored in the file `place`; empty if there is none."""
    try:
        return Path(place).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return ""
