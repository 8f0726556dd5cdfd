"""The table of targets on a GPU: each with what a result file in docs/results measured, or "not run", and the command to measure it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loftq_exp.report.table import markdown

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NOT_RUN = "not run"
Rows = list[dict[str, Any]]


def rows_of(name: str) -> Rows:
    """The rows of a result file; none if it was not measured."""
    path = RESULTS / f"{name}.json"
    found: Rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def span(values: Iterator[float] | list[float], form: str) -> str:
    """The least and the largest value, or NOT_RUN without any."""
    found = sorted(values)
    return (
        NOT_RUN
        if not found
        else form.format(found[0])
        if len(found) == 1
        else f"{form} to {form}".format(found[0], found[-1])
    )


def ratios(what: str) -> list[float]:
    """Packed time over bitsandbytes' in the rows of a kind."""
    rows = [row for row in rows_of("gpu-packed") if row["what"] == what]
    return [value for row in rows for key, value in row.items() if key.endswith("/ bitsandbytes")]


def of_solver(key: str) -> str:
    rows = rows_of("gpu-solver")
    found = [row[key] for row in rows if row.get("what") == "NF4" and row["out x in"] == "4096 x 4096" and key in row]
    return span(found, "{:.4g}")


def of_stage(key: str) -> str:
    found = [row[key] for row in rows_of("gpu-stage") if row["what"] == "the stage: NF4, bnb4" and key in row]
    return span(found, "{:.3g}")


SOLVER, PACKED, STAGE = (f"`python benchmarks/gpu.py --part {part}`" for part in ("solver", "packed", "stage"))
WHOLE_STAGE = "`python benchmarks/gpu.py --part stage --layers 32 --seconds 600`"
FINE_TUNE = "`python -m loftq_exp model=llama-2-7b quant.bits=2 save_format=packed task=gsm8k train.gradient_checkpointing=true`: `peak_memory` in metrics.json"
TARGETS: list[tuple[str, Callable[[], str], str]] = [
    ("one 4096 x 4096 weight, NF4, rank 64, 5 steps: at least 100 times as fast as PEFT", lambda: of_solver("faster"), SOLVER),
    ("its error over PEFT's: at most 1.005", lambda: of_solver("error_ratio"), SOLVER),
    ("packed training step over bitsandbytes': at most 1.05", lambda: span(ratios("training"), "{:.2f}"), PACKED),
    ("packed generation over bitsandbytes', in a graph: at most 1", lambda: span(ratios("generation, graph"), "{:.2f}"), PACKED),
    ("the same without a graph", lambda: span(ratios("generation, eager"), "{:.2f}"), PACKED),
    ("quantize stage on 7B's shapes, 4 of 32 layers, in seconds: no target of its own", lambda: of_stage("s"), STAGE),
    ("its card memory: under 6 GB", lambda: of_stage("card_gb"), STAGE),
    ("quantize stage on all 32 layers: under 60 s", lambda: NOT_RUN, WHOLE_STAGE),
    ("2-bit packed fine-tune of 7B: under 5 GB plus activations", lambda: NOT_RUN, FINE_TUNE),
    ("all of `make gpu` in ten minutes, every test passed",
     lambda: next((f"{row['failed']} of {row['tests']} failed" for row in rows_of("gpu-tests")), NOT_RUN), "`make gpu PYTHON=python3`"),
]  # fmt: skip


def targets() -> str:
    """The table as Markdown."""
    return markdown(
        ["target on one H100", "measured", "command"], [[text, found(), command] for text, found, command in TARGETS]
    )
