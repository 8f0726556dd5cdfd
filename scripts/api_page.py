"""Write docs/api.md, the page of loftq_exp's public names, from their signatures and docstrings.

make docs
python scripts/api_page.py --check     # change nothing, fail if the page is not up to date
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from regions import settle

import loftq_exp
from loftq_exp.report.table import markdown

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# Python interface

The public names of `loftq_exp`. `make docs` writes this page from their docstrings. All names are typed (`py.typed`). Names that
start with an underscore, and modules that this page does not name, may change without notice.
"""
SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):$")
ENTRY = re.compile(r"^(\w+): (.*)")


def page() -> str:
    """Return the whole page: functions, then classes, each in alphabetical order."""
    values = {name: getattr(loftq_exp, name) for name in loftq_exp.__all__ if name != "__version__"}
    names = sorted(values, key=lambda name: (inspect.isclass(values[name]), name))
    return "\n".join([HEAD, *(about(name, values[name]) for name in names), version()])


def version() -> str:
    return "## `__version__`\n\nThe version of the installed package, a string.\n"


def about(name: str, value: Any) -> str:
    """Return the section of one name."""
    parts = [f"## `{name}`\n"]
    if not inspect.isclass(value):
        return "\n".join([*parts, code(signature(name, value)), text_of(value)])
    parts += [code(f"class {name}({', '.join(base.__name__ for base in value.__bases__)})".replace("(object)", ""))]
    parts += [text_of(value)]
    if dataclasses.is_dataclass(value) and "Attributes:" not in (value.__doc__ or ""):
        parts += ["Attributes:\n", settings(value)]
    for method, function in methods(value):
        parts += [f"### `{name}.{method}`\n", text_of(function)]
    return "\n".join(parts)


def methods(value: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself, with their signatures."""
    for name, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        yield name if isinstance(member, property) else signature(name, function), function


def settings(value: Any) -> str:
    """Return the table of a dataclass's fields: name, type, default and the meaning in the metadata."""
    rows = []
    for field in dataclasses.fields(value):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        meaning = field.metadata.get("doc", "a group of settings")
        rows.append((f"`{field.name}`", f"`{field.type}`".replace("|", "\\|"), default, meaning))
    return markdown(("name", "type", "default", "meaning"), rows)


def signature(name: str, function: Callable[..., Any]) -> str:
    """Return the signature on one line, or with one argument a line if that exceeds 100 characters."""
    found = inspect.signature(function)
    arguments, keyword_only = [], False
    for argument in found.parameters.values():
        if argument.name in ("self", "cls"):
            continue
        if argument.kind is argument.KEYWORD_ONLY and not keyword_only:
            arguments, keyword_only = [*arguments, "*"], True
        default = "" if argument.default is argument.empty else f" = {argument.default!r}"
        arguments.append(f"{argument.name}: {argument.annotation}{default}")
    line = f"{name}({', '.join(arguments)}) -> {found.return_annotation}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f") -> {found.return_annotation}"


def text_of(value: Any) -> str:
    """Return the docstring as Markdown: sections become lists, indented lines stay unchanged."""
    lines: list[str] = []
    section = ""
    for line in (inspect.getdoc(value) or "").splitlines():
        if found := SECTION.match(line):
            section = found[1]
            lines += [f"{section}:", ""]
        elif not section:
            lines.append(line)
        elif section == "Returns":
            lines.append(line.strip())
        elif entry := ENTRY.match(line.removeprefix("    ")):
            lines.append(f"* `{entry[1]}`: {entry[2]}")
        else:
            lines.append(f"  {line.strip()}".rstrip())
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def documents() -> dict[Path, str]:
    """Return the up-to-date page by its path."""
    return {PAGE: page()}


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is not up to date")
    settle(documents(), parser.parse_args().check)


if __name__ == "__main__":
    main()
