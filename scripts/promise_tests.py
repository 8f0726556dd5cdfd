"""Run the tests of each promise of docs/reliability.md, slow ones too, and write how many passed into docs/results/promises.json.

python scripts/promise_tests.py [FILE ...]      # such as test_ranks; default: all
python scripts/result_tables.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "results" / "promises.json"
PROMISES = {
    "test_surroundings": "no space at each write, a current folder that is gone, no home folder, odd and long names, `LC_ALL=C`, a clock "
    "that is moved, SIGTERM: one line or the same result, nothing partial, the next run goes on",
    "test_bad_input": "wrong settings, rows and files, full and read-only disks: one line before long work",
    "test_manifest": "a file that differs from its digest is named",
    "test_ranks": "two processes of one run (gloo): one writes, scores are one process' own, each row counts once",
    "test_repeats": "the same command gives the same bytes; with two threads, losses and scores within 1e-4",
    "test_long_haul": "200 jobs in one process: memory grows at most 5 % after the first ten, and no handle, thread or folder is added",
    "test_foreign": "what a library raises is one line, and a fault of our own stays a traceback",
    "test_security": "planted code does not run",
    "test_masking": "a secret is in no output and no file",
}  # fmt: skip
COLUMNS = [{"name": name, "key": name} for name in ("promise", "tests", "passed", "skipped", "failed")]


def counts(file: str) -> dict[str, int]:
    """The numbers of the tests of one file that passed, were skipped and failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", f"--junitxml={report}"]
        command.append(str(ROOT / "tests" / f"{file}.py"))
        subprocess.run(command, cwd=ROOT, check=False)
        suite = next(ElementTree.parse(report).iter("testsuite")).attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return {"passed": int(suite["tests"]) - failed - skipped, "skipped": skipped, "failed": failed}


def main() -> int:
    """Write the rows of the given files. Those of the others stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="*", choices=list(PROMISES))
    before = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []
    rows: dict[str, dict[str, Any]] = {row["tests"]: row for row in before}
    names = {file: f"`tests/{file}.py`" for file in PROMISES}
    for file in parser.parse_args().files or PROMISES:
        rows[names[file]] = {"promise": PROMISES[file], "tests": names[file], **counts(file)}
        found = [rows[name] for name in names.values() if name in rows]
        table = {"facts": {"command": "python scripts/promise_tests.py"}, "columns": COLUMNS, "rows": found}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return int(any(row["failed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
