"""What the two scripts share: PEFT's flags as overrides of loftq_exp, and the command that they stand for."""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from loftq_exp.commands.run import main


def parse(parser: ArgumentParser) -> Namespace:
    """The flags, with --token in the environment instead of among them, and overrides NAME=VALUE that may follow them."""
    parser.add_argument("--token", help="the hub's token; better set HF_TOKEN, which other users cannot see")
    parser.add_argument(
        "overrides", nargs="*", metavar="NAME=VALUE", help="settings of loftq_exp that have no flag here"
    )
    flags = parser.parse_intermixed_args()
    if flags.token:
        os.environ["HF_TOKEN"] = flags.token
    del flags.token
    return flags


def translate(flags: Namespace, table: Mapping[str, str]) -> list[str]:
    """The overrides for the flags that `table` names; a flag that was not given and has no default gives none."""
    given = {name: getattr(flags, name) for name in table}
    return [override(table[name], value) for name, value in given.items() if value is not None]


def override(name: str, value: Any) -> str:
    """NAME=VALUE, quoted where Hydra would read the value as something else than a text."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"[\w./+-]+", text):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{name}={text}"


def run(overrides: list[str]) -> None:
    """Prints the command, and does what it does."""
    sys.stdout.write(f"python -m loftq_exp {shlex.join(overrides)}\n")
    sys.stdout.flush()
    sys.exit(main(overrides))
