"""The results table of single runs: one row a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loftq_exp.schemes import variation

METHODS = {
    "loftq": "LoftQ",
    "qlora": "QLoRA",
    "pissa": "PiSSA",
    "lora": "LoRA 16-bit",
    "off-the-shelf": "LoftQ as published",
}
"""The names of the methods in tables."""
BEFORE = ("run", "bits", "rank", "weight error")
OUTPUT = "output error"
"""Heading of the mean relative error of the layers' outputs. The column appears only if a run was calibrated."""
QUANTIZED = "quantized"
"""Heading of the share of quantized values in the blocks. The column appears only if the share is below 1."""
AFTER = ("init s", "train s", "backbone MB", "adapter MB")
LEAST = (*AFTER[::-1], QUANTIZED, OUTPUT, "weight error", "bits")
"""Headings in the order in which a narrow terminal drops them."""


def columns(runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the headings for the metrics of these runs, with the scores of all their tasks in the middle."""
    scores = dict.fromkeys(column["title"] for metrics in runs for column in metrics["table"])
    shares = [quantized_share(metrics) for metrics in runs]
    partial = [QUANTIZED] if any(share is not None and share < 1 for share in shares) else []
    calibrated = [OUTPUT] if any("mean_output_error" in metrics["init"] for metrics in runs) else []
    return (*BEFORE[:2], *partial, *BEFORE[2:], *calibrated, *scores, *AFTER)


def cells(metrics: dict[str, Any], headings: Sequence[str]) -> list[str]:
    """Return one run's row, in the order of `headings`. Scores of other tasks are "-"."""
    seconds, init = metrics["seconds"], metrics["init"]
    row = {
        "run": method_name(metrics["config"]),
        "bits": shown(init.get("bits_per_weight"), "{:.2f}"),
        QUANTIZED: shown(quantized_share(metrics), "{:.2%}"),
        "rank": str(metrics["config"]["quant"]["rank"]),
        "weight error": shown(init.get("mean_error"), "{:.4f}"),
        OUTPUT: shown(init.get("mean_output_error"), "{:.4f}"),
        "init s": shown(seconds.get("quantize"), "{:.1f}"),
        "train s": shown(seconds.get("finetune"), "{:.0f}"),
        "backbone MB": shown(megabytes(metrics["backbone_bytes"]), "{:.0f}"),
        "adapter MB": shown(megabytes(metrics["adapter_bytes"]), "{:.1f}"),
    }
    row |= {column["title"]: _scores(metrics, column) for column in metrics["table"]}
    return [row.get(heading, "-") for heading in headings]


def quantized_share(metrics: dict[str, Any]) -> float | None:
    """Return the quantized share of the values in the blocks. None if nothing is quantized or an older run has no count."""
    init = metrics["init"]
    quantized = init.get("quantized_values", 0)
    return quantized / init["linear_values"] if quantized else None


def _scores(metrics: dict[str, Any], column: dict[str, Any]) -> str:
    """Return the scores of one column, as "90.4/90.5", followed by the published scores of the same names."""
    measured = _together(metrics["scores"], column)
    # Published numbers are in the units of the table and are converted to those of the scores first.
    unit = column["scale"] * (100 if column["form"].endswith("%}") else 1)
    published = {name: value / unit for name, value in (metrics["published"] or {}).items()}
    known = any(name in published for name in column["scores"])
    return measured + (f" (published {_together(published, column)})" if known else "")


def _together(scores: dict[str, float], column: dict[str, Any]) -> str:
    found = [scores.get(name) for name in column["scores"]]
    if all(score is None for score in found):
        return "-"
    return "/".join(shown(score, column["form"], column["scale"]) for score in found)


def method_name(config: dict[str, Any]) -> str:
    """Return the method with its type, bits and steps, such as "LoftQ NF2 iter 5"."""
    quant = config["quant"]
    if quant["method"] == "lora":
        return METHODS["lora"]
    kind = quant["type"].upper() if quant["type"] == "nf" else quant["type"] + "-"
    steps = f" iter {quant.get('iter')}" if quant["method"] == "loftq" else ""
    name = METHODS[quant["method"]]
    bits = f"{quant['bits']} {quant.get('allocation') or ''}".rstrip() if not quant.get("bits_per_layer") else " mixed"
    return f"{name} {kind}{bits}{variation(quant)}{steps}"


def shown(value: float | None, form: str, scale: float = 1) -> str:
    """Return a number, times `scale`, in this form; "-" if there is none."""
    return "-" if value is None else form.format(value * scale)


def megabytes(size: float | None) -> float | None:
    """Return a number of bytes in MB of 1e6 bytes."""
    return None if size is None else size / 1e6


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
