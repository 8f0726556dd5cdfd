"""Write docs/results/demo.json and docs/losses.png from the metrics of the demo's runs, so that no number is copied by hand.

    make demo demo-results
    python scripts/demo_results.py [DIR ...]     # runs or sweeps; default: outputs/runs

Only runs with exactly the present settings of conf/experiment/demo-*.yaml are taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq_exp import RunConfig, compose
from loftq_exp.report.collect import collect
from loftq_exp.report.plot import plot_losses

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "results" / "demo.json"
PICTURE = ROOT / "docs" / "losses.png"
DEMOS = {
    "lora": "LoRA 16-bit",
    "qlora": "QLoRA NF2",
    "loftq": "LoftQ NF2, 5 steps",
    "calibrated": "calibrated LoftQ, 2 bits, 5 steps",
}
"""The experiments, in the order of the table, and how their rows are named."""
GROUPS = ("model", "quant", "calibration", "task", "train", "seed")
"""The settings that make a run one of a demo. Places, such as output_dir, do not."""
COLUMNS = [
    {"name": "run", "key": "run"},
    {"name": "bits a weight", "key": "bits_a_weight", "format": "{:.2f}"},
    {"name": "weight error", "key": "weight_error", "format": "{:.4f}"},
    {"name": "NLL", "key": "nll", "format": "{:.4f}"},
    {"name": "accuracy", "key": "accuracy", "format": "{:.1f}%"},
    {"name": "initialise", "key": "initialise", "format": "{:.0f} s"},
    {"name": "fine-tune", "key": "finetune", "format": "{:.0f} s"},
    {"name": "score", "key": "evaluate", "format": "{:.0f} s"},
]


def settings(config: RunConfig) -> str:
    """The settings of GROUPS as text, to compare with those of a run (`chosen`)."""
    return chosen(json.loads(json.dumps(config.to_dict(), default=str)))


def chosen(config: dict[str, Any]) -> str:
    """As `settings`, of the configuration in a run's metrics."""
    return json.dumps({group: config.get(group) for group in GROUPS}, sort_keys=True)


def find(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The metrics of each demo's run. Exits with one line unless each has exactly one scored run."""
    runs = [run.metrics for run in collect(folders)]
    found = {}
    for name in DEMOS:
        wanted = settings(compose([f"experiment=demo-{name}"]))
        fitting = [run for run in runs if chosen(run["config"]) == wanted and run["scores"]]
        if len(fitting) != 1:
            places = " ".join(map(str, folders))
            sys.exit(
                f"demo-{name}: {len(fitting)} scored runs in {places} have its settings, there must be 1: run make demo"
            )
        found[name] = fitting[0]
    return found


def row(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """One row of the table. Accuracy is in percent, NLL in nats a token of the gold solution."""
    seconds = metrics["seconds"]
    return {
        "run": DEMOS[name],
        "bits_a_weight": metrics["init"]["bits_per_weight"],
        "weight_error": metrics["init"]["mean_error"],
        "nll": metrics["scores"]["nll"],
        "accuracy": 100 * metrics["scores"]["accuracy"],
        "initialise": seconds["quantize"],
        "finetune": seconds["finetune"],
        "evaluate": seconds["evaluate"],
    }


def document(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of docs/results/demo.json."""
    first = next(iter(found.values()))
    task = first["config"]["task"]
    facts = {
        "command": "make demo demo-results",
        "model": first["config"]["model"]["name"],
        "data": f"{task['max_train_samples']} generated training problems, {task['max_eval_samples']} test problems",
        "provenance": {name: metrics["provenance"] for name, metrics in found.items()},
    }
    return {"facts": facts, "columns": COLUMNS, "rows": [row(name, metrics) for name, metrics in found.items()]}


def main() -> None:
    """Write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="DIR", nargs="*", type=Path, default=[ROOT / "outputs" / "runs"])
    found = find(parser.parse_args().folders)
    TABLE.write_text(json.dumps(document(found), indent=1) + "\n")
    plot_losses(PICTURE, {DEMOS[name]: [metrics["losses"]] for name, metrics in found.items()})


if __name__ == "__main__":
    main()
