"""Damage each file that a run reads back, and compare what the next run does: `python tests/corruption.py --help`.

A file is flipped (one bit), cut, emptied, removed, or swapped for the one of another run. Then one of these commands runs, a
fork as in killing.py: the same one `again`, one that scores other rows (`score`, or `evaluate`: without the other stages),
each with export and report, or one that resumes a training. A case fails if there is a traceback, if the results differ
from those without damage, or if a file that the command uses stays damaged without an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from killing import CONFIGS, Start, configured, differences, last_lines, snapshot, write_row

CHANGES = ("flipped", "cut", "empty", "missing", "swapped")
MORE = "task.max_eval_samples=1"
COMMANDS: dict[str, tuple[str, ...]] = {
    "again": (),
    "score": (MORE,),
    "evaluate": (MORE, "stages=[evaluate]"),
    "resume": (),
}
USED = {
    "again": ("*/inits/*", "*/adapter/*", *(f"*/runs/*-????????/{name}" for name in ("*.json", "*.jsonl"))),
    "score": ("*/inits/*", "*/adapter/*"),
    "evaluate": ("*/inits/*", "*/adapter/*"),
    "resume": ("*/inits/*", "*/checkpoints/*"),
}
"""Files of which a command must notice a damage: it makes them again, or is refused. Not those below evaluations/: scores and
samples of the last call lie at the top of the run's folder, and the others are read when they are asked for again."""
UNREAD = ("*/README.md", "*/.gitattributes", "*/training_args.bin", "*.lock", "*/provenance.json")
"""Files that no command reads."""


class Damage:
    """The results of runs in several states, and what each command leaves of them without damage."""

    def __init__(self, start: Start) -> None:
        """Make the results. The ones to swap with are of another block size and learning rate."""
        self.start = start
        for overrides in COMMANDS.values():
            CONFIGS.setdefault(overrides, configured(*overrides))
        other = ("quant.block_size=32", "train.learning_rate=1e-2")
        CONFIGS[other] = configured(*other)
        self.finished, self.stopped, self.other, self.other_stopped = (
            start.folder / name for name in ("finished", "stopped", "other", "other-stopped")
        )
        for place, overrides, stops in (
            (self.finished, (), False),
            (self.stopped, (), True),
            (self.other, other, False),
            (self.other_stopped, other, True),
        ):
            start.fresh()
            code = start.wait(start.fork(stop_before_adapter if stops else None, overrides, more=False))
            assert code == (-signal.SIGKILL if stops else 0), last_lines(start.log)
            shutil.copytree(start.root, place, symlinks=True)
        self.expected: dict[str, dict[str, Any]] = {}
        for command in COMMANDS:
            code = self.run(command)
            assert code == 0, last_lines(start.log)
            self.expected[command] = snapshot(start.root)

    def state(self, command: str) -> tuple[Path, Path]:
        """What a command starts from, and the results of another run in the same state."""
        return (self.stopped, self.other_stopped) if command == "resume" else (self.finished, self.other)

    def run(self, command: str, file: str | None = None, change: str = "", draw: random.Random | None = None) -> int:
        """Put the results into the folder of the case, with one file changed, and run a command on them."""
        state, other = self.state(command)
        shutil.rmtree(self.start.root, ignore_errors=True)
        shutil.copytree(state, self.start.root, symlinks=True)
        if file:
            damage(self.start.root / file, change, twin(state, other, file), draw or random.Random(0))
        return self.start.wait(self.start.fork(None, COMMANDS[command], more=command != "resume"))

    def cases(self) -> list[tuple[str, str, str]]:
        """Each command, file that it may read, and change of it."""
        found = []
        for command in COMMANDS:
            state, other = self.state(command)
            for path in sorted(path for path in state.rglob("*") if path.is_file() and not path.is_symlink()):
                file = path.relative_to(state).as_posix()
                if "tfevents" in file or file.startswith("model/") or any(fnmatch(f"/{file}", name) for name in UNREAD):
                    continue
                for change in CHANGES:
                    if change == "swapped" and twin(state, other, file) is None:
                        continue
                    if path.stat().st_size < 16 and change in ("cut", "flipped"):
                        continue
                    found.append((command, file, change))
        return found

    def case(self, command: str, file: str, change: str, draw: random.Random) -> tuple[str, list[str]]:
        """What became of one case, and what is wrong."""
        before = self.start.root / file
        code = self.run(command, file, change, draw)
        if code:
            lines = self.start.log.read_text(errors="replace").strip().splitlines()
            error = lines[-1] if lines else ""
            if error.startswith("loftq_exp.errors.UserError: "):
                return "refused", []
            return "failed", [f"exit code {code}: {last_lines(self.start.log)}"]
        found, expected = snapshot(self.start.root), self.expected[command]
        wrong = differences(expected, found)
        own = [f"{file} ", f"{Path(file).parent}/manifest.json ", f"{Path(file).parent.parent}/manifest.json "]
        others = [line for line in wrong if not any(line.startswith(name) for name in own)]
        if others:
            return "failed", [f"exit code 0, and {line}" for line in others]
        if not wrong:
            return ("made again" if before.exists() else "harmless"), []
        if change == "missing" and before.name == "manifest.json" and "not verified" in self.start.log.read_text():
            return "said to be unverified", []
        if "/evaluations/" not in file and any(fnmatch(f"/{file}", name) for name in USED[command]):
            return "failed", [f"exit code 0, and {line}" for line in wrong]
        return "not read", []


def stop_before_adapter() -> None:
    """End the process where it would save the trained adapter, so that its training checkpoints stay."""
    from loftq_exp.training import finetune

    finetune._save_adapter = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def twin(state: Path, other: Path, file: str) -> Path | None:
    """The file of the same name of another run, if it differs. Folders are named by the digest of their settings."""
    names = [
        path
        for path in other.rglob(Path(file).name)
        if path.is_file() and len(path.relative_to(other).parts) == len(Path(file).parts)
        and path.relative_to(other).parts[:2] == Path(file).parts[:2]
        and path.parent.name.split("-")[0] == Path(file).parent.name.split("-")[0]
    ]  # fmt: skip
    data = (state / file).read_bytes()
    return next((path for path in sorted(names) if path.read_bytes() != data), None)


def damage(path: Path, change: str, other: Path | None, draw: random.Random) -> None:
    """Change one file."""
    data = bytearray(path.read_bytes())
    if change == "missing":
        path.unlink()
        return
    if change == "flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif change == "swapped":
        assert other
        data = bytearray(other.read_bytes())
    else:
        data = data[: draw.randrange(1, len(data))] if change == "cut" else bytearray()
    path.write_bytes(bytes(data))


def damage_all(tried: Damage, number: int, seed: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Try `number` of the cases, drawn evenly; or those of files whose names contain one of `only`."""
    began, draw = time.monotonic(), random.Random(seed)
    cases = [case for case in tried.cases() if not only or any(name in f"{case[0]}:{case[1]}" for name in only)]
    draw.shuffle(cases)
    counts, failures = Counter[str](), list[str]()
    for command, file, change in cases[:number]:
        outcome, wrong = tried.case(command, file, change, draw)
        counts[outcome] += 1
        failures += [f"{command}, {file} {change}: {'; '.join(wrong)}"] if wrong else []
    return {"cases": sum(counts.values()), "of": len(cases), "outcomes": dict(counts), "failures": failures,
            "seconds": round(time.monotonic() - began)}  # fmt: skip


PROMISE = "a damaged, missing or swapped file is made again or named in one line, and changes no result"


def main() -> None:
    """Print the counts, and each failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="parts of COMMAND:FILE")
    parser.add_argument("--write", type=Path, help="JSON file for the counts: docs/results/reliability.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corruption-") as folder:
        found = damage_all(Damage(Start(Path(folder))), options.cases, options.seed, options.only)
    if options.write:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found["outcomes"].items()))
        how = (f"`python tests/corruption.py --cases {options.cases} --seed {options.seed}`: files of a finished and of a stopped "
               f"run, flipped, cut, emptied, removed or swapped, before 4 commands: {outcomes}")  # fmt: skip
        write_row(options.write, PROMISE, how, found)
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
