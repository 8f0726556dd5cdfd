"""The model card of an initialised checkpoint: what it is, its errors, and how to load it."""

from __future__ import annotations

from typing import Any

from loftq_exp.artifact.folder import ADAPTER, Initialised
from loftq_exp.config import RunConfig
from loftq_exp.schemes import variation
from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.storage.format import LoadCode, storage_format

_PIPELINES = {"causal": "text-generation", "seq2seq": "text2text-generation", "classification": "text-classification"}
"""The hub's pipeline tag for each kind of model. Other kinds are their own tag."""


def model_card(init: Initialised, config: RunConfig, base_model: str | None) -> str:
    """The README.md for the hub, front matter included, from the report and the settings alone.

    `base_model` is the hub id of the pre-trained model, or None if it is not on the hub.
    """
    repo_id, report = config.hub.repo_id, init.report
    return f"""{_front_matter(config, base_model)}
# {str(repo_id).rpartition("/")[2]}

{_what(config, base_model)}: a backbone `Q`, and LoRA factors `A` and `B` in `{ADAPTER}/`. It is a starting point for
fine-tuning, not a fine-tuned model. Made with loftq_exp after [LoftQ](https://arxiv.org/abs/2310.08659). The licence is
that of the pre-trained model.

{_facts(report)}

## Errors

{_errors(report)}

## Load it

```python
{_code(config, report)}
```
"""


def _front_matter(config: RunConfig, base_model: str | None) -> str:
    tags = ["loftq_exp", config.quant.method, "lora", "peft", f"{config.quant.bits_label}-bit"]
    kind = config.model.kind
    lines = ["---", "library_name: transformers", f"pipeline_tag: {_PIPELINES.get(kind, kind)}"]
    if base_model:
        lines += [f"base_model: {base_model}"]
        if config.quant.type != "none":
            lines += ["base_model_relation: quantized"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in dict.fromkeys(tags)), "---"])


def _what(config: RunConfig, base_model: str | None) -> str:
    name = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else config.model.basename
    how = {
        "loftq": "quantized, with factors fitted to what quantization lost",
        "qlora": "quantized, with factors that start at zero",
        "pissa": "without its leading components, which the factors hold, and quantized",
        "lora": "in 16 bits, with factors that start at zero",
        "off-the-shelf": "quantized, with fitted factors, taken unchanged from a published checkpoint",
    }[config.quant.method]
    return f"{name}, {how}"


def _facts(report: dict[str, Any]) -> str:
    quant, totals, shelf = report["quant"], report["totals"], report.get("off_the_shelf")
    alpha = quant["scaling"] * quant["rank"]
    rows = {
        "quantizer": f"{quant['type']}{variation(quant)}, blocks of {quant['block_size']}",
        "bits": f"{_bits(report)} ({totals['bits_per_weight']:.2f} per weight, scales included)",
        "rank": _ranks(report),
        "alpha": f"{alpha:g} (s = {quant['scaling']:g})",
        "steps": "as published" if shelf else quant["iter"],
        "quantized weights": f"{totals['weights']} ({totals['values'] / 1e6:.1f}M values)",
        "stored": f"{quant['save_format']}, {shelf['stored_dtype'] if shelf else quant['save_dtype']}",
    }
    if report.get("not_quantized"):
        rows["left out"] = _left_out(report)
    if shelf:
        rows["taken from"] = shelf["taken_from"] + (f", commit {shelf['commit']}" if shelf["commit"] else "")
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _left_out(report: dict[str, Any]) -> str:
    """The part of the blocks that is not quantized. It is included in the bits per weight above."""
    weights = report["not_quantized"]
    values = sum(weight["values"] for weight in weights)
    share = values / report["totals"]["linear_values"]
    more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    return f"{share:.2%} of the values in blocks ({values / 1e6:.1f}M, {weights[0]['name']}{more})"


def _bits(report: dict[str, Any]) -> str:
    """The bits of all weights. If they differ, the average of their codes and the list of widths."""
    widths = sorted({weight["bits"] for weight in report["weights"]})
    if len(widths) == 1:
        return str(widths[0])
    return f"{report['bits_plan']['code_bits']:.4g} on average: {', '.join(map(str, widths))}"


def _ranks(report: dict[str, Any]) -> str:
    ranks = sorted({weight["rank"] for weight in report["weights"]})
    return (
        str(ranks[0])
        if len(ranks) == 1
        else f"{', '.join(map(str, ranks))} (in total at most that of rank {report['quant']['rank']} everywhere)"
    )


def _errors(report: dict[str, Any]) -> str:
    weights = report["weights"]
    steps = len(weights[0]["errors"])
    if not steps:
        return "Unknown: computing them requires the pre-trained weights."
    means = [sum(weight["errors"][step] for weight in weights) / len(weights) for step in range(steps)]
    columns = ["quantization alone", *(f"step {step}" for step in range(1, steps))]
    table = [columns, ["---"] * steps, [f"{mean:.4f}" for mean in means]]
    return "\n".join(
        [
            "Mean over the quantized weights of `||W - Q - s B A|| / ||W||`; each weight's own are in `init_report.json`.\n",
            *("| " + " | ".join(row) + " |" for row in table),
        ]
    )


def _code(config: RunConfig, report: dict[str, Any]) -> str:
    """Code that loads the checkpoint without changing a quantized value.

    It needs only transformers, bitsandbytes and PEFT, and loftq_exp for packed weights.
    """
    model_class = AUTO_CLASSES[config.model.kind].__name__
    loaded = report.get("off_the_shelf", {}).get("stored_dtype") or report["quant"].get("load_dtype", config.save_dtype)
    dtype = f"torch.{loaded}"
    stored = storage_format(config.save_format)
    held = storage_format(next(form for form in stored.capacity.forms if config.fits(form)))
    packing = held.load_code(report["other_linears"], dtype) if held is not stored else LoadCode()
    lines = [*stored.card_imports, "import torch", "from peft import PeftModel",
             f"from transformers import {', '.join([model_class, *packing.imports])}", "",
             f'REPO = "{config.hub.repo_id}"']  # fmt: skip
    arguments = [f"dtype={dtype}"]
    if config.hub.revision:
        arguments.append(f'revision="{config.hub.revision}"')
    if config.model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    if packing.argument:
        arguments.append(packing.argument)
    lines += packing.lines
    lines += [f"model = {model_class}.from_pretrained(REPO, {', '.join(arguments)})",
              f'model = PeftModel.from_pretrained(model, REPO, subfolder="{ADAPTER}", is_trainable=True'
              + (f', revision="{config.hub.revision}")' if config.hub.revision else ")")]  # fmt: skip
    return "\n".join(lines)
