"""Write the table of model classes into docs/models.md: what is quantized of each, counted on a small random model.

    make docs
    python scripts/model_table.py

The small models are `CONFIGS` of tests/zoo.py. tests/source/test_models.py initialises each of them and compares the counts.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import transformers  # noqa: E402
from regions import filled  # noqa: E402
from zoo import CONFIGS, quantize_config  # noqa: E402

from loftq_exp.errors import UserError  # noqa: E402
from loftq_exp.initialise.fit import check_fit  # noqa: E402
from loftq_exp.source.layout import Layout, find_layout  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
FORMATS = ("bnb4", "packed")


@dataclass(frozen=True)
class Row:
    """What a class's small model shows."""

    name: str
    model_type: str
    quantized: int
    linear: int
    left: tuple[str, ...]
    """Kinds of matrices in blocks that stay dense."""
    formats: tuple[str, ...]
    """Storage formats besides dense."""
    parameters: bool
    """Whether PEFT adapts some weights as parameters, without dropout."""
    refused: str = ""


def row_of(name: str) -> Row:
    """The row of a class of `CONFIGS`."""
    config = CONFIGS[name]()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config.save_pretrained(folder)
        try:
            layout = find_layout(folder, "causal", shapes)
        except UserError as error:
            return Row(name, config.model_type, 0, 0, (), (), False, str(error).partition(": ")[2])
        formats = tuple(form for form in FORMATS if _fits(layout, folder, form))
    quantized = sum(math.prod(target.shape) for target in layout.targets)
    left = sum(weight.values for weight in layout.not_quantized)
    kinds = dict.fromkeys(re.sub(r".*\.\d+\.", "", weight.name) for weight in layout.not_quantized)
    return Row(
        name, config.model_type, quantized, quantized + left, tuple(kinds), formats, bool(layout.target_parameters)
    )


def _fits(layout: Layout, folder: Path, form: str) -> bool:
    config = quantize_config(folder, folder, "causal", form, quant__bits=4, quant__rank=4, quant__dropout=0)
    try:
        check_fit(layout, config)
    except UserError:
        return False
    return True


def table() -> str:
    """The table of all classes, in Markdown."""
    rows = [row_of(name) for name in CONFIGS]
    lines = [
        "| class | `model_type` | quantized / linear values | | stored as | dropout | stays dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.refused:
            lines.append(f"| {row.name} | `{row.model_type}` | refused | | | | {row.refused} |")
            continue
        share = f"{row.quantized / row.linear:.1%}" if row.quantized < row.linear else "100%"
        left = ", ".join(f"`{kind}`" for kind in row.left)
        formats = ", ".join(("dense", *row.formats))
        lines.append(f"| {row.name} | `{row.model_type}` | {row.quantized} / {row.linear} | {share} | {formats} | "
                     f"{'0 only' if row.parameters else 'any'} | {left} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def documents() -> dict[Path, str]:
    """The page with its table up to date."""
    logging.disable(logging.WARNING)
    try:
        return {PAGE: filled(PAGE.read_text(), "classes", table())}
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    """Write the page."""
    for path, text in documents().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
