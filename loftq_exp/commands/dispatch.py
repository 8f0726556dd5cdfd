"""`loftq-exp COMMAND ...`. Each command is also a module, such as `python -m loftq_exp` or `python -m loftq_exp.cache`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from loftq_exp.commands.terminal import exit_code
from loftq_exp.config.schema import nearest
from loftq_exp.errors import UserError

COMMANDS = {
    "run": ("run", "quantize, fine-tune and score a model (the same as `python -m loftq_exp`)"),
    "cache": ("manage_cache", "list, size, verify and prune the cache"),
    "export": ("export_model", "merge an adapter into its backbone"),
    "report": ("write_report", "show a table of runs and sweeps, on the terminal or as JSON, CSV, Markdown or LaTeX"),
    "sweep": ("manage_sweeps", "go on with a multirun that was cut short; the best of one with more seeds"),
    "rerun": ("run_again", "repeat a finished run from its record and report what differs"),
}
"""Each command with its module, imported on demand, and its description."""


def main(argv: Sequence[str] | None = None) -> int:
    """Pass the arguments after the command's name to its module, and return its exit code."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    return exit_code(lambda: _call(name, arguments), "nothing was begun")


def _call(name: str, arguments: list[str]) -> int:
    if name in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if name not in COMMANDS:
        raise UserError(_unknown(name))
    module = importlib.import_module(f"loftq_exp.commands.{COMMANDS[name][0]}")
    code: int = module.main(arguments)
    return code


def _unknown(name: str) -> str:
    if "=" in name or name.startswith("-"):
        return f"{name}: settings come after the command; give loftq-exp run {name}"
    return f"{name}: there is no such command; {nearest(name, COMMANDS)}"


def _help() -> str:
    lines = [f"  {name:8} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: loftq-exp COMMAND ...", "", *lines, "", "loftq-exp COMMAND --help shows its options", ""])
