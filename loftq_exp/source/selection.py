"""The choice of weights among all that can be quantized: `quant.target_modules` without `quant.exclude`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from loftq_exp.config.quant import QuantConfig
from loftq_exp.errors import UserError


@dataclass(frozen=True)
class Selection:
    """Patterns of the module names to quantize. None: all, or none to leave out."""

    target_modules: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    @classmethod
    def of(cls, quant: QuantConfig) -> Selection:
        """The selection of the settings."""
        return cls(quant.target_modules, quant.exclude)

    def chosen(self, names: Sequence[str]) -> set[str]:
        """The `names` to quantize. Raises UserError for a pattern that matches none of them, or if none is left."""
        found = set(names)
        if self.target_modules is not None:
            found = _matching("quant.target_modules", self.target_modules, names)
        if self.exclude is not None:
            found -= _matching("quant.exclude", self.exclude, names)
        if not found:
            raise UserError(f"quant.exclude=[{','.join(self.exclude or ())}]: leaves no layer to quantize; remove a pattern, or use "
                            "quant=lora to quantize nothing")  # fmt: skip
        return found


ALL = Selection()


def _matching(setting: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    numbers = numbers_in(names)
    for pattern in patterns:
        matcher = re.compile(rf"(?:.*\.)?{expression(pattern, numbers)}")
        matched = {name for name in names if matcher.fullmatch(name)}
        if not matched:
            raise UserError(f"{setting}=[{','.join(patterns)}]: {pattern} matches no layer that can be quantized; {_near(pattern, names)}")  # fmt: skip
        found |= matched
    return found


def _near(pattern: str, names: Sequence[str]) -> str:
    """Names that the pattern may mean: the modules below it, those of a similar name, or those there are."""
    below = re.compile(rf"(?:.*\.)?{re.escape(pattern)}\..*")
    if any(below.fullmatch(name) for name in names):
        return f"for the layers in it give {pattern}.*"
    endings = dict.fromkeys(name.rpartition(".")[2] for name in names)
    endings |= dict.fromkeys(re.sub(r".*\.\d+\.", "", name) for name in names)
    near = get_close_matches(pattern.replace("*", "").strip("."), endings, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from: {', '.join(list(endings)[:12])}"


def numbers_in(names: Iterable[str]) -> set[str]:
    """The whole numbers that are parts of dotted `names`."""
    return {part for name in names for part in name.split(".") if part.isdigit()}


def expression(pattern: str, numbers: Iterable[str]) -> str:
    """A pattern as a regular expression: * is any text, ? any character, and a part N-M each of the `numbers` from N to M."""
    parts = []
    for part in pattern.split("."):
        if bounds := re.fullmatch(r"(\d+)-(\d+)", part):
            inside = [number for number in numbers if int(bounds[1]) <= int(number) <= int(bounds[2])]
            parts.append(f"(?:{'|'.join(inside)})" if inside else "(?!)")
        else:
            parts.append("".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in part))
    return r"\.".join(parts)
