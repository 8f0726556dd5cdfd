"""The settings of a run: every range, conflicting settings, and the folder names that follow from them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.config.quant import BITS_OF_TYPE
from loftq_exp.config.schema import INITIALISATION, dotted_names, has_variants, shaping
from loftq_exp.errors import UserError
from loftq_exp.keys import identify

BASE: dict[str, Any] = {
    "model": {"path": "owner/Tiny-1B", "kind": "causal"},
    "quant": {"method": "loftq"},
    "task": {"kind": "arithmetic"},
    "train": {},
}


def mapping(settings: dict[str, Any]) -> dict[str, Any]:
    """BASE with settings by dotted name."""
    values = {name: dict(group) for name, group in BASE.items()}
    for name, value in settings.items():
        group, _, last = name.rpartition(".")
        (values.setdefault(group, {}) if group else values)[last] = value
    return values


def config(settings: dict[str, Any] | None = None, **plain: Any) -> RunConfig:
    return RunConfig.from_mapping(mapping((settings or {}) | plain))


def run_dir(settings: dict[str, Any] | None = None, **plain: Any) -> Path:
    """The folder of a run that starts from a source of some content."""
    start = Initialised(Path("init"), {"key": "0", "made_from": {"source": {"weights": "1"}}})
    return identify(config(settings, **plain), start).run_dir


def refused(settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        config(settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def bounded_settings(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], type]]:
    """Every setting with bounds: its name, its bounds, and whether it is a whole number."""
    if has_variants(cls):  # those that arithmetic, the task of BASE, has
        cls = cls.variants()["arithmetic"]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from bounded_settings(hints[field.name], f"{prefix}{field.name}.")
        elif any(field.metadata[bound] is not None for bound in ("ge", "gt", "lt")):
            whole = int in (hints[field.name], *typing.get_args(hints[field.name]))
            yield prefix + field.name, dict(field.metadata), int if whole else float


@pytest.mark.parametrize(("name", "bounds", "kind"), list(bounded_settings()))
def test_every_bound_holds(name: str, bounds: dict[str, Any], kind: type) -> None:
    beyond: list[Any] = []
    if bounds["ge"] is not None:
        beyond += [bounds["ge"] - 1, -(10**30)]
    if bounds["gt"] is not None:
        beyond += [bounds["gt"], -1]
    if bounds["lt"] is not None:
        beyond += [bounds["lt"], 10**30]
    for value in beyond:
        assert refused({name: kind(value)}).startswith(f"{name}={kind(value)}: out of range; give a value ")


@pytest.mark.parametrize(("name", "value"), [
    ("quant.rank", 0), ("quant.rank", -1), ("quant.rank", 2.5), ("quant.rank", None), ("quant.iter", -1), ("quant.alpha", 0),
    ("quant.alpha", -16), ("quant.alpha", float("inf")), ("quant.dropout", 1), ("quant.dropout", -0.1),
    ("train.learning_rate", -1e-4), ("train.learning_rate", 0), ("train.learning_rate", "fast"), ("train.weight_decay", -1),
    ("train.warmup_ratio", 1), ("train.warmup_steps", -1), ("train.num_train_epochs", 0), ("train.max_steps", -2),
    ("train.max_steps", 0), ("train.adam_beta2", 1), ("train.lr_scheduler_type", "cosin"), ("train.bf16", "maybe"),
    ("train.per_device_train_batch_size", 0), ("task.max_train_samples", 0), ("task.max_source_length", 0),
    ("task.kind", "gms8k"), ("model.kind", "decoder"), ("model.path", None), ("quant.method", "loft"), ("quant.solver", "svd"),
    ("quant.type", "nf4"), ("seed", -1), ("seed", 2**32), ("save_dtype", "int8"), ("save_format", "gguf"), ("stages", []),
    ("stages", ["quantize", "quantize"]), ("stages", ["quantise"]), ("stages", "quantize"), ("stages", None),
])  # fmt: skip
def test_refused_values(name: str, value: Any) -> None:
    assert refused({name: value}).startswith(name)


@pytest.mark.parametrize("kind", BITS_OF_TYPE)
def test_bits_of_each_type(kind: str) -> None:
    method = "lora" if kind == "none" else "loftq"
    for bits in range(-1, 34):
        settings = {"quant.type": kind, "quant.bits": bits, "quant.method": method, "quant.iter": 0}
        if bits in BITS_OF_TYPE[kind]:
            assert config(settings).quant.bits == bits
        else:
            message = refused(settings)
            assert message.startswith(
                f"quant.bits={bits}: type {kind} has {', '.join(map(str, BITS_OF_TYPE[kind]))} bits"
            )


@pytest.mark.parametrize(("settings", "rule", "widths"), [
    ({"bits": 3}, "same", (3,)), ({"bits": 3, "allocation": "paper"}, "paper", (2, 4)), ({"bits": 2.25}, "paper", (2, 4)),
    ({"bits": "2.5"}, "paper", (2, 4)), ({"bits": 3.0}, "same", (3,)), ({"bits": 2.5, "type": "uniform"}, "paper", (2, 4)),
    ({"bits": 2.5, "allocation": "error"}, "error", (2, 3, 4)), ({"bits": 4, "allocation": "error"}, "error", (2, 3, 4)),
    ({"bits": 6.5, "allocation": "error+rank", "type": "uniform"}, "error+rank", (2, 3, 4, 5, 6, 7, 8)),
    ({"bits_per_layer": {"*.mlp.*": 4, "*.q_proj": "2", "*": 4}}, "pattern", (2, 4)),
    ({"bits_per_layer": {"*": 8}, "type": "int"}, "pattern", (8,)),
])  # fmt: skip
def test_how_bits_are_given_to_weights(settings: dict[str, Any], rule: str, widths: tuple[int, ...]) -> None:
    quant = config({f"quant.{name}": value for name, value in settings.items()}).quant
    assert (quant.rule, quant.widths) == (rule, widths)


@pytest.mark.parametrize(("settings", "message"), [
    ({"bits": 2.5, "type": "int"}, "quant.bits=2.5: type int has 8 bits and no others to mix; choose quant.type=nf or uniform"),
    ({"bits": 2.5, "type": "none", "method": "lora", "iter": 0}, "quant.bits=2.5: type none has 16 bits and no others to mix"),
    ({"bits": 2.5, "type": "nf-symmetric"}, "quant.bits=2.5: type nf-symmetric has 2 bits and no others to mix"),
    ({"bits": 8, "type": "int", "allocation": "error"}, "quant.allocation=error: type int has 8 bits and no others to mix"),
    ({"bits": 2, "type": "nf-symmetric", "allocation": "paper"}, "quant.allocation=paper: type nf-symmetric has 2 bits"),
    ({"bits": 1.5}, "quant.bits=1.5: a budget under the smallest choice, paper mixes 2, 4 bits; give a value from 2 to 4"),
    ({"bits": 4.5, "type": "uniform"}, "quant.bits=4.5: a budget over the largest choice, paper mixes 2, 4 bits"),
    ({"bits": 1, "allocation": "error"}, "quant.bits=1: a budget under the smallest choice, error mixes 2, 3, 4 bits"),
    ({"bits": 4.01, "allocation": "error+rank"}, "quant.bits=4.01: a budget over the largest choice, error+rank mixes 2, 3, 4"),
    ({"bits": 9, "allocation": "error", "type": "uniform"}, "quant.bits=9: a budget over the largest choice"),
    ({"bits": float("nan")}, "quant.bits=nan: a finite number is needed"),
    ({"allocation": "eror"}, "quant.allocation=eror: not a choice (did you mean 'error'?); choose from: paper, error, error+rank"),
    ({"bits_per_layer": {"*": 5}}, "quant.bits_per_layer.*=5: type nf has 2, 3, 4 bits; choose one of them"),
    ({"bits_per_layer": {"*": 2.5}}, "quant.bits_per_layer.*=2.5: a whole number is needed"),
    ({"bits_per_layer": {}}, "quant.bits_per_layer={}: no pattern is given"),
    ({"bits_per_layer": "*:2"}, "quant.bits_per_layer=*:2: names with their values are needed"),
    ({"bits_per_layer": {"*": 2}, "allocation": "error"}, "quant.allocation=error: bits_per_layer says already"),
    ({"bits": 2.5, "allocation": "error+rank", "method": "qlora", "iter": 0}, "quant.allocation=error+rank: the factors of qlora"),
    ({"rank_choices": [8, 16]}, "quant.rank_choices=[8,16]: ranks are chosen by quant.allocation=error+rank; add that"),
    ({"allocation": "error+rank", "rank_choices": []}, "quant.rank_choices=[]: not a choice of ranks"),
    ({"allocation": "error+rank", "rank_choices": [8, 0]}, "quant.rank_choices=[8,0]: not a choice of ranks"),
    ({"allocation": "error+rank", "rank_choices": [8, 8]}, "quant.rank_choices=[8,8]: not a choice of ranks"),
    ({"allocation": "error+rank", "rank_choices": [65, 128]}, "quant.rank_choices=[65,128]: a budget under the smallest choice"),
    ({"method": "off-the-shelf", "iter": 0, "bits": 2.5}, "quant.bits=2.5: off-the-shelf takes a checkpoint as it was published"),
    ({"scale": "absmin"}, "quant.scale=absmin: not a choice"), ({"levels": "nf4"}, "quant.levels=nf4: not a choice"),
    ({"scale": "search", "type": "uniform-sigma"}, "quant.scale=search: type uniform-sigma has no range per block to search"),
    ({"scale": "search", "type": "int", "bits": 8}, "quant.scale=search: type int has no range per block to search"),
    ({"scale": "search", "type": "none", "bits": 16, "method": "lora", "iter": 0}, "quant.scale=search: type none has no"),
    ({"levels": "optimal", "type": "uniform"}, "quant.levels=optimal: type uniform does not use these levels"),
    ({"method": "off-the-shelf", "iter": 0, "scale": "search"}, "quant.scale=search: off-the-shelf takes a checkpoint as it"),
    ({"method": "off-the-shelf", "iter": 0, "levels": "optimal"}, "quant.levels=optimal: off-the-shelf takes a checkpoint"),
    ({"calibration": "half"}, "quant.calibration=half: not a choice"), ({"rounding": "down"}, "quant.rounding=down: not a choice"),
    ({"order": "reverse"}, "quant.order=reverse: not a choice"),
    ({"method": "off-the-shelf", "iter": 0, "calibration": "full"}, "quant.calibration=full: off-the-shelf is not calibrated"),
    ({"method": "lora", "type": "none", "bits": 16, "iter": 0, "calibration": "full"}, "quant.calibration=full: lora is not calibrated"),
    ({"rounding": "gptq"}, "quant.rounding=gptq: needs all of H, and quant.calibration=none; add quant.calibration=full"),
    ({"rounding": "gptq", "calibration": "diagonal"}, "quant.rounding=gptq: needs all of H, and quant.calibration=diagonal; add"),
    ({"rounding": "gptq", "calibration": "full", "type": "int", "bits": 8}, "quant.rounding=gptq: type int has no levels per"),
    ({"order": "sequential"}, "quant.order=sequential: nothing is calibrated; add quant.calibration=full"),
    ({"polish_steps": -1}, "quant.polish_steps=-1: out of range; give a value at least 0"),
    ({"polish_learning_rate": 0.0}, "quant.polish_learning_rate=0.0: out of range; give a value greater than 0"),
    ({"polish_steps": 5, "method": "off-the-shelf", "iter": 0}, "quant.polish_steps=5: off-the-shelf has no quantization error to"),
    ({"polish_steps": 5, "method": "lora", "type": "none", "bits": 16, "iter": 0}, "quant.polish_steps=5: lora has no quantization"),
    ({"method": "off-the-shelf", "iter": 0, "allocation": "paper"}, "quant.allocation=paper: off-the-shelf takes"),
    ({"method": "off-the-shelf", "iter": 0, "bits_per_layer": {"*": 4}}, "quant.bits_per_layer={'*': 4}: off-the-shelf takes"),
])  # fmt: skip
def test_bits_that_cannot_be_given_are_refused(settings: dict[str, Any], message: str) -> None:
    assert refused({f"quant.{name}": value for name, value in settings.items()}).startswith(message)


def test_whole_bits_are_one_run_however_they_are_written() -> None:
    runs = [config({"quant.bits": bits}) for bits in (4, 4.0, "4")]
    assert len({run_dir({"quant.bits": bits}) for bits in (4, 4.0, "4")}) == 1
    assert repr(runs[1].quant.bits) == "4"
    assert runs[0].init_name == "Tiny-1B-4bit-64rank"
    assert config({"quant.bits": 2.5}).init_name == "Tiny-1B-2.5bit-64rank"
    assert config({"quant.bits_per_layer": {"*": 2}}).init_name == "Tiny-1B-mixedbit-64rank"


def test_settings_that_came_later_shape_a_run_only_where_they_are_used() -> None:
    later = {"double", "allocation", "bits_per_layer", "rank_choices", "scale", "levels", "target_modules", "exclude"}
    later |= {"calibration", "rounding", "order", "polish_steps", "polish_learning_rate"}
    assert not later & {name.rpartition(".")[2] for name in shaping(config(), INITIALISATION)}
    changes: list[dict[str, Any]] = [
        {}, {"allocation": "paper"}, {"allocation": "error"}, {"allocation": "error+rank"},
        {"allocation": "error+rank", "rank_choices": [8, 64]}, {"bits_per_layer": {"*.q_proj": 4, "*": 2}},
        {"bits_per_layer": {"*": 2, "*.q_proj": 4}}, {"double": True},
        {"scale": "search"}, {"levels": "optimal"}, {"scale": "search", "levels": "optimal"},
        {"target_modules": ["q_proj"]}, {"exclude": ["q_proj"]}, {"target_modules": ["q_proj", "k_proj"], "exclude": ["q_proj"]},
    ]  # fmt: skip
    folders = {run_dir({f"quant.{name}": value for name, value in change.items()}) for change in changes}
    assert len(folders) == len(changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"file": "a.txt", "dataset": "me/a"},
            "calibration.file=a.txt: calibration.dataset=me/a is given too; leave one",
        ),
        (
            {"dataset_config": "raw"},
            "calibration.dataset_config=raw: no data set is named; give calibration.dataset=HUB_ID",
        ),
        (
            {"split": "validation"},
            "calibration.split=validation: no data set is named; give calibration.dataset=HUB_ID",
        ),
        ({"file": "A.TXT", "task": "gsm8k"}, "calibration.file=A.TXT: task gsm8k does not read running text; leave"),
        ({"sample": 3}, "calibration.sample: there is no such setting"),
    ],
)
def test_calibration_text_that_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    assert refused({f"calibration.{name}": value for name, value in settings.items()}).startswith(message)


def test_five_bits_with_nf_says_what_to_do() -> None:
    expected = "quant.bits=5: type nf has 2, 3, 4 bits; choose one of them or another quant.type"
    assert refused({"quant.bits": 5}) == expected


@pytest.mark.parametrize("size", [16, 32, 64, 128, 4096])
def test_block_sizes(size: int) -> None:
    assert config({"quant.block_size": size}).quant.block_size == size


@pytest.mark.parametrize("size", [0, -64, 1, 8, 48, 63, 100, 8192])
def test_refused_block_sizes(size: int) -> None:
    assert refused({"quant.block_size": size}).startswith(f"quant.block_size={size}: ")


@pytest.mark.parametrize(("settings", "fault"), [
    ({"quant.method": "lora"}, "quant.type=nf"),
    ({"quant.type": "none", "quant.bits": 16}, "quant.type=none"),
    ({"quant.method": "qlora"}, "quant.iter=5"),
    ({"quant.method": "lora", "quant.type": "none", "quant.bits": 16, "quant.iter": 1}, "quant.iter=1"),
])  # fmt: skip
def test_methods_and_what_does_not_go_with_them(settings: dict[str, Any], fault: str) -> None:
    assert refused(settings).startswith(f"{fault}: ")


@pytest.mark.parametrize("option", ["save_format", "train.backbone"])
@pytest.mark.parametrize(("quant", "fits"), [
    ({}, True), ({"bits": 2}, True), ({"bits": 3}, False), ({"block_size": 32}, False), ({"bits": 2.5}, True),
    ({"bits": 3, "allocation": "paper"}, True), ({"bits": 2.5, "allocation": "error"}, False),
    ({"bits_per_layer": {"*.q_proj": 4, "*": 2}}, True), ({"bits_per_layer": {"*.q_proj": 3, "*": 2}}, False),
    ({"type": "uniform"}, False), ({"type": "int", "bits": 8}, False), ({"type": "nf-symmetric", "bits": 2}, False),
    ({"method": "lora", "type": "none", "bits": 16, "iter": 0}, False),
])  # fmt: skip
def test_packed_storage_only_where_it_holds_the_values(option: str, quant: dict[str, Any], fits: bool) -> None:
    settings = {f"quant.{name}": value for name, value in quant.items()}
    assert config(settings).fits("bnb4") == fits
    if fits:
        config(settings | {option: "bnb4"})
    else:
        message = refused(settings | {option: "bnb4"})
        assert message.startswith(f"{option}=bnb4: ")
        assert f"use {option}=dense" in message


def test_a_packed_checkpoint_cannot_be_held_dense() -> None:
    packed = {"save_format": "bnb4", "train.backbone": "dense"}
    assert refused(packed).startswith("train.backbone=dense: save_format=bnb4 stores 4-bit layers")
    assert config(packed | {"stages": ["quantize"]}).save_format == "bnb4"


def test_unknown_keys_get_the_nearest() -> None:
    assert refused({"quant.bit": 4}) == "quant.bit: there is no such setting; did you mean 'bits'?"
    assert refused({"sed": 4}) == "sed: there is no such setting; did you mean 'seed'?"
    with pytest.raises(UserError, match="modle: there is no such setting; did you mean 'model'"):
        RunConfig.from_mapping(mapping({}) | {"modle": {}})


def test_alpha_none_is_the_rank() -> None:
    assert config({"quant.rank": 16}).quant.lora_alpha == 16
    assert config({"quant.rank": 16}).quant.scaling == 1
    assert config({"quant.rank": 16, "quant.alpha": 32}).quant.scaling == 2


# Names that others rely on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "name", "basename"), [
    ("meta-llama/Llama-2-7b-hf", None, "Llama-2-7b-hf"),
    ("/data/models/tiny/", None, "tiny"),
    ("./tiny", None, "tiny"),
    ("pypi:some-wheel==1.0", None, "some-wheel"),
    ("pypi:some-wheel==1.0", "Real-Name", "Real-Name"),
])  # fmt: skip
def test_the_initialised_checkpoints_place(path: str, name: str | None, basename: str) -> None:
    settings = {"model.path": path, "model.name": name, "quant.bits": 3, "quant.rank": 32, "save_dir": "kept"}
    assert config(settings).inits_path / config(settings).init_name == Path("kept") / f"{basename}-3bit-32rank"


def test_a_path_without_a_name_takes_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny" / "below")
    assert config({"model.path": "."}).model.basename == "below"
    assert config({"model.path": ".."}).model.basename == "tiny"


def test_without_save_dir_the_checkpoint_lies_in_a_store() -> None:
    run = config()
    assert (run.inits_path, run.init_name) == (Path("outputs/inits"), "Tiny-1B-4bit-64rank")
    assert run_dir().parent == Path("outputs/runs")
    assert run.cache_path == Path("outputs/cache")
    assert config(output_dir="elsewhere", cache_dir="c").cache_path == Path("c")


@pytest.mark.parametrize(("settings", "label"), [
    ({}, "Tiny-1B-4bit-64rank-loftq-iter5-arithmetic"),
    ({"quant.method": "qlora", "quant.iter": 0}, "Tiny-1B-4bit-64rank-qlora-arithmetic"),
    ({"quant.type": "uniform", "quant.iter": 1}, "Tiny-1B-uniform-4bit-64rank-loftq-iter1-arithmetic"),
    ({"quant.method": "lora", "quant.type": "none", "quant.bits": 16, "quant.iter": 0, "task.kind": "gsm8k"},
     "Tiny-1B-16bit-64rank-lora-gsm8k"),
])  # fmt: skip
def test_labels(settings: dict[str, Any], label: str) -> None:
    assert config(settings).plain_label == label
    assert run_dir(settings).name.startswith(f"{label}-")


def test_the_run_follows_from_what_shapes_it_and_nothing_else() -> None:
    name = run_dir().name
    free = {
        "stages": ["quantize"],
        "output_dir": "o",
        "save_dir": "s",
        "cache_dir": "c",
        "published": {"accuracy": 35.0},
        "model.path": "elsewhere/Tiny-1B/",
        "model.revision": "main",
        "task.max_eval_samples": 8,
        "train.per_device_eval_batch_size": 2,
        "train.logging_steps": 1,
        "device": "cpu",
        "task.num_beams": 4,
    }
    assert run_dir(free).name == run_dir({"objective": "nll"}).name == name
    shaping = {"seed": 12, "quant.alpha": 16, "quant.dropout": 0, "quant.solver": "exact", "train.learning_rate": 1e-4,
               "task.max_train_samples": 8, "task.train_file": "rows.jsonl", "save_dtype": "float32", "save_format": "bnb4",
               "train.bf16": True, "quant.block_size": 32}  # fmt: skip
    names = {run_dir({setting: value}).name for setting, value in shaping.items()}
    assert len(names | {name}) == len(shaping) + 1


def test_the_same_settings_name_the_same_run_however_they_are_written() -> None:
    assert run_dir({"quant.alpha": 16}) == run_dir({"quant.alpha": 16.0})
    assert run_dir({"quant.rank": 64, "seed": 11}) == run_dir()


def test_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    home = config(output_dir="~/o", save_dir="~/s", cache_dir="~/c")
    assert home.runs_path == Path("/home/someone/o/runs")
    assert home.inits_path == Path("/home/someone/s")
    assert home.cache_path == Path("/home/someone/c")
    with pytest.raises(UserError, match="no such user's home folder"):
        _ = config(output_dir="~nobody-of-this-name/o").runs_path


# Junk ---------------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(10**400)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*dotted_names(RunConfig), "model", "quant", "task", "train", "quant.bit", "", "a\nb"])


@given(st.dictionaries(names, junk, max_size=4))
@example({"quant": {"bits\n": 4}})
@example({"stages": [{"quantize": 1}]})
@example({"quant.bits": 10**400})
@example({"seed": -(10**400)})
@example({"train.learning_rate": 10**400})
@example({"task.max_eval_samples": "1" * 5000})
def test_junk_is_refused_in_one_line_or_is_a_run(settings: dict[str, Any]) -> None:
    values = mapping({})
    for name, value in settings.items():
        group, _, last = name.rpartition(".")
        place = values.get(group) if group else values
        if isinstance(place, dict):
            place[last] = value
    told = ""
    try:
        RunConfig.from_mapping(values)
    except UserError as error:
        told = str(error)
    assert len(told.splitlines()) <= 1


@given(st.dictionaries(st.text() | st.integers(), junk, max_size=4))
def test_junk_all_over_is_refused_in_one_line(values: dict[Any, Any]) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.from_mapping(values)
    assert len(str(caught.value).splitlines()) == 1
