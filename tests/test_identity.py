"""What a run repeats after a change: nothing if the setting shapes no result, otherwise all that depends on it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import without_manifests
from safetensors.torch import load_file, save_file

import loftq_exp
from loftq_exp.config import RunConfig, TaskConfig
from loftq_exp.config.schema import ADAPTER, INITIALISATION, RESULTS, SCORES, dotted_names, has_variants
from loftq_exp.errors import UserError
from loftq_exp.evaluation import score
from loftq_exp.initialise import stage
from loftq_exp.initialise.key import init_key
from loftq_exp.keys import adapter_key, identify, scores_key
from loftq_exp.pipeline import RunResult
from loftq_exp.source import digests
from loftq_exp.source.locate import Source
from loftq_exp.training import finetune

ROWS = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(1, 5)]
BATCH = "train.per_device_train_batch_size=4"  # of all rows, so that any other row makes another adapter
QUICK = (
    "model=llama-2",
    "task=gsm8k",
    "quant.rank=4",
    "quant.iter=1",
    "train.max_steps=1",
    "task.max_target_length=4",
    "train.warmup_ratio=0",
    BATCH,
)
QE = "stages=[quantize,evaluate]"


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Place:
    """A folder with a model, rows and the results of one run. What a test changes in it is put back afterwards."""

    def __init__(self, root: Path, tiny_llama_dir: Path) -> None:
        self.root, self.model = root, root / "model"
        shutil.copytree(tiny_llama_dir, self.model)
        for split in ("train", "eval"):
            write_rows(root / f"{split}.jsonl", ROWS)
        self.first = self.run()
        self.pristine = shutil.copytree(root, root.with_name("pristine"))

    def config(self, *overrides: str) -> RunConfig:
        files = [f"task.{split}_file={self.root / split}.jsonl" for split in ("train", "eval")]
        return loftq_exp.compose(
            [*QUICK, *files, f"model.path={self.model}", f"output_dir={self.root / 'out'}", *overrides]
        )

    def run(self, *overrides: str) -> RunResult:
        return loftq_exp.run(self.config(*overrides))

    def put_back(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.pristine, self.root)

    # Changes ----------------------------------------------------------------------------------------------------------

    def touch(self, name: str) -> None:
        os.utime(self.model / name, (1e9, 1e9))

    def other_weights(self, folder: Path | None = None) -> None:
        """Other values in a file of the same size and date of modification."""
        file = weights_of(folder or self.model)
        before = file.stat()
        save_file({name: value * 1.5 for name, value in load_file(file).items()}, file, {"format": "pt"})
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size

    def other_rows(self, split: str) -> None:
        write_rows(
            self.root / f"{split}.jsonl", [*ROWS[:3], {"question": "Who has 5 + 4?", "answer": "5 + 4 = 9\n#### 9"}]
        )

    def moved(self) -> str:
        self.model.rename(self.root / "elsewhere")
        return f"model.path={self.root / 'elsewhere'}"

    def zero_adapter(self) -> None:
        file = self.first.run_dir / "adapter" / "adapter_model.safetensors"
        save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Place:
    return Place(tmp_path_factory.mktemp("identity") / "place", tiny_llama_dir)


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    yield shared
    shared.put_back()


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the stages really did: checkpoints written, adapters trained, models scored."""
    counts: Counter[str] = Counter()

    def counted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return work(*arguments, **named)

        return wrapped

    monkeypatch.setattr(stage, "_write_weights", counted("quantize", stage._write_weights))
    monkeypatch.setattr(finetune, "finetune", counted("finetune", finetune.finetune))
    monkeypatch.setattr(score, "score", counted("evaluate", score.score))
    return counts


# What shapes nothing, or scores alone ---------------------------------------------------------------------------------


def changed(change: Callable[[Place], Any]) -> Callable[[Place], list[str]]:
    """A change of files, with the overrides that go with it."""

    def apply(place: Place) -> list[str]:
        override = change(place)
        return [override] if isinstance(override, str) else []

    return apply


FOR_NOTHING: dict[str, Callable[[Place], list[str]]] = {
    "scored rows": lambda _: ["task.max_eval_samples=2"],
    "rows a scored batch": lambda _: ["train.per_device_eval_batch_size=3"],
    "device": lambda _: ["device=cpu"],
    "workers": lambda _: ["train.dataloader_num_workers=1"],
    "logging": lambda _: ["train.logging_steps=1"],
    "saving": lambda _: ["train.save_steps=1"],
    "beams in a task without": lambda _: ["task.num_beams=4"],
    "a slash": lambda place: [f"model.path={place.model}/"],
    "weights touched": changed(lambda place: place.touch("model.safetensors")),
    "tokenizer touched": changed(lambda place: place.touch("tokenizer.json")),
    "a README": changed(lambda place: (place.model / "README.md").write_text("# A model\n") and None),
    "moved": changed(lambda place: place.moved()),
}


@pytest.mark.parametrize("change", FOR_NOTHING)
def test_nothing_is_done_again_for_what_shapes_nothing(place: Place, done: Counter[str], change: str) -> None:
    result = place.run(*FOR_NOTHING[change](place))
    assert (result.run_dir, result.init_dir) == (place.first.run_dir, place.first.init_dir)
    assert done == ({"evaluate": 1} if change == "scored rows" else {})
    assert len(list((place.root / "out" / "inits").glob("[!.]*"))) == 1
    if change != "scored rows":
        assert result.scores == place.first.scores


# What must be noticed -------------------------------------------------------------------------------------------------

ALL = {"quantize": 1, "finetune": 1, "evaluate": 1}
NOTICED: dict[str, tuple[Callable[[Place], list[str]], dict[str, int]]] = {
    "weights, size and date kept": (changed(lambda place: place.other_weights()), ALL),
    "another base without training": (
        lambda place: [QE] if place.other_weights() is None else [],
        {"quantize": 1, "evaluate": 1},
    ),
    "adapter deleted": (changed(lambda place: shutil.rmtree(place.first.run_dir / "adapter")), {"finetune": 1}),
    "adapter replaced": (changed(lambda place: place.zero_adapter()), {"finetune": 1}),
    "samples deleted": (changed(lambda place: (place.first.run_dir / "samples.jsonl").unlink()), {"evaluate": 1}),
    "training rows": (changed(lambda place: place.other_rows("train")), {"finetune": 1, "evaluate": 1}),
    "scored rows": (changed(lambda place: place.other_rows("eval")), {"evaluate": 1}),
    "learning rate": (lambda _: ["train.learning_rate=1e-2"], {"finetune": 1, "evaluate": 1}),
    "steps": (lambda _: ["train.max_steps=2"], {"finetune": 1, "evaluate": 1}),
    "alpha": (lambda _: ["quant.alpha=8"], ALL),
    "seed": (lambda _: ["seed=12"], {"finetune": 1, "evaluate": 1}),
}


@pytest.mark.parametrize("change", NOTICED)
def test_what_a_change_shapes_is_done_again(place: Place, done: Counter[str], change: str) -> None:
    apply, expected = NOTICED[change]
    before = place.first.metrics["scores"]
    result = place.run(*apply(place))
    assert done == expected
    if change in ("adapter deleted", "adapter replaced", "samples deleted"):  # back to where it was
        assert result.scores == before
        assert (result.run_dir / "samples.jsonl").is_file()
    if change == "another base without training":
        assert result.metrics["scored_adapter"] == "initial"
    if change in ("learning rate", "steps", "seed"):
        assert result.init_dir == place.first.init_dir, "an initialisation is stored once"


@pytest.mark.parametrize("change", ["nothing", "training rows", "weights"])
def test_training_resumes_after_a_kill_only_from_its_own(
    place: Place, done: Counter[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    killed = ("train.learning_rate=1e-2", "train.save_steps=1", "stages=[quantize,finetune]")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_save_adapter", kill)
        with pytest.raises(KeyboardInterrupt):
            place.run(*killed)
    done.clear()
    if change == "training rows":
        place.other_rows("train")
    if change == "weights":
        place.other_weights()
    run = place.run(*killed).run_dir
    assert done == ({"quantize": 1} if change == "weights" else {}) | {"finetune": 1}
    resumed = json.loads((run / "finetune.json").read_text())["resumed_from"]
    assert resumed == ("checkpoint-1" if change == "nothing" else None)


@pytest.mark.parametrize("stage_alone", ["finetune", "evaluate"])
@pytest.mark.parametrize("change", ["model", "seed"])
def test_a_stage_alone_takes_only_the_checkpoint_of_its_own_key(
    place: Place, done: Counter[str], stage_alone: str, change: str
) -> None:
    kept = (
        "quant=qlora",
        "quant.rank=4",
        "quant.iter=0",
        f"save_dir={place.root / 'kept'}",
    )  # its factors are drawn from the seed
    init = place.run(*kept, "stages=[quantize]").init_dir
    assert init == place.root / "kept" / "model-4bit-4rank"
    alone = f"stages=[{stage_alone}]"
    done.clear()
    if change == "model":
        other = Path(shutil.copytree(place.model, place.root / "other" / "model"))
        place.other_weights(other)
        override, message = (
            f"model.path={other}",
            f"model.path={other}: its weights differ from what the checkpoint at {init} ",
        )
    else:
        override, message = (
            "seed=12",
            f"seed=12: the checkpoint at {init} was made with 11; it is never replaced: set another save_dir",
        )
    for stages in (alone, "stages=[quantize]"):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            place.run(*kept, override, stages)
    assert not done
    assert place.run(*kept, alone).init_dir == init
    assert done == {stage_alone: 1}


# Where results lie ----------------------------------------------------------------------------------------------------


def test_a_sweep_writes_one_initialisation(place: Place, done: Counter[str]) -> None:
    runs = [place.run(f"train.learning_rate={rate}", "stages=[quantize,finetune]") for rate in (1e-3, 2e-3)]
    assert len({run.run_dir for run in runs}) == 2
    assert {run.init_dir for run in runs} == {place.first.init_dir}
    assert done == {"finetune": 2}
    for run in runs:
        adapter = json.loads((run.run_dir / "adapter" / "adapter_config.json").read_text())
        assert Path(adapter["base_model_name_or_path"]) == run.init_dir.resolve()


def test_evaluations_of_one_adapter_are_kept_beside_each_other(place: Place, done: Counter[str]) -> None:
    few = place.run("task.max_eval_samples=2")
    top = few.run_dir / "samples.jsonl"
    assert (len(top.read_text().splitlines()), few.metrics["data"]) == (2, place.first.metrics["data"])
    again = place.run()
    assert done == {"evaluate": 1}
    assert (again.scores, len(top.read_text().splitlines())) == (place.first.scores, 4)
    records = [json.loads(path.read_text()) for path in (few.run_dir / "evaluations").glob("*/evaluate.json")]
    assert sorted(record["rows"] for record in records) == [2, 4]
    assert json.loads((few.run_dir / "evaluate.json").read_text()) in records


def test_every_record_says_its_version(place: Place) -> None:
    run = place.first.run_dir
    records = [*(run / f"{name}.json" for name in ("config", "finetune", "evaluate", "metrics")),
               place.first.init_dir / "init_report.json"]  # fmt: skip
    assert [json.loads(path.read_text())["format"] for path in records] == [2] * 5


def test_results_of_version_0_1_are_left_alone(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    out = place.root / "old"
    name = place.first.run_dir.name
    old = out / "runs" / f"{name.rpartition('-')[0]}-01234567"
    shutil.copytree(place.first.run_dir, old)
    for path in old.glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in ("format", "made_from")}))
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    result = place.run(f"output_dir={out}", "stages=[quantize]")
    assert result.run_dir != old
    assert [line for line in caplog.messages if "version 0.1" in line] == [
        f"{old}: made by version 0.1, left alone; this run's results go to {result.run_dir}"
    ]
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_an_initialisation_of_version_0_1_is_not_replaced(place: Place) -> None:
    kept = f"save_dir={place.root / 'kept'}"
    init = place.run(kept, "stages=[quantize]").init_dir
    report = json.loads((without_manifests(init) / "init_report.json").read_text())
    del report["made_from"]
    (init / "init_report.json").write_text(json.dumps(report | {"format": 1}))
    for stages in ("stages=[quantize]", "stages=[evaluate]"):
        with pytest.raises(
            UserError,
            match=rf"^save_dir=\S+: the checkpoint at {init} was made by version 0\.1, .* it is never replaced: ",
        ):
            place.run(kept, stages)


def test_an_older_version_of_ours_is_not_taken_for_this_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (f"save_dir={place.root / 'kept'}", "stages=[quantize]")
    place.run(*kept)
    monkeypatch.setattr("loftq_exp.initialise.key.CHECK_VERSION", 999)
    with pytest.raises(
        UserError, match=r"was made by an older version \(check \d+, here 999\); it is never replaced: "
    ):
        place.run(*kept)


def test_a_stage_alone_does_without_the_source(place: Place, done: Counter[str]) -> None:
    """As on another machine: the settings are compared, and the name under which the source was given."""
    kept = (f"save_dir={place.root / 'kept'}",)
    place.run(*kept, "stages=[quantize]")
    shutil.rmtree(place.model)
    done.clear()
    for where in ((), kept):
        assert place.run(*where, "stages=[evaluate]").metrics["scored_adapter"] == "fine-tuned"
        with pytest.raises(
            UserError, match="there is no initialised checkpoint at" if not where else r"quant\.alpha=8"
        ):
            place.run(*where, "stages=[evaluate]", "quant.alpha=8.0")
    with pytest.raises(
        UserError, match=r"elsewhere/model: is not on this machine, and the checkpoint at \S+ was made from "
    ):
        place.run(*kept, "stages=[evaluate]", "model.path=/elsewhere/model")
    assert not done, "all of it was done before"


# Digests of files -----------------------------------------------------------------------------------------------------


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    digest = digests._digest
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1)
    monkeypatch.setattr(digests, "_digest", lambda path: read.append(path) or digest(path))
    file = tmp_path / "weights"
    file.write_bytes(b"one" * 1000)
    known = digests.FileDigests(tmp_path / "cache")
    first = known.of([file])
    assert known.of([file]) == first
    assert len(read) == 2, "a file that is younger than the clock's resolution is read each time"
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**12))
    assert [known.of([file]) for _ in range(3)] == [first] * 3
    assert len(read) == 3
    before = file.stat()
    file.write_bytes(b"two" * 1000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known.of([file]) != first, "its time of change cannot be put back"


# What the schema says -------------------------------------------------------------------------------------------------


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting by its dotted name, in the order of the schema; those of a task come from its own dataclass."""
    if has_variants(cls):
        for variant in TaskConfig.variants().values():
            yield from fields_of_one(variant, prefix)
    else:
        yield from fields_of_one(cls, prefix)


def fields_of_one(cls: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields_of(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


SETTINGS = dict(fields_of(RunConfig))
SUMMARY = {"model.kind": "seq2seq", "task.kind": "summarization", "task.name": "xsum"}
SQUAD = {"model.kind": "question-answering", "task.kind": "squad"}
INSTRUCT = {"task.kind": "instruct", "task.train_file": "chat.jsonl"}
HARNESS = {"task.kind": "lm_eval", "task.name": ["gsm8k"]}
COMMONSENSE = {"task.kind": "commonsense"}
WIKITEXT = {"task.kind": "wikitext"}
CALIBRATED = {"quant.calibration": "full"}
HUB_TEXT = {"calibration.dataset": "me/text"}
SHARED = {"stages": ["quantize"], "initialise.shards": 2}
SHELF = {"quant.method": "off-the-shelf", "quant.iter": 0}
CHOSEN = {"train.eval_strategy": "epoch", "train.early_stopping_patience": 2}
"""A validation by which the adapter is chosen."""
BASES: dict[str, dict[str, Any]] = {
    "seed": {"quant.method": "qlora", "quant.iter": 0},
    **dict.fromkeys(("quant.path", "quant.revision"), SHELF),
    **dict.fromkeys(
        ("task.name", "task.source_prefix", "task.num_beams", "task.length_penalty", "task.no_repeat_ngram_size"),
        SUMMARY,
    ),
    **dict.fromkeys(("task.doc_stride", "task.n_best_size", "task.max_answer_length"), SQUAD),
    **dict.fromkeys(("task.block_size", "task.start_token"), WIKITEXT),
    **dict.fromkeys(("task.max_length", "task.packing", "task.eval_share", "task.score"), INSTRUCT),
    "task.reference": INSTRUCT | {"task.score": "exact"},
    **dict.fromkeys(("task.include_path", "task.num_fewshot", "task.apply_chat_template"), HARNESS),
    **dict.fromkeys(("task.sets", "task.eval_folder"), COMMONSENSE),
    "score_run": {"stages": ["evaluate"]},
    "quant.rank_choices": {"quant.allocation": "error+rank"},
    "hub.push": {"hub.repo_id": "me/model"},
    **dict.fromkeys(
        ("quant.rounding", "quant.order", "calibration.samples", "calibration.length", "calibration.seed"),
        CALIBRATED,
    ),
    "quant.polish_learning_rate": {"quant.polish_steps": 2},
    **dict.fromkeys(("calibration.dataset_config", "calibration.split"), HUB_TEXT),
    **dict.fromkeys(
        (
            "train.load_best_model_at_end",
            "train.early_stopping_patience",
            "train.metric_for_best_model",
            "train.eval_strategy",
        ),
        CHOSEN,
    ),
    "train.eval_steps": CHOSEN | {"train.eval_strategy": "steps", "train.eval_steps": 1},
    **dict.fromkeys(
        ("task.validation_file", "task.validation_split", "task.validation_size", "task.validation_seed"), CHOSEN
    ),
    **dict.fromkeys(("initialise.shards", "initialise.shard", "initialise.engine"), SHARED),
}
"""What a setting needs to be of use, where that is not the plain run."""
OTHERS: dict[str, dict[str, Any]] = {
    "quant.method": {"quant.method": "qlora", "quant.iter": 0},
    "quant.type": {"quant.type": "uniform"},
    "quant.bits": {"quant.bits": 2},
    "quant.allocation": {"quant.allocation": "error"},
    "quant.bits_per_layer": {"quant.bits_per_layer": {"*": 2}},
    "quant.rank_choices": {"quant.rank_choices": [4, 8]},
    "quant.target_modules": {"quant.target_modules": ["q_proj"]},
    "quant.exclude": {"quant.exclude": ["q_proj"]},
    "quant.block_size": {"quant.block_size": 32},
    "quant.alpha": {"quant.alpha": 8.0},
    "model.kind": {"model.kind": "classification"},
    "model.parts": {"model.parts": ["other==1.0"]},
    "train.report_to": {"train.report_to": []},
    "task.kind": {"task.kind": "gsm8k"},
    "task.name": {"task.name": "cnn_dailymail"},
    "task.module": {"task.module": "json"},
    "task.eval_share": {"task.eval_share": 0.5},
    "task.validation_size": {"task.validation_size": 0.5},
    "task.sets": {"task.sets": ["piqa"]},
    "task.include_path": {"task.include_path": "/"},
    "stages": {"stages": ["quantize"]},
    "published": {"published": {"accuracy": 1.0}},
    "train.bf16": {"train.bf16": False},
    "train.eval_strategy": {"train.eval_strategy": "steps", "train.eval_steps": 2},
    "train.early_stopping_patience": {"train.early_stopping_patience": 3},
    "evaluate.max_memory": {"evaluate.device_map": "auto", "evaluate.max_memory": {"cpu": "1GiB"}},
    "train.optim": {"train.optim": "sgd"},
    "train.max_steps": {"train.max_steps": 7},
    "hub.private": {"hub.private": True},
    "hub.repo_id": {"hub.repo_id": "me/other"},
    "save_format": {"save_format": "packed"},
    "device": {"device": "cuda"},
}
"""Another value of a setting, where it is not found by its type."""


def another(name: str, value: Any) -> dict[str, Any]:
    """Another allowed value of the setting `name`."""
    if name in OTHERS:
        return OTHERS[name]
    choices = SETTINGS[name].metadata["choices"]
    if choices:
        return {name: next(choice for choice in choices if choice != value)}
    if isinstance(value, bool):
        return {name: not value}
    if isinstance(value, (int, float)):
        return {
            name: value + 1
            if SETTINGS[name].metadata["lt"] is None or value + 1 < SETTINGS[name].metadata["lt"]
            else value / 2 + 0.25
        }
    return {name: 3 if "int" in str(SETTINGS[name].type) else "other"}


def configured(settings: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "model": {},
        "quant": {},
        "task": {},
        "train": {},
        "hub": {},
        "calibration": {},
        "report": {},
        "evaluate": {},
        "initialise": {},
    }
    base = {
        "model.path": "me/tiny",
        "model.kind": "causal",
        "quant.method": "loftq",
        "quant.rank": 4,
        "task.kind": "arithmetic",
    }
    for name, value in (base | settings).items():
        group, _, last = name.rpartition(".")
        (values[group] if group else values)[last] = value
    return RunConfig.from_mapping(values)


def keys_of(config: RunConfig, source: Source) -> dict[str, str]:
    """The key of each result, from fixed rows and of the others' fixed results."""
    return {INITIALISATION: init_key(source, config), ADAPTER: adapter_key("init", ROWS, config),
            SCORES: scores_key("init", None, ROWS, config)}  # fmt: skip


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_every_setting_says_what_it_shapes() -> None:
    assert list(SETTINGS) == list(dotted_names(RunConfig))
    assert {name for name, field in SETTINGS.items() if not set(field.metadata["shapes"]) <= set(RESULTS)} == set()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_in_the_keys_of_what_it_shapes_and_in_no_other(shared: Place, name: str) -> None:
    folder = shared.first.init_dir if BASES.get(name) == SHELF else shared.model
    source = Source(folder, "model", str(folder), None)
    base = BASES.get(name, {})
    config = configured(base)
    other = configured(base | another(name, value_of(config, name)))
    assert value_of(other, name) != value_of(config, name)
    before, after = keys_of(config, source), keys_of(other, source)
    shaped = {result for result in RESULTS if before[result] != after[result]}
    allowed = set(SETTINGS[name].metadata["shapes"])
    # What another method, kind or task brings with it may shape more.
    assert shaped == allowed or (name in ("quant.method", "task.kind", "model.kind") and shaped >= allowed)


def test_the_order_of_patterns_counts(shared: Place) -> None:
    source = Source(shared.model, "model", "model", None)
    patterns = {"*.mlp.*": 3, "*.layers.0.*": 4, "*": 2}
    one, other = (
        configured({"quant.bits_per_layer": dict(pairs)}) for pairs in (patterns.items(), [*patterns.items()][::-1])
    )
    assert init_key(source, one) != init_key(source, other)


def test_the_seed_shapes_an_initialisation_only_where_something_is_drawn(shared: Place) -> None:
    source = Source(shared.model, "model", "model", None)
    fitted, drawn = {"quant.iter": 1}, {"quant.method": "lora", "quant.type": "none", "quant.bits": 16, "quant.iter": 0}
    for settings, same in ((fitted, True), (drawn, False)):
        keys = {init_key(source, configured(settings | {"seed": seed})) for seed in (11, 12)}
        assert (len(keys) == 1) == same


def test_where_training_rows_lie_names_the_run_and_nothing_else_does(shared: Place) -> None:
    source = Source(shared.model, "model", "model", None)
    for name, field in SETTINGS.items():
        if field.metadata["locates"]:
            base = BASES.get(name, {})
            config = configured(base)
            other = configured(base | another(name, value_of(config, name)))
            moved = identify(other, source).run_dir != identify(config, source).run_dir
            assert moved == (ADAPTER in field.metadata["locates"]), name


def test_where_the_calibration_text_lies_names_the_run_of_a_calibrated_initialisation(
    shared: Place, tmp_path: Path
) -> None:
    source = Source(shared.model, "model", "model", None)
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file in files:
        file.write_text("Two and two are four.")
    for calibration, moved in (("none", False), ("full", True)):
        settings = [{"quant.calibration": calibration, "calibration.file": str(file)} for file in files]
        one, other = (identify(configured(each), source) for each in settings)
        assert one.init_key == other.init_key
        assert (one.run_dir != other.run_dir) == moved


def table() -> str:
    """The table of docs/run.md, from the schema."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, field in SETTINGS.items():
        groups.setdefault(tuple(field.metadata["shapes"]), []).append(f"`{name}`")
    order = [(INITIALISATION,), (INITIALISATION, ADAPTER), (ADAPTER,), (ADAPTER, SCORES), (SCORES,), ()]
    assert set(groups) <= set(order)
    lines = ["| shapes | settings |", "| --- | --- |"]
    lines += [
        f"| {', '.join(key) or 'nothing by itself'} | {', '.join(groups[key])} |" for key in order if key in groups
    ]
    return "\n".join(lines)


def test_the_docs_have_the_schemas_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "run.md").read_text()
    assert table() in page, f"docs/run.md: put this table in place of the one that is there\n{table()}"


def test_a_run_of_a_name_without_its_settings_is_found_by_its_key(place: Place, done: Counter[str]) -> None:
    """Names gained the settings that are not the usual ones. A folder of before keeps its name and is continued."""
    config = place.config()
    assert "-steps1-" in place.first.run_dir.name
    before = place.first.run_dir.with_name(f"{config.plain_label}-{place.first.run_dir.name.rpartition('-')[2]}")
    place.first.run_dir.rename(before)
    again = place.run()
    assert again.run_dir == before
    assert again.scores == place.first.scores
    assert done == {}
