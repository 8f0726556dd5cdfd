"""The table at the end of a run or a sweep, on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLUMNS = ("run", "bits", "rank", "weight error", "NLL", "accuracy", "init s", "train s", "backbone MB", "adapter MB")


def cells(metrics: dict[str, Any]) -> list[str]:
    """One run's row, in the order of COLUMNS."""
    quant, scores, seconds = metrics["config"]["quant"], metrics["scores"], metrics["seconds"]
    published = metrics["published"]
    accuracy = _shown(scores.get("accuracy"), "{:.1%}") + (f" (published {published:g}%)" if published else "")
    return [
        _name(metrics["config"]),
        f"{metrics['init']['bits_per_weight']:.2f}",
        str(quant["rank"]),
        _shown(metrics["init"]["mean_error"], "{:.4f}"),
        _shown(scores.get("nll"), "{:.4f}"),
        accuracy,
        _shown(seconds.get("quantize"), "{:.1f}"),
        _shown(seconds.get("finetune"), "{:.0f}"),
        f"{metrics['backbone_bytes'] / 1e6:.0f}",
        f"{metrics['adapter_bytes'] / 1e6:.1f}",
    ]


def _name(config: dict[str, Any]) -> str:
    quant = config["quant"]
    if quant["method"] == "lora":
        return "LoRA 16-bit"
    kind = quant["type"].upper() if quant["type"] == "nf" else quant["type"] + "-"
    steps = f" iter {quant['iter']}" if quant["method"] == "loftq" else ""
    name = {"loftq": "LoftQ", "qlora": "QLoRA", "off-the-shelf": "LoftQ as published"}[quant["method"]]
    return f"{name} {kind}{quant['bits']}{steps}"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, wide enough for its cells where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(*columns, title=escape(title), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
