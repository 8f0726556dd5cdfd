"""Write the tables of results into README.md and docs/ from docs/results/*.json, so that no number is copied by hand.

    make docs
    python scripts/result_tables.py --check     # change nothing, fail where a document is not up to date

A file holds one table: `facts` (command, commit, data, hardware, where they are known), `columns` and `rows`. A row is an
object: one measured value for each column's `key`. A column's `format` writes a number, or a list such as mean and deviation.
Where one row is written with other digits or set in bold, its value is {"value": NUMBER, "shown": TEXT}. A row
{"from": TABLE, "where": {...}, ...} takes over the one row of another table that fits, and adds to it.

A new measurement is a new row with facts of its own. `transcribed_from` marks numbers that were measured before these files
existed, and for which only the document is left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpu_targets import targets
from regions import filled, names_in, settle

from loftq_exp.report.table import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("results", "low-bit", "performance", "calibration", "gpu", "reliability", "sweeps", "lm-eval")
    ),
]
NAME = "scripts/result_tables.py"
FROM_A_CARD = ("gpu-tests", "gpu-stage")
"""Tables that `make gpu` measures on a card, and that say so until it has."""
MADE_HERE = ("gpu-targets",)
"""Tables without a file of their own."""


def read(name: str) -> dict[str, Any]:
    """One table as its file has it."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a table, those of other tables filled in. ValueError where not exactly one row fits."""
    found = []
    for row in read(name)["rows"]:
        if "from" in row:
            where = row["where"].items()
            fitting = [other for other in rows_of(row["from"]) if all(other.get(key) == value for key, value in where)]
            if len(fitting) != 1:
                raise ValueError(f"{name}: {len(fitting)} rows of {row['from']} are {row['where']}, there must be 1")
            row = fitting[0] | {key: value for key, value in row.items() if key not in ("from", "where")}
        found.append(row)
    return found


def cell(value: Any, form: str) -> str:
    """One value as it is written; nothing where nothing was measured."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return value["shown"]
    if isinstance(value, str):
        return value
    return form.format(*value) if isinstance(value, list) else form.format(value)


def table(name: str) -> str:
    """A table as Markdown."""
    if name == "gpu-targets":
        return targets()
    if name in FROM_A_CARD and not (RESULTS / f"{name}.json").exists():
        return "Not run."
    columns = read(name)["columns"]
    rows = [[cell(row.get(column["key"]), column.get("format", "{}")) for column in columns] for row in rows_of(name)]
    return markdown([column["name"] for column in columns], rows)


def documents() -> dict[Path, str]:
    """The documents with their tables as they should be."""
    pages = {}
    for path in PAGES:
        pages[path] = path.read_text()
        for name in names_in(pages[path], NAME):
            pages[path] = filled(pages[path], name, table(name))
    return pages


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a document is not up to date")
    settle(documents(), parser.parse_args().check)


if __name__ == "__main__":
    main()
