"""Every published row: it composes, starts with the command that runs it, and is a distinct run."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import runpy
import shutil
import subprocess
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from loftq_exp.commands.run import compose, conf_dir
from loftq_exp.config import RunConfig, digest_of
from loftq_exp.config.schema import RESULTS, shaping
from loftq_exp.tasks import load_task
from loftq_exp.tasks.arithmetic import generate

ROOT = Path(__file__).parents[1]
FILES = sorted((conf_dir() / "experiment").rglob("*.yaml"))
DEMOS = ("lora", "qlora", "loftq", "calibrated")
ALL_ROWS = [path.stem for path in FILES if not path.stem.startswith("demo-")]
BOARD = [name for name in ALL_ROWS if name.endswith("_metamath")]
"""The rows of PEFT's MetaMathQA board; the others are the paper's."""
ROWS = [name for name in ALL_ROWS if name not in BOARD]
COMMAND = "# python -m loftq_exp "
MODELS = {"llama-2-7b": "Llama-2-7b-hf", "llama-2-13b": "Llama-2-13b-hf", "llama-3-8b": "Meta-Llama-3-8B",
          "phi-2": "phi-2", "bart-large": "bart-large", "deberta-v3-base": "deberta-v3-base"}  # fmt: skip
TARGETS = ("reproduce-gsm8k", "reproduce-glue", "reproduce-summarization", "reproduce-wikitext",
           "reproduce-metamath")  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> dict[str, RunConfig]:
    """What the command in each file's second line composes to; each is composed once, because it takes a tenth of a second."""
    composed = {}
    for path in FILES:
        package, command = path.read_text().splitlines()[:2]
        # Hydra stops reading its own directives at the first comment that is none.
        assert package == "# @package _global_"
        assert command.startswith(COMMAND)
        composed[path.stem] = compose(command.removeprefix(COMMAND).split())
    return composed


# The files ------------------------------------------------------------------------------------------------------------


def test_there_are_experiments_and_they_lie_flat() -> None:
    assert {path.stem for path in FILES} >= {f"demo-{name}" for name in DEMOS}
    assert {path.parent.name for path in FILES} == {"experiment"}


def test_the_files_are_those_of_the_published_tables() -> None:
    """`make experiments` writes them; a change made in a file alone would be lost."""
    files = runpy.run_path(str(ROOT / "benchmarks" / "published.py"))["files"]()
    assert sorted(files) == [f"{name}.yaml" for name in ALL_ROWS]
    assert [name for name, text in files.items() if (conf_dir() / "experiment" / name).read_text() != text] == []


def test_the_command_of_a_file_is_that_of_its_name() -> None:
    commands = {path.stem: path.read_text().splitlines()[1] for path in FILES}
    assert commands == {name: f"{COMMAND}experiment={name}" for name in commands}


# What they compose to -------------------------------------------------------------------------------------------------


def test_every_experiment_is_a_run_of_its_own(runs: dict[str, RunConfig]) -> None:
    """What was published does not shape a run, so that two which differ in nothing else would share a folder too."""
    shaped = [
        digest_of([run.model.path, shaping(run, *RESULTS), shaping(run, *RESULTS, mark="locates")])
        for run in runs.values()
    ]
    shared = [place for place, count in Counter(shaped).items() if count > 1]
    assert not shared


def test_a_row_is_what_its_name_says(runs: dict[str, RunConfig]) -> None:
    assert {name: told_by(runs[name]) for name in ROWS} == {name: told_by_name(name) for name in ROWS}
    assert {runs[name].quant.dropout for name in ROWS} == {0.1}
    assert [name for name in ROWS if load_task(runs[name].task).model_kind != runs[name].model.kind] == []


def told_by(run: RunConfig) -> tuple[Any, ...]:
    """What the name of a row's file says, from its settings."""
    quant = run.quant
    return run.model.basename, quant.rank, quant.bits, quant.rule, quant.type, quant.method, run.task.label


def told_by_name(name: str) -> tuple[Any, ...]:
    """The same from the name."""
    found = re.fullmatch(r"(?P<model>.+)_(lora16|(?P<qlora>qlora-)?(?P<type>nf|uniform|mixed)(?P<bits>[\d.]+))_r(?P<rank>\d+)_(?P<task>.+)", name)  # fmt: skip
    assert found is not None
    return (
        MODELS[found["model"]],
        int(found["rank"]),
        float(found["bits"] or 16),
        "paper" if found["type"] == "mixed" else "same",
        {"nf": "nf", "mixed": "nf", "uniform": "uniform-clipped", None: "none"}[found["type"]],
        "lora" if not found["bits"] else "qlora" if found["qlora"] else "loftq",
        found["task"],
    )


def test_what_was_published_is_a_score_of_the_task(runs: dict[str, RunConfig]) -> None:
    """In one column of its table, and a plausible number in that column's unit, or marked as missing."""
    for name in ROWS:
        published = runs[name].published
        if published is None:
            text = (conf_dir() / "experiment" / f"{name}.yaml").read_text()
            assert text.endswith("null # NA: it did not converge\n"), name
            continue
        assert tuple(published) in [column.scores for column in load_task(runs[name].task).table], name
        assert all(1 < value < 100 for value in published.values()), name


@pytest.mark.parametrize(("name", "expected"), [
    ("llama-2-7b_nf4_r64_gsm8k", (5, 3e-4, 6, 16, 0.1, "cosine", 0.03, {"accuracy": 35.0})),
    ("llama-2-13b_nf2_r64_wikitext", (5, 1e-4, 2, 32, 0.1, "cosine", 0.03, {"perplexity": 7.69})),
    ("llama-2-7b_mixed3_r64_gsm8k", (5, 3e-4, 6, 16, 0.1, "cosine", 0.03, {"accuracy": 32.9})),
    ("llama-2-13b_mixed2.25_r64_gsm8k", (5, 3e-4, 6, 16, 0.1, "cosine", 0.03, {"accuracy": 38.1})),
    ("llama-2-13b_qlora-mixed2.5_r64_gsm8k", (0, 3e-4, 6, 16, 0.1, "cosine", 0.03, None)),
    ("llama-2-13b_qlora-mixed2.5_r64_wikitext", (0, 1e-4, 2, 32, 0.1, "cosine", 0.03, {"perplexity": 19.39})),
    ("llama-2-13b_qlora-nf2_r64_wikitext", (0, 1e-4, 2, 32, 0.1, "cosine", 0.03, None)),
    ("phi-2_nf4_r64_gsm8k", (7, 3e-4, 6, 16, 0.1, "cosine", 0.03, {"accuracy": 64.1})),
    ("llama-3-8b_lora16_r64_gsm8k", (0, 5e-4, 3, 16, 0.1, "cosine", 0.03, {"accuracy": 69.3})),
    ("bart-large_nf2_r8_summarization-cnn_dailymail",
     (1, 2e-4, 15, 64, 0.0, "linear", 0.0, {"rouge1": 42.24, "rouge2": 19.44, "rougeL": 39.04})),
    ("deberta-v3-base_uniform2_r32_glue-rte", (5, 5e-4, 20, 32, 0.0, "linear", 0.0, {"accuracy": 63.2})),
    ("deberta-v3-base_nf2_r32_glue-rte", (5, 5e-5, 20, 32, 0.0, "linear", 0.0, {"accuracy": 61.7})),
    ("deberta-v3-base_nf2_r16_glue-mnli",
     (5, 1e-4, 5, 32, 0.0, "linear", 0.0, {"accuracy_matched": 84.7, "accuracy_mismatched": 85.1})),
    ("deberta-v3-base_uniform2_r16_squad", (5, 5e-5, 10, 16, 0.0, "linear", 0.0, {"exact_match": 84.4, "f1": 91.2})),
])  # fmt: skip
def test_settings_of_some_rows(runs: dict[str, RunConfig], name: str, expected: tuple[Any, ...]) -> None:
    run, train = runs[name], runs[name].train
    assert (run.quant.iter, train.learning_rate, train.num_train_epochs, train.per_device_train_batch_size,
            train.weight_decay, train.lr_scheduler_type, train.warmup_ratio, run.published) == expected  # fmt: skip
    assert (train.warmup_steps, train.gradient_accumulation_steps, train.max_steps, run.seed) == (0, 1, -1, 11)


def test_the_rows_of_the_board_have_its_settings(runs: dict[str, RunConfig]) -> None:
    """Those of default_training_params.json, and of each row its rank and scaling; 3 methods at 3 widths are quantized."""
    scaling = {"lora16_r32": 2.0, "lora16_r64": 2.0, "rslora16_r64": 64 / 64**0.5, "lora16_r10": 2.0}
    assert {name.split("_")[1] for name in BOARD} == {
        "lora16", "rslora16", *(f"{kind}nf{bits}" for kind in ("", "qlora-", "calibrated-") for bits in (2, 3, 4))
    }  # fmt: skip
    for name in BOARD:
        run, row = runs[name], name.split("_", 1)[1].removesuffix("_metamath")
        train = run.train
        assert (train.learning_rate, train.weight_decay, train.lr_scheduler_type, train.max_steps,
                train.per_device_train_batch_size, run.quant.dropout) == (1e-4, 0.1, "cosine", 5000, 4, 0.0)  # fmt: skip
        assert (run.model.path, run.task.kind, run.published) == ("meta-llama/Llama-3.2-3B", "metamath", None)
        assert (run.quant.rank, run.quant.scaling) == (int(row.rpartition("_r")[2]), scaling.get(row, 2.0))
        assert run.quant.bits == (16 if "16" in row else int(row.partition("nf")[2][0]))
        assert (run.quant.calibration != "none") == row.startswith("calibrated")


def test_how_many_rows_there_are() -> None:
    assert Counter(name.split("_")[0] for name in ROWS) == {
        "llama-2-7b": 22, "llama-2-13b": 22, "llama-3-8b": 3, "phi-2": 3, "bart-large": 16,
        "deberta-v3-base": 7 * 10 - 3,  # ANLI has no uniform rows
    }  # fmt: skip


def test_an_experiment_beats_the_defaults_and_the_command_line_beats_it(runs: dict[str, RunConfig]) -> None:
    assert runs["demo-loftq"].train.learning_rate == 4e-4
    run = compose(["experiment=llama-2-7b_nf2_r64_gsm8k", "quant.bits=4", "train.num_train_epochs=1"])
    assert (run.quant.bits, run.train.num_train_epochs, run.task.kind) == (4, 1, "gsm8k")


def test_the_demos_differ_in_nothing_but_the_method(runs: dict[str, RunConfig]) -> None:
    """Their table compares methods, so model, data, rank and training must be the same."""
    demos = [runs[f"demo-{name}"] for name in DEMOS]
    assert [demo.quant.method for demo in demos] == ["lora", "qlora", "loftq", "loftq"]
    assert len({demo.quant.rank for demo in demos}) == len({demo.quant.lora_alpha for demo in demos}) == 1
    for group in ("model", "calibration", "task", "train", "seed"):
        assert all(demo.to_dict()[group] == demos[0].to_dict()[group] for demo in demos)
    assert {(demo.quant.type, demo.quant.bits) for demo in demos[1:]} == {("nf", 2)}


# How they run ---------------------------------------------------------------------------------------------------------


def overrides_of(target: str, *variables: str) -> list[str]:
    """The overrides that `make TARGET` would give to the command."""
    make = shutil.which("make") or pytest.skip("make is not there")
    # Without the variables of an outer make (`make test`), which would have this one print the folders that it enters and leaves.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    made = subprocess.run(
        [make, "-n", target, *variables], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    return made.splitlines()[-1].replace("'", "").partition(" -m loftq_exp -m ")[2].split()


def rows_of(target: str, *variables: str) -> list[str]:
    patterns = re.sub(r"experiment=glob\(\[?(.+?)\]?\)", r"\1", overrides_of(target, *variables)[0]).split(",")
    return [name for name in ALL_ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def test_the_targets_run_every_row_once() -> None:
    assert sorted(name for target in TARGETS for name in rows_of(target)) == ALL_ROWS


def test_model_and_limit_narrow_a_target() -> None:
    names = rows_of("reproduce-glue", "MODEL=deberta-v3-base_nf2")
    assert len(names) == 20
    assert all(name.startswith("deberta-v3-base_nf2_r") for name in names)
    assert len(rows_of("reproduce-gsm8k", "MODEL=llama-2-13b")) == 11
    limits = ["task.max_train_samples=100", "task.max_eval_samples=100"]
    assert overrides_of("reproduce-wikitext", "LIMIT=100")[1:] == limits
    assert overrides_of("reproduce-wikitext")[1:] == []


def test_rows_that_a_glob_names_run_as_one_sweep(cli: Any) -> None:
    """As `make reproduce-gsm8k` does; device=none stops each job before anything is fetched."""
    outcome = cli("-m", "experiment=glob([llama-3-8b_nf4_*_gsm8k,phi-2_*nf4_*])", "device=none")
    assert outcome.code == 1
    (table,) = Path("outputs/sweeps").glob("*/table.md")
    assert table.read_text().count("experiment=phi-2_") == 2
    assert table.read_text().count("failed: device=none: ") == 3


def test_a_glob_that_names_no_row_is_told(cli: Any) -> None:
    assert cli.refused("-m", "experiment=glob(llama-7b_*_gsm8k)").startswith("no job to run: ")
    assert not list(Path().glob("outputs/sweeps/*"))


def test_a_row_that_is_done_is_told_and_stands_in_the_table_with_what_was_published(cli: Any) -> None:
    """A published score without a column in the table is reported too."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in islice(generate("train", 0), 8)))
    tiny = [override for override in cli.tiny if not override.startswith(("model=", "task="))]
    rows = ("task.train_file=rows.jsonl", "task.eval_file=rows.jsonl", "train.max_steps=1")
    sweep = ("-m", "experiment=llama-2-7b_qlora-nf4_r64_gsm8k", *tiny, *rows, "+published.acuracy=35")
    first, again = cli(*sweep), cli(*sweep)
    assert first.code == again.code == 0, first
    assert "published.acuracy: not shown, this run's scores are nll, accuracy\n" in first.out
    assert "published.accuracy: " not in first.out
    assert "done before" not in first.out
    assert again.out.count("finetune: done before, in ") == again.out.count("evaluate: done before, in ") == 1
    assert "(published 35.1%)" in max(Path("outputs/sweeps").glob("*/table.md")).read_text()


@pytest.mark.parametrize("model", ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_a_mixture_s_file_turns_off_dropout_and_a_given_value_wins(model: str) -> None:
    """It is then refused, see tests/initialise/test_experts.py. Other models keep the method's own."""
    for quant in ("loftq", "qlora", "lora"):
        assert compose([f"model={model}", f"quant={quant}"]).quant.dropout == 0
    assert compose([f"model={model}", "quant.dropout=0.05"]).quant.dropout == 0.05
    assert compose(["model=qwen3-0.6b"]).quant.dropout == 0.1
