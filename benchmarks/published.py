"""The paper's published rows (Li et al., arXiv 2310.08659), PEFT's board on MetaMathQA, and conf/experiment/ written from them.

    make experiments

A row of a table below and a column of it make one file, named MODEL_ROW_COLUMN. A row is named by its quantization (`nf4_r64`
is LoftQ, `qlora-nf4_r64` QLoRA, `lora16_r64` 16-bit LoRA, `mixed2.5_r64` NF4 in the first layers and NF2 in the others, 2.5
bits on average), a column by its task. NA: published as not converged, which is
a row too; `.`: not published. What the paper or the authors' code leaves open is marked "assumed".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "conf" / "experiment"

RESULTS = {
    "llama-2-7b": """
                            gsm8k wikitext
        lora16_r64           36.9     5.08
        qlora-nf4_r64        35.1     5.70
        nf4_r64              35.0     5.24
        qlora-mixed3_r64     32.1     5.73
        mixed3_r64           32.9     5.63
        qlora-mixed2.5_r64     NA       NA
        mixed2.5_r64         31.1     5.78
        qlora-mixed2.25_r64    NA       NA
        mixed2.25_r64        26.5     6.13
        qlora-nf2_r64          NA       NA
        nf2_r64              20.9     7.85
    """,
    "llama-2-13b": """
                            gsm8k wikitext
        lora16_r64           43.1     5.12
        qlora-nf4_r64        39.9     5.22
        nf4_r64              45.0     5.16
        qlora-mixed3_r64     40.7     5.22
        mixed3_r64           44.4     5.13
        qlora-mixed2.5_r64     NA    19.39
        mixed2.5_r64         41.1     5.22
        qlora-mixed2.25_r64    NA       NA
        mixed2.25_r64        38.1     5.45
        qlora-nf2_r64          NA       NA
        nf2_r64              25.4     7.69
    """,
    "llama-3-8b": """
                        gsm8k
        lora16_r64       69.3
        qlora-nf4_r64    67.4
        nf4_r64          68.0
    """,
    "phi-2": """
                        gsm8k
        lora16_r64       64.8
        qlora-nf4_r64    60.2
        nf4_r64          64.1
    """,
    # 39.04 is printed as 29.04, ten below what its R1 and the other rows lead to: most likely a slip.
    "bart-large": """
                      summarization-xsum summarization-cnn_dailymail
        lora16_r8      43.40/20.20/35.20           44.72/21.58/41.84
        lora16_r16     43.95/20.72/35.68           45.03/21.84/42.15
        qlora-nf4_r8   42.91/19.72/34.82           43.10/20.22/40.06
        qlora-nf4_r16  43.29/20.05/35.15           43.42/20.62/40.44
        nf4_r8         44.08/20.72/35.89           43.81/20.95/40.84
        nf4_r16        44.51/21.14/36.18           43.96/21.06/40.96
        nf2_r8         39.63/16.65/31.62           42.24/19.44/39.04
        nf2_r16        40.81/17.85/32.80           42.52/19.81/39.51
    """,
    "deberta-v3-base": """
                           glue-mnli glue-qnli glue-rte glue-sst2 glue-mrpc glue-cola glue-qqp  glue-stsb squad     anli
        lora16_r16         90.4/90.5 94.6      85.1     95.1      89.9/93.6 69.9      92.0/89.4 91.7/91.1 87.3/93.1 60.2
        qlora-nf2_r16      75.4/75.6 82.4      55.9     86.5      73.8/82.8 NA        86.8/82.3 83.0/82.8 61.5/71.2 NA
        nf2_r16            84.7/85.1 86.6      61.4     90.2      83.8/88.6 37.4      90.3/86.9 87.1/86.9 81.5/88.6 47.1
        nf2_r32            86.0/86.1 89.9      61.7     92.0      83.6/87.2 47.5      91.0/87.9 87.5/87.0 82.9/89.8 49.0
        qlora-uniform2_r16 76.5/76.3 83.8      56.7     86.6      75.7/84.7 NA        87.1/82.6 83.5/83.4 69.5/77.6 .
        uniform2_r16       87.3/87.1 90.6      61.1     94.0      87.0/90.6 59.1      90.9/88.0 87.9/87.6 84.4/91.2 .
        uniform2_r32       88.0/88.1 92.2      63.2     94.7      87.5/91.2 60.5      91.3/88.3 89.5/89.2 85.2/91.6 .
    """,
}
ITER = {"llama-2-7b": 5, "llama-2-13b": 5, "llama-3-8b": 5, "phi-2": 7, "bart-large": 1, "deberta-v3-base": 5}
"""Alternating steps T; assumed for llama-3-8b: as for LLAMA-2."""
TYPES = {"nf": "nf", "mixed": "nf", "uniform": "uniform-clipped"}
"""`quant.type` of a row's name; the uniform quantizer is that of the authors' GLUE code."""

SCORES = {
    "gsm8k": ("accuracy",),
    "wikitext": ("perplexity",),
    "summarization-xsum": ("rouge1", "rouge2", "rougeL"),
    "summarization-cnn_dailymail": ("rouge1", "rouge2", "rougeL"),
    "glue-mnli": ("accuracy_matched", "accuracy_mismatched"),
    "glue-qnli": ("accuracy",),
    "glue-rte": ("accuracy",),
    "glue-sst2": ("accuracy",),
    "glue-mrpc": ("accuracy", "f1"),
    "glue-cola": ("matthews",),
    "glue-qqp": ("accuracy", "f1"),
    "glue-stsb": ("pearson", "spearman"),
    "squad": ("exact_match", "f1"),
    "anli": ("accuracy",),
}
"""What the numbers of a cell are, by the names of the task's scores."""

# Learning rate, epochs and batch. Weight decay, schedule, warmup and seed of the decoders are conf/train/default.yaml's.
GSM8K = {
    "llama-2-7b": ("3e-4", 6, 16),
    "llama-2-13b": ("1e-4", 6, 16),
    "llama-3-8b": ("5e-4", 3, 16),
    "phi-2": ("3e-4", 6, 16),  # assumed: as for llama-2-7b
}
GSM8K_MIXED_RATE = {"llama-2-13b": "3e-4"}
"""The learning rate at mixed bits, where it is another one."""
WIKITEXT = {"llama-2-7b": ("3e-4", 2, 32), "llama-2-13b": ("1e-4", 2, 32)}
SUMMARIZATION = {"summarization-xsum": ("2e-4", 25, 32), "summarization-cnn_dailymail": ("2e-4", 15, 64)}
LINEAR = "weight_decay: 0.0, lr_scheduler_type: linear, warmup_ratio: 0.0"
"""What the encoder's rows were trained with; assumed for the encoder-decoder's: the authors' script sets none of them."""
ENCODER = {  # epochs, learning rate with uniform quantization, with NF2; assumed for 16-bit LoRA: as with NF2
    "glue-mnli": (5, "1e-4", "1e-4"),
    "glue-rte": (20, "5e-4", "5e-5"),
    "glue-qnli": (10, "5e-5", "5e-5"),
    "glue-mrpc": (60, "1e-4", "1e-4"),
    "glue-qqp": (10, "5e-5", "5e-5"),
    "glue-sst2": (10, "5e-5", "5e-5"),
    "glue-cola": (60, "5e-5", "5e-5"),
    "glue-stsb": (60, "5e-5", "1e-4"),
    "squad": (10, "5e-5", "5e-5"),
    "anli": (12, "5e-5", "5e-5"),
}


BOARD_MODEL = "llama-3.2-3b"
BOARD = {
    "lora16_r32": ("lora", "rank: 32, alpha: 64", "lora/llama-3.2-3B-rank32: 48.2 %, factors on q_proj and v_proj"),
    "lora16_r64": ("lora", "rank: 64, alpha: 128", "lora/llama-3.2-3B-rank64: 48.9 %, factors on q_proj and v_proj"),
    # rsLoRA scales by alpha / sqrt(rank) = 64 / 8; here s = alpha / rank = 8 too.
    "rslora16_r64": (
        "lora",
        "rank: 64, alpha: 512",
        "lora/llama-3.2-3B-rank64-rslora: 53.0 %, factors on q_proj and v_proj",
    ),
    "lora16_r10": ("lora", "rank: 10, alpha: 20", "lora/llama-3.2-3B-rank10-target-mlp: 52.6 %, factors on the MLP"),
    **{
        f"{name}{bits}_r32": (
            method,
            f"type: nf, bits: {bits}, rank: 32, alpha: 64{extra}",
            "",
        )
        for name, method, extra in (
            ("qlora-nf", "qlora", ""),
            ("nf", "loftq", ", iter: 5"),
            ("calibrated-nf", "calibrated", ", iter: 5"),
        )
        for bits in (4, 3, 2)
    },
}
"""Rows of PEFT's board: the choice of conf/quant/, its settings, and the row of the board with its test accuracy.

The settings are those of method_comparison/MetaMathQA in huggingface/peft: `default_training_params.json` and each experiment's
`adapter_config.json`; accuracies are the `test accuracy` of `results/lora--*.json` (that of rank 32 is of
2025-06-19). They are in comments and not in `published`, because here all linear layers have factors. Assumed: warmup as in conf/train/default.yaml.
"""


def board_files() -> dict[str, str]:
    """The text of each file of PEFT's board by its name."""
    return {f"{BOARD_MODEL}_{row}_metamath.yaml": board_experiment(row) for row in BOARD}


def board_experiment(row: str) -> str:
    """The text of one file of PEFT's board."""
    method, quant, measured = BOARD[row]
    lines = [
        "# @package _global_",
        f"# python -m loftq_exp experiment={BOARD_MODEL}_{row}_metamath",
        "# Written from the tables of benchmarks/published.py: change it there.",
        f"# On PEFT's board: {measured}" if measured else "# PEFT's board has no quantized row.",
        "defaults:",
        f"  - override /model: {BOARD_MODEL}",
        f"  - override /quant: {method}",
        "  - override /task: metamath",
        "",
        f"quant: {{ {quant}, dropout: 0.0 }}",
        "train: { learning_rate: 1e-4, weight_decay: 0.1, lr_scheduler_type: cosine, max_steps: 5000,",
        "         per_device_train_batch_size: 4 }",
    ]
    return "\n".join(lines) + "\n"


def cells() -> Iterator[tuple[str, str, str, str]]:
    """Model, row, column and what is published, for each cell that has something."""
    for model, table in RESULTS.items():
        columns, *rows = (line.split() for line in table.strip().splitlines())
        for row, *published in rows:
            for column, cell in zip(columns, published, strict=True):
                if cell != ".":
                    yield model, row, column, cell


def experiment(model: str, row: str, column: str, cell: str) -> str:
    """The text of one file. Hydra reads its own directive only above the first other comment."""
    task, _, name = column.partition("-")
    method, quant = quantization(model, row)
    lines = [
        "# @package _global_",
        f"# python -m loftq_exp experiment={model}_{row}_{column}",
        "# Written from the tables of benchmarks/published.py: change it there.",
        "defaults:",
        f"  - override /model: {model}",
        f"  - override /quant: {method}",
        f"  - override /task: {task}",
        "",
        *(["model: { kind: question-answering }"] if task == "squad" else []),
        f"quant: {{ {quant} }}",
        *([f"task: {{ name: {name} }}"] if name else []),
        *(["task: { max_source_length: 128 }"] if task == "anli" else []),
        f"train: {{ {training(model, row, column)} }}",
        published(column, cell),
    ]
    return "\n".join(lines) + "\n"


def quantization(model: str, row: str) -> tuple[str, str]:
    """The choice of conf/quant/ and the settings of `quant` that a row's name stands for."""
    found = re.fullmatch(r"(lora16|(qlora-)?(nf|uniform|mixed)([\d.]+))_r(\d+)", row)
    if found is None:
        raise ValueError(f"{row}: not the name of a row")
    _, qlora, type_, bits, rank = found.groups()
    if type_ is None:
        return "lora", f"rank: {rank}"
    # 3 bits alone are NF3, which the paper does not have.
    mixed = ", allocation: paper" if type_ == "mixed" else ""
    quantizer = f"type: {TYPES[type_]}, bits: {bits}{mixed}, rank: {rank}"
    return ("qlora", quantizer) if qlora else ("loftq", f"{quantizer}, iter: {ITER[model]}")


def training(model: str, row: str, column: str) -> str:
    """The settings of `train`."""
    if column in ENCODER:
        epochs, uniform, other = ENCODER[column]
        rate, batch = uniform if "uniform" in row else other, 16 if column == "squad" else 32
    else:
        rate, epochs, batch = SUMMARIZATION.get(column) or {"gsm8k": GSM8K, "wikitext": WIKITEXT}[column][model]
        if column == "gsm8k" and "mixed" in row:
            rate = GSM8K_MIXED_RATE.get(model, rate)
    settings = f"learning_rate: {rate}, num_train_epochs: {epochs}, per_device_train_batch_size: {batch}"
    return settings if column in ("gsm8k", "wikitext") else f"{settings},\n         {LINEAR}"


def published(column: str, cell: str) -> str:
    """The line with the published scores by name, in the units in which the results table prints them."""
    if cell == "NA":
        return "published: null # NA: it did not converge"
    scores = zip(SCORES[column], cell.split("/"), strict=True)
    return f"published: {{ {', '.join(f'{name}: {score}' for name, score in scores)} }}"


def files() -> dict[str, str]:
    """The text of every file by its name."""
    own = {f"{model}_{row}_{column}.yaml": experiment(model, row, column, cell) for model, row, column, cell in cells()}
    return own | board_files()


def main() -> None:
    """Writes the files, and removes those of rows that are no longer in a table; the demos are none."""
    wanted = files()
    for path in FOLDER.glob("*.yaml"):
        if path.name not in wanted and not path.name.startswith("demo-"):
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
