"""Tables on the terminal. A narrow terminal gets fewer columns, never cut numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_TEXT, _WORD = 16, 24
"""A column with texts longer than this is not made narrower than it. Words longer than this, such as paths, are folded."""
_EDGES, _EDGE = 3, 1
"""Characters beside the cell of each column, and those beside the last."""


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    drop: Sequence[str] = (),
    notes: Sequence[str] = (),
    elsewhere: str = "",
) -> None:
    """Print a table. Texts wrap at spaces. Columns that do not fit are left out, and a line below the table names them.

    Args:
        title: the line above the table.
        columns: the headings.
        rows: the cells of each row, as many as headings.
        drop: headings in the order in which they are left out, before all others from the right. The first always stays.
        notes: lines below the table.
        elsewhere: where the columns that are left out can be found, for the line below.

    An output that is no terminal is as wide as the cells need, unless COLUMNS is set.
    """
    console = Console()
    limited = console.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
    everything = [_Column(heading, [row[index] for row in rows]) for index, heading in enumerate(columns)]
    order = [
        *(heading for heading in drop if heading in columns),
        *reversed([each for each in columns if each not in drop]),
    ]
    kept = _fitting(everything, order, console.width) if limited else everything
    widths = [each.natural for each in kept]
    if limited:
        spare = max(console.width - _width(each.least for each in kept), 0)
        for index, each in enumerate(kept):
            widths[index] = min(each.natural, each.least + spare)
            spare -= widths[index] - each.least
    table = Table(title=escape(title), title_justify="left")
    for each, width in zip(kept, widths, strict=True):
        table.add_column(escape(each.heading), width=width, overflow="fold")
    for row in zip(*(each.cells for each in kept), strict=True):
        table.add_row(*map(escape, row))
    Console(width=_width(widths)).print(table)
    missing = ", ".join(each.heading for each in everything if each not in kept)
    for line in [*notes, *([f"no room for: {missing}{elsewhere and f'; {elsewhere}'}"] if missing else [])]:
        console.print(line, highlight=False, markup=False, soft_wrap=not limited)


def _fitting(columns: Sequence[_Column], order: Sequence[str], width: int) -> list[_Column]:
    """Return the columns that fit into `width`: the first, and of the others as many as do, in reverse of this order."""
    kept, left_out = list(columns), []
    for heading in order:
        if _width(each.least for each in kept) <= width:
            break
        left_out += [each for each in kept[1:] if each.heading == heading]
        kept = [each for each in kept if each not in left_out]
    for column in reversed(left_out):  # a wide one that was left out later may have made room
        if _width(each.least for each in [*kept, column]) <= width:
            kept.append(column)
    return [each for each in columns if each in kept]


class _Column:
    """A column with its natural width, and the least width at which no number is cut."""

    def __init__(self, heading: str, cells: Sequence[str]) -> None:
        self.heading, self.cells = heading, cells
        self.natural = max(map(cell_len, [heading, *cells]))
        is_text = any(cell_len(cell) > _TEXT and any(map(str.isalpha, cell)) for cell in cells)
        whole = [word for cell in cells for word in cell.split()] if is_text else cells
        longest = max(map(cell_len, whole), default=0)
        words = max([1, *map(cell_len, heading.split()), min(longest, _WORD) if is_text else longest])
        self.least = min(max(words, _TEXT), self.natural) if is_text else words


def _width(widths: Iterable[int]) -> int:
    """Return the width of a table with columns of these widths."""
    each = list(widths)
    return sum(each) + _EDGES * len(each) + _EDGE
