"""The store of initialised checkpoints: `python -m loftq_exp.cache inits [--output-dir FOLDER] list|size|prune`.

Safe while jobs run: a run records its initialisation before creating it, and one that is being written is locked.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loftq_exp.commands.terminal import count, megabytes, say
from loftq_exp.errors import UserError
from loftq_exp.report.console import print_table

DEFAULT_FOLDER = "outputs"
COLUMNS = ("initialisation", "made from", "method", "steps", "MB", "runs that use it")


@dataclass(frozen=True)
class _Stored:
    """An initialised checkpoint in the store."""

    folder: Path
    bytes: int
    runs: tuple[str, ...]
    """Names of the run folders that refer to it."""


def add_parser(commands: Any, make: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `inits` and its subcommands to the cache's `commands`. `make` is the parser class."""
    common = make(add_help=False)
    common.add_argument(
        "--output-dir", default=argparse.SUPPRESS, help=f"output_dir of the runs (default: {DEFAULT_FOLDER})"
    )
    about = "list, size and prune the initialised checkpoints that runs share"
    parser = commands.add_parser("inits", parents=[common], help=about, description=f"Use it to {about}.")
    parser.set_defaults(inits=True)
    commands = parser.add_subparsers(required=True, metavar="list|size|prune")
    listing = commands.add_parser("list", parents=[common], help="list every initialisation and how many runs use it")
    listing.set_defaults(command=_list)
    size = commands.add_parser("size", parents=[common], help="show their number and bytes, and those of unused ones")
    size.set_defaults(command=_size)
    about = "Removes initialisations that no run uses, and incomplete ones of killed processes."
    prune = commands.add_parser("prune", parents=[common], help="remove unused initialisations", description=about)
    prune.add_argument("names", nargs="*", metavar="NAME", help="initialisations to remove (default: all unused ones)")
    prune.add_argument("--force", action="store_true", help="also remove those that a run still uses")
    prune.set_defaults(command=_prune)


def _list(output: Path, options: argparse.Namespace) -> int:
    stored = _store(output)
    if stored:
        print_table(f"{output / 'inits'}: {count(stored, 'initialisation')}", COLUMNS, [_row(one) for one in stored])
    else:
        say(f"{output / 'inits'}: no initialisations")
    _say_version_0_1(output)
    return 0


def _row(one: _Stored) -> list[str]:
    from loftq_exp.artifact.folder import read_artifact  # here, because transformers and PEFT take seconds

    init = read_artifact(one.folder)
    report: dict[str, Any] = init.report if init else {}
    quant = report.get("quant", {})
    return [one.folder.name, str(report.get("model", {}).get("requested", "-")), str(quant.get("method", "-")),
            str(quant.get("iter", "-")), f"{one.bytes / 1e6:.1f}", str(len(one.runs))]  # fmt: skip


def _size(output: Path, options: argparse.Namespace) -> int:
    stored = _store(output)
    free = [one for one in stored if not one.runs]
    say(f"{count(stored, 'initialisation')}, {megabytes(stored)}; {len(free)} unused, {megabytes(free)}")
    _say_version_0_1(output)
    return 0


def _prune(output: Path, options: argparse.Namespace) -> int:
    """Remove the selected initialisations, and print what was removed and what remains."""
    stored = _store(output)
    going = [one for one in stored if one.folder.name in options.names] if options.names else stored
    if unknown := set(options.names) - {one.folder.name for one in stored}:
        raise UserError(
            f"{min(unknown)}: there is no such initialisation in {output / 'inits'}; `inits list` shows them"
        )
    named = [one for one in going if one.runs and not options.force]
    if named and options.names:
        raise UserError(
            f"{named[0].folder.name}: runs/{named[0].runs[0]} still uses it; add --force to remove it anyway"
        )
    gone = [one for one in going if one not in named and _remove(one.folder)]
    for place in _leftovers(output):
        shutil.rmtree(place, ignore_errors=True)
    staying = [one for one in stored if one not in gone]
    say(f"removed {count(gone, 'initialisation')}, {megabytes(gone)}; {len(staying)} remain, {megabytes(staying)}")
    return 0


def _store(output: Path) -> list[_Stored]:
    """Return every initialisation in the store, sorted by name. A run refers to one by its folder name, which holds its key."""
    from loftq_exp.artifact.folder import REPORT
    from loftq_exp.records import init_of_run

    runs: dict[str, list[str]] = defaultdict(list)
    for run in sorted((output / "runs").glob("*")):
        if init := init_of_run(run):
            runs[init.name].append(run.name)
    folders = [place.parent for place in sorted((output / "inits").glob(f"[!.]*/{REPORT}"))]
    return [_Stored(folder, _bytes(folder), tuple(runs[folder.name])) for folder in folders]


def _remove(folder: Path) -> bool:
    """Remove an initialisation. For other processes this is atomic. Returns False if a job is writing it."""
    aside = folder.with_name(f".{folder.name}.replaced")
    try:
        with _locked(folder):
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            shutil.rmtree(aside)
    except Timeout:
        say(f"{folder.name}: a job is writing it; it is kept")
        return False
    except FileNotFoundError:
        return False  # removed by another process meanwhile
    except OSError as error:
        raise UserError(f"{folder}: cannot be removed ({error.strerror}); ask its owner") from None
    return True


def _leftovers(output: Path) -> Iterator[Path]:
    """Yield the incomplete folders of killed processes, whose lock is free."""
    for place in sorted((output / "inits").glob(".*")):
        if place.suffix in (".partial", ".replaced"):
            with contextlib.suppress(Timeout, OSError), _locked(place.with_name(place.stem.removeprefix("."))):
                yield place


def _locked(folder: Path) -> FileLock:
    """Return the lock under which the quantize stage writes `folder`. Entering it raises Timeout if it is held."""
    return FileLock(folder.parent / f".{folder.name}.lock", timeout=0)


def _say_version_0_1(output: Path) -> None:
    """Print the initialisations that version 0.1 stored inside run folders."""
    from loftq_exp.artifact.folder import REPORT
    from loftq_exp.records import is_of_version_0_1

    old = [_Stored(place.parent, _bytes(place.parent), ()) for place in sorted((output / "runs").glob(f"*/*/{REPORT}"))
           if is_of_version_0_1(place.parent.parent)]  # fmt: skip
    if old:
        say(f"{count(old, 'initialisation')} of version 0.1 inside run folders, {megabytes(old)}: left alone")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
