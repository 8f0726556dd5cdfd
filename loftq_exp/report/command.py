"""The command that repeats a run, from its settings alone."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

_LEFT_OUT = ("hub", "report", "published")
"""Groups that make no other run. A copied command must not publish anything."""
_BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_/][\w./@-]*", re.IGNORECASE)
"""A text that Hydra reads as itself without quotes."""


def command_of(config: Mapping[str, Any]) -> str:
    """Return `loftq-exp run` with every setting of a run, one a line. It is quoted for a POSIX shell.

    All settings are given, because the files of conf/ may give other values to those that are left out.
    """
    given = [f"task={_value(config['task']['kind'])}"] if "kind" in config.get("task", {}) else []
    for group, value in config.items():
        if group in _LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            given += [
                f"{group}.{name}={_value(own)}" for name, own in value.items() if (group, name) != ("task", "kind")
            ]
        else:
            given.append(f"{group}={_value(value)}")
    return " \\\n  ".join(["loftq-exp run", *map(shlex.quote, given)])


def _value(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_value(own)}" for name, own in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_value, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    return value if _BARE.fullmatch(value) else _quoted(value)


def _quoted(text: str) -> str:
    """Return a quoted text: a backslash is doubled before a quote, and ${ does not begin an interpolation."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"
