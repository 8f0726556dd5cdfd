"""Runs that work in the same folders at the same time: `python tests/together.py --help`. They are forks, as in killing.py.

Equal jobs: one works, the others wait and find it done. Jobs that differ in training share an initialisation, which is made
once. Jobs of several initialisations in one `save_dir`: whoever does not find its own there is refused. Each run that ends
well must leave what it leaves alone.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from killing import CONFIGS, Start, configured, differences, last_lines, snapshot, write_row

Job = tuple[str, ...]


def equal(processes: int) -> list[Job]:
    """The same job, several times."""
    return [()] * processes


def different(processes: int) -> list[Job]:
    """Jobs of one initialisation with other rates, and each of the rates twice."""
    return [(f"train.learning_rate=1e-{2 + number // 2}",) for number in range(processes)]


def one_save_dir(processes: int) -> list[Job]:
    """Jobs of two initialisations that would be stored at the same place."""
    return [("save_dir=saved", f"quant.block_size={32 << number % 2}") for number in range(processes)]


def try_together(start: Start, jobs: Sequence[Job], may_refuse: bool = False) -> list[str]:
    """Start all jobs at once. Return what is wrong, a line each."""
    for job in jobs:
        CONFIGS.setdefault(job, configured(*job))
    alone = {job: _alone(start, job) for job in dict.fromkeys(jobs)}
    start.fresh()
    logs = [start.folder / f"log{number}.txt" for number in range(len(jobs))]
    pids = [start.fork(overrides=job, log=log, more=False) for job, log in zip(jobs, logs, strict=True)]
    codes = [start.wait(pid) for pid in pids]
    texts = [log.read_text(errors="replace") for log in logs]
    refused = ["it is never replaced" in text for text in texts]
    wrong = [
        f"{' '.join(job)} failed: {last_lines(log)}"
        for job, log, code, no in zip(jobs, logs, codes, refused, strict=True)
        if code and not (no and may_refuse)
    ]
    well = [job for job, code in zip(jobs, codes, strict=True) if code == 0]
    if not well:
        wrong.append("no job ended well")
    expected: dict[str, Any] = {}
    for job in dict.fromkeys(well):
        expected |= alone[job]
    found = snapshot(start.root)
    if may_refuse:  # a refused job leaves its settings and its cache entries
        found = {name: value for name, value in found.items() if name in expected}
    wrong += differences(expected, found)
    trained = sum(ok == 0 and "finetune: done before" not in text for ok, text in zip(codes, texts, strict=True))
    if trained != len(set(well)):
        wrong.append(f"{trained} trainings of {len(set(well))} different jobs")
    computed = sum(int(number) for text in texts for number in re.findall(r"weights, (\d+) computed", text))
    if not may_refuse and computed != 7:
        wrong.append(f"{computed} weights were computed of 7")
    waited = sum("waiting for another process that is " in text for text in texts)
    if waited == 0 and len(jobs) > 2:
        wrong.append("nobody waited")
    return wrong


def _alone(start: Start, job: Job) -> dict[str, Any]:
    start.fresh()
    code = start.wait(start.fork(overrides=job, more=False))
    assert code == 0, last_lines(start.log)
    return snapshot(start.root)


def rounds(start: Start, processes: int, number: int) -> dict[str, Any]:
    """Try each kind of jobs a number of times. Return the counts and the failures."""
    began, cases, failures = time.monotonic(), 0, list[str]()
    kinds = ((equal, False), (different, False), (one_save_dir, True))
    for _ in range(number):
        for make, may_refuse in kinds:
            cases += processes
            failures += [f"{make.__name__}: {line}" for line in try_together(start, make(processes), may_refuse)]
    return {"cases": cases, "failures": failures, "seconds": round(time.monotonic() - began)}


PROMISE = (
    "equal and different jobs in one store at once leave what each leaves alone; nothing is trained or quantized twice; "
    "in one `save_dir` the other initialisation is refused"
)


def main() -> None:
    """Print the counts, and each failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="JSON file for the counts: docs/results/reliability.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="together-") as folder:
        found = rounds(Start(Path(folder)), options.processes, options.rounds)
    if options.write:
        times = f"{options.rounds} round{'s' if options.rounds > 1 else ''}"
        how = f"`python tests/together.py --processes {options.processes} --rounds {options.rounds}`: {times} of three kinds of jobs"
        write_row(options.write, PROMISE, how, found)
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
