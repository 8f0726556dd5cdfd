"""The names of runs show the settings that are not the usual ones."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from loftq_exp import compose
from loftq_exp.config import RunConfig
from loftq_exp.config.naming import MOST_CHARACTERS, SHOWN, unusual
from loftq_exp.config.schema import ADAPTER, INITIALISATION, dotted_names, shaping


@pytest.mark.parametrize("quant", ["loftq", "qlora", "lora", "pissa", "off-the-shelf"])
def test_the_usual_run_has_a_short_name(quant: str) -> None:
    run = compose([f"quant={quant}"])
    assert unusual(run) == ""
    assert run.label == run.plain_label


def test_every_setting_of_a_name_exists_and_shapes_the_run() -> None:
    run = compose()
    shapes = shaping(run, INITIALISATION, ADAPTER)
    for name, (_, *usual) in SHOWN.items():
        assert name in set(dotted_names(RunConfig))
        value: Any = reduce(getattr, name.split("."), run)
        assert value in usual
        assert name in shapes or value is None or value is False or name in {  # omitted at the value before they existed
            "quant.calibration", "quant.rounding", "quant.order", "quant.scale", "quant.levels", "quant.polish_steps",
        }  # fmt: skip
    shorts = [short for short, *_ in SHOWN.values()]
    assert len(set(shorts)) == len(shorts)


@pytest.mark.parametrize(("overrides", "text"), [
    (["seed=12"], "-seed12"),
    (["quant.dropout=0", "train.learning_rate=1e-5", "seed=0"], "-seed0-lr1e-05-drop0"),
    (["train.learning_rate=0.001263559813738167", "train.num_train_epochs=3"], "-lr0.001264-ep3"),
    (["quant.double=true", "quant.alpha=16"], "-alpha16-double"),
    (["quant.calibration=full", "quant.scale=search"], "-cal-full-scale-search"),
    (["task=wikitext", "task.max_train_samples=null"], ""),
])  # fmt: skip
def test_a_name_shows_what_is_not_usual(overrides: list[str], text: str) -> None:
    run = compose(overrides)
    assert unusual(run) == text
    assert run.label == run.plain_label + text


def test_a_name_stays_short() -> None:
    overrides = ["seed=4294967295", "train.learning_rate=1.2345e-5", "train.max_steps=1000000", "train.num_train_epochs=1.2345",
                 "train.per_device_train_batch_size=1024", "train.gradient_accumulation_steps=1024", "quant.double=true",
                 "task.max_train_samples=1000000", "quant.calibration=diagonal", "quant.scale=search"]  # fmt: skip
    text = unusual(compose(overrides))
    assert text.startswith("-seed4294967295-lr1.234e-05-steps1000000-ep1.234")
    assert MOST_CHARACTERS - 25 < len(text) <= MOST_CHARACTERS
