"""Every published row: it composes, it opens with the command that runs it, and it is a run of its own."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loftq_exp.cli import compose, conf_dir

FILES = sorted((conf_dir() / "experiment").rglob("*.yaml"))


def test_there_are_experiments_and_they_lie_flat() -> None:
    assert {path.stem for path in FILES} >= {"demo-lora", "demo-qlora", "demo-loftq"}
    assert {path.parent.name for path in FILES} == {"experiment"}


def test_every_experiment_composes_and_is_a_run_of_its_own() -> None:
    runs = {path.stem: compose([f"experiment={path.stem}"]) for path in FILES}
    shared = [place for place, count in Counter(run.run_dir for run in runs.values()).items() if count > 1]
    assert not shared
    for name, run in runs.items():
        found = re.fullmatch(r"(?P<model>.+)_(nf(?P<nf>\d)|lora16)_r(?P<rank>\d+)_(?P<task>\w+)", name)
        if found is None:
            assert name.startswith("demo-")
            continue
        assert run.model.basename.lower().removesuffix("-hf") == found["model"]
        assert run.quant.rank == int(found["rank"])
        assert run.quant.bits == int(found["nf"] or 16)
        assert run.quant.method == ("loftq" if found["nf"] else "lora")
        assert run.task.kind == found["task"]
        assert run.published is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_begins_with_the_command_that_runs_it(path: Path) -> None:
    header = path.read_text().splitlines()[:2]
    # Hydra stops reading its own directives at the first comment that is none.
    assert header == ["# @package _global_", f"# python -m loftq_exp experiment={path.stem}"]


def test_an_experiment_beats_the_defaults_and_the_command_line_beats_it() -> None:
    assert compose(["experiment=demo-loftq"]).train.learning_rate == 1e-3
    run = compose(["experiment=llama-2-7b_nf2_r64_gsm8k", "quant.bits=4", "train.num_train_epochs=1"])
    assert (run.quant.bits, run.train.num_train_epochs, run.task.kind) == (4, 1, "gsm8k")


def test_the_demos_differ_in_nothing_but_the_method() -> None:
    """Their table compares methods, so model, data, rank and training must be the same."""
    demos = [compose([f"experiment=demo-{name}"]) for name in ("lora", "qlora", "loftq")]
    assert [demo.quant.method for demo in demos] == ["lora", "qlora", "loftq"]
    assert len({demo.quant.rank for demo in demos}) == len({demo.quant.lora_alpha for demo in demos}) == 1
    for group in ("model", "task", "train", "seed"):
        assert demos[0].to_dict()[group] == demos[1].to_dict()[group] == demos[2].to_dict()[group]
    assert (demos[1].quant.type, demos[1].quant.bits) == (demos[2].quant.type, demos[2].quant.bits)


def test_rows_that_a_glob_names_run_as_one_sweep(cli: Any) -> None:
    """As `make reproduce-gsm8k` does; device=none stops each job before anything is fetched."""
    outcome = cli("-m", "experiment=glob(llama-2-7b_*_gsm8k)", "device=none")
    assert outcome.code == 1
    (table,) = Path("outputs/sweeps").glob("*/table.md")
    assert table.read_text().count("experiment=llama-2-7b_") == 3
    assert table.read_text().count("failed: device=none: ") == 3
