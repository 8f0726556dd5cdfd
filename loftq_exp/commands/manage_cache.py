"""The cache command: `python -m loftq_exp.cache [--cache-dir FOLDER] list|size|verify|prune`, and `inits`.

All subcommands are safe while jobs run: a job recomputes an entry that was removed. Entries are pruned by last use, because
a job that reads an entry updates its modification time. Converted models are counted but never removed, because a running
job may be about to open one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from loftq_exp.calibration.cache import StatisticsCache, check_file, describe_file
from loftq_exp.commands import manage_inits
from loftq_exp.commands.terminal import OneLineParser, count, exit_code, megabytes, quiet_libraries, say
from loftq_exp.config import local_path
from loftq_exp.errors import UserError
from loftq_exp.initialise.decomposition_cache import DamagedEntry, DecompositionCache, describe_entry, read_entry
from loftq_exp.manifest import FILE as MANIFEST
from loftq_exp.manifest import faults
from loftq_exp.progress import progress
from loftq_exp.report.console import print_table
from loftq_exp.schemes import variation
from loftq_exp.source.digests import FileDigests

DEFAULT_FOLDER = "outputs/cache"
STATISTICS_COLUMNS = ("statistics", "layers", "inputs", "H", "tokens", "MB", "last used")
COLUMNS = ("entry", "shape", "quantizer", "rank", "steps", "solver", "error", "MB", "last used")


@dataclass(frozen=True)
class _File:
    """A file of the cache, as found when the command listed it."""

    path: Path
    bytes: int
    used: float
    """Last use, in seconds since 1970."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 for damage, and for an error, which is one line on standard error."""

    def work() -> int:
        options = _parser().parse_args(argv)
        quiet_libraries()
        name, default = ("output_dir", manage_inits.DEFAULT_FOLDER) if options.inits else ("cache_dir", DEFAULT_FOLDER)
        folder = local_path(getattr(options, name, default))
        if not folder.is_dir():
            raise UserError(f"--{name.replace('_', '-')}={folder}: there is no such folder; give the {name} of a run")
        code: int = options.command(folder, options)
        return code

    return exit_code(work, "removed files are gone, all others are intact")


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command. `--cache-dir` may be before or after the subcommand."""
    common = OneLineParser(add_help=False)
    # Suppressed, because a subcommand's default would override a value given before it.
    common.add_argument(
        "--cache-dir", default=argparse.SUPPRESS, help=f"cache_dir of the runs (default: {DEFAULT_FOLDER})"
    )
    about = (
        "Lists, sizes, verifies and prunes the cache of decompositions and calibration statistics. Safe while jobs run."
    )
    parser = OneLineParser(prog="python -m loftq_exp.cache", description=about, parents=[common])
    commands = parser.add_subparsers(required=True, metavar="list|size|verify|prune|inits")
    listing = commands.add_parser("list", parents=[common], help="list every entry with its content, last used first")
    listing.set_defaults(command=_list)
    size = commands.add_parser("size", parents=[common], help="show the number of entries and bytes, by kind")
    size.set_defaults(command=_size)
    verify = commands.add_parser(
        "verify",
        parents=[common],
        help="read every entry, and every file with a stored digest: also of converted models, initialised checkpoints and "
        "runs; the exit code is 1 if one is damaged or wrong",
    )
    verify.add_argument("--drop", action="store_true", help="remove damaged entries, which are recomputed on use")
    verify.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="output_dir of the runs, whose initialised checkpoints and results are read too (default: the folder of the cache)",
    )
    verify.set_defaults(command=_verify)
    about = "Removes decompositions, calibration statistics and incomplete files of killed processes. Converted models are kept."
    prune = commands.add_parser("prune", parents=[common], help="remove entries", description=about)
    which = prune.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every entry")
    which.add_argument(
        "--max-gb", type=_amount, metavar="N", help="the least recently used entries, until N GB (1e9 bytes) remain"
    )
    which.add_argument("--older-than", type=_amount, metavar="DAYS", help="entries that no run used for DAYS days")
    prune.set_defaults(command=_prune)
    parser.set_defaults(inits=False)
    manage_inits.add_parser(commands, OneLineParser)
    return parser


def _amount(text: str) -> float:
    """Convert to a finite number of at least 0. argparse adds the option's name to the error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _list(folder: Path, options: argparse.Namespace) -> int:
    """Print a row for each entry, last used first. Contents are checked only by `verify`."""
    rows = [row for file in _last_used_first(_decompositions(folder)) if (row := _row(file)) is not None]
    if rows:
        print_table(f"{folder}: {count(rows, 'decomposition')}", COLUMNS, rows)
    else:
        say(f"{folder}: no decompositions")
    rows = [row for file in _last_used_first(_statistics(folder)) if (row := _statistics_row(file)) is not None]
    if rows:
        print_table(f"{folder}: {_files_of(rows)}", STATISTICS_COLUMNS, rows)
    return 0


def _last_used_first(files: Sequence[_File]) -> list[_File]:
    return sorted(files, key=lambda file: (-file.used, file.path))


def _files_of(files: Sequence[object]) -> str:
    """The number of files of calibration statistics, in words."""
    return f"{count(files, 'file')} of calibration statistics"


def _row(file: _File) -> list[str] | None:
    """Return an entry's row, in the order of COLUMNS. None if the entry was removed meanwhile."""
    size, used = f"{file.bytes / 1e6:.1f}", datetime.fromtimestamp(file.used).isoformat(" ", "minutes")
    name = file.path.stem[:12]
    try:
        entry = describe_entry(file.path)
    except FileNotFoundError:
        return None
    except DamagedEntry:
        return [name, "damaged", "", "", "", "", "", size, used]
    recipe = entry.get("recipe", {})
    error = f"{entry['errors'][-1]:.4f}"
    shape = " x ".join(map(str, entry["shape"]))
    return [name, shape, _quantizer(recipe.get("quantizer")), str(recipe.get("rank", "-")),
            str(len(entry["errors"]) - 1), recipe.get("solver", "-"), error, size, used]  # fmt: skip


def _statistics_row(file: _File) -> list[str] | None:
    """Return the row of a block's statistics, in the order of STATISTICS_COLUMNS. None if the file was removed meanwhile."""
    size, used = f"{file.bytes / 1e6:.1f}", datetime.fromtimestamp(file.used).isoformat(" ", "minutes")
    name = file.path.stem[:12]
    try:
        entry = describe_file(file.path)
    except FileNotFoundError:
        return None
    except ValueError:
        return [name, "damaged", "", "", "", size, used]
    inputs = len(set(entry["modules"].values()))
    return [
        name,
        str(len(entry["modules"])),
        str(inputs),
        entry["kind"],
        str(max(entry["tokens"].values())),
        size,
        used,
    ]


def _quantizer(identity: dict[str, Any] | None) -> str:
    """Return a short description of a quantizer. Entries of older versions do not record it."""
    if identity is None:
        return "-"
    blocks = f", blocks of {identity['block_size']}" if "block_size" in identity else ""
    return f"{identity['type']} {identity['bits']} bits{variation(identity)}{blocks}, {identity['scale_dtype']}"


def _size(folder: Path, options: argparse.Namespace) -> int:
    """Print number and bytes of the entries, the converted models and incomplete files of killed processes, by kind."""
    entries, statistics, leftovers = _decompositions(folder), _statistics(folder), _leftovers(folder)
    models = [path for path in sorted((folder / "models").glob("[!.]*")) if path.is_dir()]
    stored = [file for model in models for file in _looked_at(path for path in model.rglob("*") if path.is_file())]
    say(f"{count(entries, 'decomposition')}, {megabytes(entries)}")
    if statistics:
        say(f"{_files_of(statistics)}, {megabytes(statistics)}")
    say(f"{count(models, 'converted model')}, {megabytes(stored)}")
    if leftovers:
        left = count(leftovers, "incomplete file")
        say(f"{left} of killed processes, {megabytes(leftovers)}; prune removes them")
    return 0


def _verify(folder: Path, options: argparse.Namespace) -> int:
    """Read every entry, and every file with a stored digest. Print a line for each that is damaged or wrong.

    Returns 1 if there is one, dropped or not.
    """
    files, statistics, digests = _decompositions(folder), _statistics(folder), FileDigests(folder)
    checks: list[tuple[_File, Callable[[Path], object]]] = [(file, read_entry) for file in files]
    checks += [(file, check_file) for file in statistics]
    damaged: list[_File] = []
    with progress("verify") as advance:
        for done, (file, check) in enumerate(checks, 1):
            try:
                check(file.path)
            except FileNotFoundError:
                pass  # removed by another process meanwhile
            except OSError as error:
                raise UserError(f"{file.path}: cannot be read ({error.strerror}); ask its owner") from None
            except (DamagedEntry, ValueError) as damage:
                damaged.append(file)
                say(f"damaged: {file.path} ({damage})")
            advance(done, len(checks), f"{len(damaged)} damaged")
    remembered = list(digests.entries())
    wrong = []
    for entry in remembered:
        if fault := digests.verify(entry):
            wrong.append(entry)
            say(f"wrong digest: {fault}")
    if options.drop:
        _remove([*damaged, *_looked_at(wrong)])
    fate = "dropped" if options.drop else "verify --drop removes them"
    for all_of, named in ((files, count(files, "decomposition")), (statistics, _files_of(statistics))):
        of_these = [file for file in all_of if file in damaged]
        if all_of or all_of is files:
            say(f"{named}, {len(of_these)} damaged{f' ({fate})' if of_these else ''}")
    if remembered:
        say(f"{count(remembered, 'remembered digest')}, {len(wrong)} wrong{f' ({fate})' if wrong else ''}")
    return 1 if _verify_folders(_with_manifests(folder, options)) or damaged or wrong else 0


def _with_manifests(folder: Path, options: argparse.Namespace) -> dict[str, list[list[Path]]]:
    """Return the things whose folders have manifests, by kind: each is a list of folders."""
    from loftq_exp.records import init_of_run  # here, because transformers and PEFT take seconds

    output = local_path(options.output_dir) if options.output_dir else folder.parent
    models, runs = ([path for path in sorted(place.glob("[!.]*")) if path.is_dir()]
                    for place in (folder / "models", output / "runs"))  # fmt: skip
    inits = {path for path in (output / "inits").glob("[!.]*") if path.is_dir()}
    inits |= {init for run in runs if (init := init_of_run(run)) and init.is_dir()}
    inside = ("adapter", "checkpoints/checkpoint-*", "evaluations/*")
    return {
        "converted model": [[model] for model in models],
        "initialised checkpoint": [[init, init / "loftq_init"] for init in sorted(inits)],
        "run": [[run, *(path for name in inside for path in sorted(run.glob(name)))] for run in runs],
    }


def _verify_folders(kinds: dict[str, list[list[Path]]]) -> bool:
    """Check the files of each thing against its manifests. Print a line for each that differs, and the numbers by kind."""
    total, done, lines = sum(map(len, kinds.values())), 0, []
    found_any = False
    with progress("verify folders") as advance:
        for named, things in kinds.items():
            damaged = unlisted = 0
            for folders in things:
                found = [fault for folder in folders for fault in faults(folder)]
                for fault in found:
                    say(f"damaged: {fault}")
                damaged += bool(found)
                unlisted += not all((folder / MANIFEST).is_file() for folder in folders if folder.is_dir())
                done += 1
                advance(done, total, named)
            older = f", {unlisted} with files that no manifest lists" if unlisted else ""
            lines += [f"{count(things, named)}, {damaged} damaged{older}"] if things else []
            found_any |= damaged > 0
    for line in lines:
        say(line)
    return found_any


def _prune(folder: Path, options: argparse.Namespace) -> int:
    """Remove the selected entries and incomplete files of killed processes, and print what was removed and what remains."""
    entries, leftovers = sorted(_entries(folder), key=lambda file: file.used), _leftovers(folder)
    going = entries
    if options.older_than is not None:
        since = time.time() - options.older_than * 24 * 3600
        going = [file for file in entries if file.used < since]
    elif options.max_gb is not None:
        excess = sum(file.bytes for file in entries) - options.max_gb * 1e9
        going = []
        for file in entries:
            if excess <= 0:
                break
            going.append(file)
            excess -= file.bytes
    _remove(going)
    _remove(leftovers)
    staying = entries[len(going) :]
    decompositions, statistics = (
        [file for file in going if _is_statistics(folder, file) is kind] for kind in (False, True)
    )
    removed = [count(decompositions, "decomposition"), *([_files_of(statistics)] if statistics else [])]
    removed += [count(leftovers, "incomplete file")] if leftovers else []
    say(f"removed {' and '.join(removed)}, {megabytes([*going, *leftovers])}; "
         f"{len(staying)} remain, {megabytes(staying)}")  # fmt: skip
    return 0


def _entries(folder: Path) -> list[_File]:
    """Return everything in the cache that is computed again when it is missing."""
    return [*_decompositions(folder), *_statistics(folder)]


def _decompositions(folder: Path) -> list[_File]:
    return _looked_at(DecompositionCache(folder).entries())


def _statistics(folder: Path) -> list[_File]:
    """Return the files of calibration statistics, one per block."""
    return _looked_at(StatisticsCache(folder).entries())


def _is_statistics(folder: Path, file: _File) -> bool:
    return file.path.is_relative_to(StatisticsCache(folder).folder)


def _leftovers(folder: Path) -> list[_File]:
    """Return the incomplete files of killed processes."""
    return _looked_at([*DecompositionCache(folder).leftovers(), *StatisticsCache(folder).leftovers()])


def _looked_at(paths: Iterable[Path]) -> list[_File]:
    """Return the files among `paths` that still exist."""
    files = []
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        files.append(_File(path, stat.st_size, stat.st_mtime))
    return files


def _remove(files: Sequence[_File]) -> None:
    """Remove files, some of which may already be gone. Folders are kept, because a job may be about to write there."""
    for file in files:
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{file.path}: cannot be removed ({error.strerror}); ask its owner") from None
