"""Draw which package of loftq_exp imports which, from the code itself: writes docs/architecture.svg.

    make docs
    python scripts/draw_architecture.py --count [FOLDER]     # print the numbers of another tree (FOLDER/loftq_exp)

A room is a package of `loftq_exp`, or a module that lies beside them. An arrow is a room whose modules import another room's.
An arrow points back up if no order of the rooms lets it point down: `upward` counts the fewest such arrows in any order.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import grimp
from regions import filled, settle

from loftq_exp.report.table import markdown

ROOT = Path(__file__).parents[1]
PACKAGE = "loftq_exp"
PICTURE = ROOT / "docs" / "architecture.svg"
BEFORE = ROOT / "docs" / "results" / "architecture.json"
PAGE = ROOT / "docs" / "architecture.md"
FORMATS = ("dense", "bnb4", "packed")
"""The storage formats. A comparison with one of these names is a branch on the format."""

BOX, PASS, GAP, LAYER, MARGIN = (120, 36), 4, 22, 84, 20
"""Size of a room, width of a passing arrow, space between two, distance of two layers and border, in pixels."""
SWEEPS = 24


class House(NamedTuple):
    """The rooms of a package and its arrows: who imports whom, and by how many import statements."""

    packages: frozenset[str]
    modules: frozenset[str]
    arrows: dict[tuple[str, str], int]

    @property
    def rooms(self) -> list[str]:
        return sorted(self.packages | self.modules)

    def imported_by(self, room: str) -> set[str]:
        """The rooms that `room` imports."""
        return {below for above, below in self.arrows if above == room}


def house(folder: Path = ROOT) -> House:
    """The house in `folder/loftq_exp`, without entry points (`__main__`) and without imports under TYPE_CHECKING."""
    sys.path.insert(0, str(folder))
    loaded = sys.modules.pop(PACKAGE, None)  # grimp looks there first, and would find this tree's
    try:
        graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    finally:
        sys.path.remove(str(folder))
        if loaded:
            sys.modules[PACKAGE] = loaded
    tops = graph.find_children(PACKAGE)
    hidden = f"{PACKAGE}.__main__"
    packages = {top for top in tops if (folder / top.replace(".", "/") / "__init__.py").exists()}
    arrows: dict[tuple[str, str], int] = {}
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            ends = [room_of(name) for name in (module, target)]
            if all(ends) and ends[0] != ends[1] and not module.endswith(".__main__"):
                arrows[ends[0], ends[1]] = arrows.get((ends[0], ends[1]), 0) + 1
    short = {top: top.removeprefix(f"{PACKAGE}.") for top in tops if top != hidden}
    return House(
        frozenset(short[top] for top in packages), frozenset(short[top] for top in short if top not in packages), arrows
    )


def room_of(module: str) -> str:
    """The room of a module's full name: what follows `loftq_exp.`, or nothing for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def upward(found: House) -> list[tuple[str, str]]:
    """The fewest arrows that point back up, over all orders of the rooms: exact, by dynamic programming within each cycle."""
    back: list[tuple[str, str]] = []
    for group in cycles(found):
        inner = {(above, below) for above, below in found.arrows if above in group and below in group}
        back += fewest_back(tuple(sorted(group)), frozenset(inner))
    return sorted(back)


def cycles(found: House) -> list[set[str]]:
    """The groups of rooms that reach each other."""
    reach = {room: reached(found, room) for room in found.rooms}
    groups = {frozenset({room} | {other for other in reach[room] if room in reach[other]}) for room in found.rooms}
    return [set(group) for group in sorted(groups, key=sorted) if len(group) > 1]


def reached(found: House, room: str) -> set[str]:
    """All rooms that `room` imports, directly or not."""
    seen: set[str] = set()
    ahead = [room]
    while ahead:
        new = found.imported_by(ahead.pop()) - seen
        seen |= new
        ahead += new
    return seen


def fewest_back(rooms: tuple[str, ...], arrows: frozenset[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that point up in the order of `rooms` that has fewest of them."""

    @functools.cache
    def best(placed: frozenset[str]) -> tuple[int, tuple[tuple[str, str], ...]]:
        """With `placed` on top, in the best order: how many arrows point up to them from the others, and which."""
        if not placed:
            return 0, ()
        options = []
        for last in sorted(placed):
            above = placed - {last}
            back = tuple((last, room) for room in sorted(above) if (last, room) in arrows)
            cost, before = best(above)
            options.append((cost + len(back), before + back))
        return min(options)

    return list(best(frozenset(rooms))[1])


def branches(folder: Path) -> list[str]:
    """The comparisons with the name of a storage format, as `module:line`; storage/ itself is not searched."""
    return [
        f"{path.relative_to(folder / PACKAGE)}:{node.lineno}"
        for path in modules(folder)
        if path.relative_to(folder / PACKAGE).parts[0] != "storage"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare) and names_a_format(node)
    ]


def names_a_format(node: ast.Compare) -> bool:
    """Whether something is compared with a storage format's name, or looked for among such names."""
    parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
    return any(isinstance(part, ast.Constant) and part.value in FORMATS for part in parts)


def modules(folder: Path) -> list[Path]:
    return sorted((folder / PACKAGE).rglob("*.py"))


def shared_names(folder: Path) -> list[str]:
    """The module names that two packages use; a task and its metric may share theirs."""
    places: dict[str, set[str]] = {}
    for path in modules(folder):
        if path.stem not in ("__init__", "__main__"):
            room = path.parent.name
            places.setdefault(path.stem, set()).add("tasks" if room == "metrics" else room)
    return sorted(name for name, rooms in places.items() if len(rooms) > 1)


def counts(folder: Path = ROOT) -> dict[str, int]:
    """The numbers of docs/architecture.md."""
    found = house(folder)
    largest = max(sum(path.parent.name == room for path in modules(folder)) - 1 for room in found.packages)
    return {
        "packages": len(found.packages),
        "modules beside them": len(found.modules),
        "modules in the largest package": largest,
        "arrows": len(found.arrows),
        "arrows back up": len(upward(found)),
        "module names used twice": len(shared_names(folder)),
        "comparisons with a storage format's name, outside storage/": len(branches(folder)),
    }


# The picture ----------------------------------------------------------------------------------------------------------


def layers(found: House) -> list[list[str]]:
    """The rooms from top to bottom: each lies above all that it imports."""
    back = set(upward(found))
    below = {room: {other for other in found.imported_by(room) if (room, other) not in back} for room in found.rooms}

    @functools.cache
    def height(room: str) -> int:
        return max((height(other) + 1 for other in below[room]), default=0)

    tallest = max(map(height, found.rooms))
    return [[room for room in found.rooms if height(room) == level] for level in range(tallest, -1, -1)]


def drawn_arrows(found: House) -> list[tuple[str, str]]:
    """The arrows that no path of others implies, which are enough to say who stands on whom."""
    implied = {
        (above, below)
        for above, below in found.arrows
        if any(below in reached(found, other) for other in found.imported_by(above) - {below})
    }
    return sorted(set(found.arrows) - implied | set(upward(found)))


Waypoint = tuple[str, str, int]
"""Where an arrow from one room to another passes a layer between them."""


def grid(found: House) -> tuple[list[list[str | Waypoint]], list[list[str | Waypoint]]]:
    """The layers with a waypoint wherever an arrow passes one, and each arrow as its stations from top to bottom."""
    rows: list[list[str | Waypoint]] = [list(row) for row in layers(found)]
    level = {room: place for place, row in enumerate(rows) for room in row if isinstance(room, str)}
    chains: list[list[str | Waypoint]] = []
    for above, below in drawn_arrows(found):
        chain: list[str | Waypoint] = [above]
        for passed in range(level[above] + 1, level[below]):
            chain.append((above, below, passed))
            rows[passed].append((above, below, passed))
        chains.append([*chain, below])
    return rows, chains


def places(rows: list[list[str | Waypoint]], chains: list[list[str | Waypoint]]) -> dict[str | Waypoint, float]:
    """The middle of everything in its layer, ordered so that what is joined lies near, from the widest layer's middle."""
    joined: dict[str | Waypoint, list[str | Waypoint]] = {item: [] for row in rows for item in row}
    for chain in chains:
        for one, other in itertools.pairwise(chain):
            joined[one].append(other)
            joined[other].append(one)
    at: dict[str | Waypoint, float] = {}
    for row in rows:
        at |= spread(row)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            middle = {item: sum(at[other] for other in joined[item]) / max(len(joined[item]), 1) for item in row}
            at |= spread(sorted(row, key=lambda item: (round(middle[item], 6), str(item))))
    return at


def spread(row: list[str | Waypoint]) -> dict[str | Waypoint, float]:
    """The items of a layer side by side around zero."""
    widths = [BOX[0] if isinstance(item, str) else PASS for item in row]
    left = -(sum(widths) + GAP * (len(row) - 1)) / 2
    found = {}
    for item, width in zip(row, widths, strict=True):
        found[item] = left + width / 2
        left += width + GAP
    return found


def picture(found: House) -> str:
    """The SVG: packages are filled, single modules are not."""
    rows, chains = grid(found)
    at = places(rows, chains)
    half = max(abs(x) for x in at.values()) + BOX[0] / 2 + MARGIN
    level = {item: place for place, row in enumerate(rows) for item in row}
    width, height = 2 * half, 2 * MARGIN + BOX[1] + (len(rows) - 1) * LAYER
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="14" text-anchor="middle">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#56606b"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for chain in chains:
        stations = [(at[item] + half, MARGIN + level[item] * LAYER) for item in chain]
        lines.append(f'<path d="{curve(stations)}" fill="none" stroke="#56606b" marker-end="url(#head)"/>')
    for item, x in at.items():
        if isinstance(item, str):
            left, top = x + half - BOX[0] / 2, MARGIN + level[item] * LAYER
            fill = "#dbe9f6" if item in found.packages else "white"
            lines.append(
                f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="{fill}" '
                f'stroke="#34495e"/><text x="{x + half:.0f}" y="{top + BOX[1] / 2 + 5:.0f}">{item}</text>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def curve(stations: list[tuple[float, float]]) -> str:
    """The path of an arrow from the bottom of its first station, straight through the others, to the top of its last."""
    path = f"M{stations[0][0]:.0f} {stations[0][1] + BOX[1]:.0f}"
    x, y = stations[0][0], stations[0][1] + BOX[1]
    for place, (to, top) in enumerate(stations[1:], 1):
        middle = (y + top) / 2
        path += f" C{x:.0f} {middle:.0f} {to:.0f} {middle:.0f} {to:.0f} {top:.0f}"
        if place < len(stations) - 1:
            path += f" V{top + BOX[1]:.0f}"
        x, y = to, top + BOX[1]
    return path


def numbers() -> str:
    """The table of the house before and now."""
    before = json.loads(BEFORE.read_text())
    rows = [(name, str(before["counts"][name]), str(now)) for name, now in counts().items()]
    return markdown(("", f"before ({before['commit']})", "now"), rows)


def documents() -> dict[Path, str]:
    """The picture and the page with its numbers, as they should be."""
    return {PICTURE: picture(house()), PAGE: filled(PAGE.read_text(), "numbers", numbers())}


def main() -> None:
    """Write the picture and the numbers, or print those of one tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", nargs="?", const=ROOT, type=Path, metavar="FOLDER", help="print the numbers of a tree"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --count: draw that tree into FILE too")
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a file is not up to date")
    args = parser.parse_args()
    if args.count is None:
        settle(documents(), args.check)
        return
    folder = args.count.resolve()
    if args.picture:
        args.picture.write_text(picture(house(folder)))
    print(json.dumps(counts(folder), indent=1))
    print(*(f"back up: {above} -> {below}" for above, below in upward(house(folder))), sep="\n")
    print(*(f"used twice: {name}" for name in shared_names(folder)), sep="\n")
    print(*(f"branch: {place}" for place in branches(folder)), sep="\n")


if __name__ == "__main__":
    main()
