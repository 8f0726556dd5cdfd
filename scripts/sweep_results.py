"""Write a sweep's rows, its page and the picture of the page into docs/, so that no number is copied by hand.

    python -m loftq_exp -m quant=loftq,calibrated ... output_dir=FOLDER      # the command is in docs/sweeps.md
    python scripts/sweep_results.py FOLDER --score accuracy
    python scripts/result_tables.py

Writes docs/results/sweep-qnli.json (the table), docs/sweep-qnli/report.json (what `loftq-exp report --format json` gives),
docs/sweep-qnli/report.html and docs/sweep-qnli/report.png. In the last three, folders of this machine are shortened. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import CHROMIUM, browser  # noqa: E402

from loftq_exp.commands import write_report  # noqa: E402

TABLE = ROOT / "docs" / "results" / "sweep-qnli.json"
PLACE = ROOT / "docs" / "sweep-qnli"
COLUMNS = [
    {"name": "start", "key": "start"},
    {"name": "bits a weight", "key": "bits_a_weight", "format": "{:.2f}"},
    {"name": "rank", "key": "rank"},
    {"name": "weight error", "key": "weight_error", "format": "{:.4f}"},
    {"name": "n", "key": "n"},
    {"name": "accuracy", "key": "score", "format": "{:.1f} ± {:.1f}"},
    {"name": "95 %", "key": "interval", "format": "[{:.1f}, {:.1f}]"},
    {"name": "Δ, paired", "key": "difference", "format": "{:+.1f}"},
    {"name": "Δ 95 %", "key": "difference_interval", "format": "[{:+.1f}, {:+.1f}]"},
]


def report(folder: Path, form: str, baseline: str) -> Path:
    """The report of a folder in one format, as a file in docs/ without this machine's folders."""
    output = PLACE / f"report.{form}"
    if write_report.main([str(folder), "--format", form, "--baseline", baseline, "--output", str(output)]):
        sys.exit(1)
    text = (
        output.read_text().replace(str(folder.resolve()), "outputs").replace(str(ROOT.parent / "shared"), "../shared")
    )
    output.write_text(text)
    return output


def picture(page: Path, height: int) -> None:
    """Write a PNG of the page's top, in a headless Chromium."""
    if CHROMIUM is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        tab.open(page.resolve(), width=1600)
        tab.picture(page.with_suffix(".png"), height)


def row(found: dict[str, Any], score: str) -> dict[str, Any]:
    """One row of the table. Scores are in percent, differences in points."""
    settings, scored = found["settings"]["quant"], found["scores"][score]
    change = found["differences"].get(score)
    bare = found["name"].rsplit(" r", 1)[0]
    return {
        "start": bare,
        "bits_a_weight": found["measures"]["bits_per_weight"]["mean"],
        "rank": settings["rank"],
        "weight_error": found["measures"]["weight_error"]["mean"],
        "n": scored["n"],
        "score": [100 * scored["mean"], 100 * scored["std"]],
        "interval": [100 * scored["low"], 100 * scored["high"]],
        "difference": 100 * change["mean"] if change else None,
        "difference_interval": [100 * change["low"], 100 * change["high"]] if change else None,
    }


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the sweep's output_dir")
    parser.add_argument("--score", default="accuracy")
    parser.add_argument("--baseline", default="loftq")
    parser.add_argument("--height", type=int, default=1300, help="of the picture, in pixels")
    options = parser.parse_args()
    PLACE.mkdir(exist_ok=True)
    rows = json.loads(report(options.folder, "json", options.baseline).read_text())
    picture(report(options.folder, "html", options.baseline), options.height)
    (sweep,) = (options.folder / "sweeps").glob("*/sweep.json")
    arguments = " ".join(json.loads(sweep.read_text())["arguments"]).replace(str(ROOT.parent / "shared"), "../shared")
    facts = {"command": f"python -m loftq_exp {arguments.replace(str(options.folder.resolve()), 'outputs')}"}
    TABLE.write_text(json.dumps({"facts": facts, "columns": COLUMNS, "rows": [row(each, options.score) for each in rows]},
                                indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
