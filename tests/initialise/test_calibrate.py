"""Calibrated initialisation: what is collected and when, that its errors are true, and that every kind of model is served."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from zoo import FAMILIES, seeded, with_tokenizer

import loftq_exp
from loftq_exp import pipeline
from loftq_exp.artifact.folder import Initialised
from loftq_exp.calibration.cache import StatisticsCache
from loftq_exp.calibration.moments import BOUND, Statistics
from loftq_exp.calibration.samples import batches_of, calibration_samples
from loftq_exp.calibration.statistics import collect_statistics
from loftq_exp.calibration.streaming import BlockRunner
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise import stage
from loftq_exp.initialise.stage import initialise
from loftq_exp.loftq import metric_of
from loftq_exp.source.locate import Source, locate

TEXT = "".join(f"{n} apples and {n} plums are {2 * n} fruits.\n" for n in range(200))
FULL = {"quant.calibration": "full"}


def settings(model: Path, root: Path, changes: dict[str, Any]) -> RunConfig:
    """NF2 of rank 8 in 2 steps into {root}/out with the cache {root}/cache, on some text, but for the dotted `changes`."""
    text = root / "text.txt"
    text.write_text(TEXT)
    values: dict[str, Any] = {
        "model": {"path": str(model), "kind": "causal"}, "task": {"kind": "gsm8k"}, "train": {}, "stages": ["quantize"],
        "quant": {"method": "loftq", "bits": 2, "rank": 8, "iter": 2}, "device": "cpu", "save_dtype": "float32",
        "calibration": {"file": str(text), "samples": 8, "length": 32},
        "output_dir": str(root / "out"), "cache_dir": str(root / "cache"),
    }  # fmt: skip
    for name, value in changes.items():
        group, _, key = name.rpartition(".")
        (values[group] if group else values)[key] = value
    return RunConfig.from_mapping(values)


class Place:
    """A model, and the initialisations made of it under one cache."""

    def __init__(self, model: Path, root: Path) -> None:
        self.model, self.root = model, root

    def config(self, changes: dict[str, Any] | None = None) -> RunConfig:
        return settings(self.model, self.root, FULL | (changes or {}))

    def make(self, changes: dict[str, Any] | None = None) -> Initialised:
        config = self.config(changes)
        return initialise(locate(config.model, config.cache_path), config)

    def batches(self, changes: dict[str, Any] | None = None) -> list[dict[str, torch.Tensor]]:
        return batches_of(calibration_samples(Source(self.model, "tiny", str(self.model), None), self.config(changes)))

    def statistics(self, kind: str = "full") -> dict[str, Statistics]:
        """Of the whole model in memory."""
        return collect_statistics(hf.AutoModelForCausalLM.from_pretrained(self.model), self.batches(), kind)


@pytest.fixture(scope="module")
def shared(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place whose initialisations and statistics all tests of this module share."""
    return Place(tiny_llama_dir, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(tiny_llama_dir: Path, tmp_path: Path) -> Place:
    return Place(tiny_llama_dir, tmp_path)


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that were collected, in order."""
    blocks: list[str] = []
    collect = BlockRunner.collect

    def counted(self: BlockRunner, block: str, *args: Any, **options: Any) -> dict[str, Statistics]:
        blocks.append(block)
        return collect(self, block, *args, **options)

    monkeypatch.setattr(BlockRunner, "collect", counted)
    return blocks


BLOCKS = ["model.layers.0", "model.layers.1"]


def parts(init: Initialised, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and s B A of a module from the files, float64."""
    backbone = {
        name: value for file in init.folder.glob("model*.safetensors") for name, value in load_file(file).items()
    }
    config = json.loads((init.folder / "loftq_init" / "adapter_config.json").read_text())
    factors = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    lora_A, lora_B = (factors[f"base_model.model.{module}.lora_{one}.weight"].double() for one in "AB")
    rank = config.get("rank_pattern", {}).get(module, config["r"])
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    return backbone[f"{module}.weight"].double(), alpha / rank * lora_B @ lora_A


def relative(error: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """The error of the layer's outputs in the damped norm, in float64."""
    wide = hessian.double()
    h = wide if wide.ndim == 2 else torch.diag(wide)
    h = h / h.diagonal().mean() + 0.01 * torch.eye(len(h), dtype=torch.float64)
    return math.sqrt(float(torch.trace(error @ h @ error.T) / torch.trace(weight @ h @ weight.T)))


def raw(init: Initialised) -> dict[str, bytes]:
    return {
        str(path.relative_to(init.folder)): path.read_bytes() for path in sorted(init.folder.rglob("*.safetensors"))
    }


# What is written ------------------------------------------------------------------------------------------------------


REPORTED: dict[str, dict[str, Any]] = {
    "nf": {},
    "diagonal": {"quant.calibration": "diagonal"},
    "optimal": {"quant.scale": "search", "quant.levels": "optimal"},
    "alpha": {"quant.alpha": 16},
    "gptq": {"quant.rounding": "gptq"},
    "qlora": {"quant.method": "qlora", "quant.iter": 0, "quant.scale": "search", "quant.calibration": "diagonal"},
}


@pytest.mark.parametrize("case", REPORTED)
def test_reported_output_errors_are_those_of_the_written_checkpoint(shared: Place, case: str) -> None:
    init = shared.make(REPORTED[case])
    kind = init.report["quant"]["calibration"]
    weights, statistics = load_file(shared.model / "model.safetensors"), shared.statistics(kind)
    assert len(init.report["weights"]) == 14
    for entry in init.report["weights"]:
        weight, hessian = weights[f"{entry['name']}.weight"].double(), statistics[entry["name"]].hessian
        backbone, product = parts(init, entry["name"])
        kept = entry["kept_step"]
        assert relative(weight - backbone - product, weight, hessian) == pytest.approx(
            entry["output_errors"][kept], rel=1e-3
        )
        assert float((weight - backbone - product).norm() / weight.norm()) == pytest.approx(
            entry["errors"][kept], rel=1e-3
        )
        assert len(entry["errors"]) == len(entry["output_errors"]) == init.report["quant"]["iter"] + 1
        assert min(entry["output_errors"]) == entry["output_errors"][kept]
    totals, entries = init.report["totals"], init.report["weights"]
    mean = sum(entry["output_errors"][entry["kept_step"]] for entry in entries) / len(entries)
    assert totals["mean_output_error"] == pytest.approx(mean)


def test_outputs_are_closer_than_without_calibration(shared: Place) -> None:
    statistics, weights = shared.statistics(), load_file(shared.model / "model.safetensors")
    totals = Counter[str]()
    for name in ("none", "diagonal", "full"):
        init = shared.make({"quant.calibration": name})
        for module, one in statistics.items():
            weight = weights[f"{module}.weight"].double()
            totals[name] += relative(weight - sum(parts(init, module)), weight, one.hessian)  # type: ignore[assignment]
    assert totals["full"] < totals["diagonal"] < totals["none"]


def test_without_calibration_no_text_is_read_and_nothing_says_so(shared: Place, collected: list[str]) -> None:
    init = shared.make({"quant.calibration": "none", "calibration.file": "/no/where.txt"})
    assert collected == []
    assert "text" not in init.report["made_from"]
    assert not any(name.startswith("calibration.") for name in init.report["made_from"]["settings"])
    assert init.report["weights"][0]["output_errors"] == []
    assert "mean_output_error" not in init.report["totals"]


@pytest.mark.parametrize(("bits", "save_format"), [(2, "dense"), (3, "dense"), (4, "dense"), (2, "bnb4")])
def test_optimal_levels_reload_exactly_through_bitsandbytes(shared: Place, bits: int, save_format: str) -> None:
    changes = {"quant.levels": "optimal", "quant.scale": "search", "quant.bits": bits, "save_dtype": "bfloat16"}
    init = shared.make({**changes, "save_format": save_format})
    dense = shared.make(changes)
    expected = load_file(dense.folder / "model.safetensors")
    quantization = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    options = {} if save_format == "bnb4" else {"quantization_config": quantization}
    model = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.bfloat16, device_map="cpu", **options)
    for entry in init.report["weights"]:
        weight = model.get_submodule(entry["name"]).weight
        values = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(values, expected[f"{entry['name']}.weight"]), entry["name"]


@pytest.mark.parametrize("save_format", ["packed", "bnb4"])
def test_formats_hold_the_same_initialisation(shared: Place, save_format: str) -> None:
    changes = {"quant.levels": "optimal", "quant.scale": "search"}
    dense, init = shared.make(changes), shared.make({**changes, "save_format": save_format})
    assert init.report["totals"]["computed"] == 0
    adapter = "loftq_init/adapter_model.safetensors"
    assert raw(init)[adapter] == raw(dense)[adapter]
    if save_format == "packed":  # bitsandbytes computes in bfloat16; its values are compared above
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            one, other = (hf.AutoModelForCausalLM.from_pretrained(each.folder, dtype=torch.float32)(ids).logits
                          for each in (dense, init))  # fmt: skip
        assert torch.allclose(one, other, atol=1e-4)


def test_an_allocation_by_error_minimises_the_calibrated_error(shared: Place) -> None:
    """No exchange of the bits of two weights of one size lowers the sum of the squared output errors."""
    budget = {"quant.allocation": "error", "quant.bits": 2.5, "quant.iter": 1}
    entries = shared.make(budget).report["weights"]
    errors: dict[str, dict[int, float]] = {entry["name"]: {} for entry in entries}
    for width in (2, 3, 4):
        for entry in shared.make({"quant.bits": width, "quant.iter": 1}).report["weights"]:
            errors[entry["name"]][width] = entry["output_errors"][entry["kept_step"]] ** 2
    bits = {entry["name"]: entry["bits"] for entry in entries}
    assert len({*bits.values()}) > 1
    for entry in entries:
        assert entry["output_errors"][entry["kept_step"]] ** 2 == errors[entry["name"]][entry["bits"]]
        for other in entries:
            one, two = entry["name"], other["name"]
            if math.prod(entry["shape"]) == math.prod(other["shape"]):
                now = errors[one][bits[one]] + errors[two][bits[two]]
                assert now <= errors[one][bits[two]] + errors[two][bits[one]] + 1e-6
    plain = shared.make(budget | {"quant.calibration": "none"}).report["weights"]
    assert sum(errors[name][width] for name, width in bits.items()) <= sum(errors[e["name"]][e["bits"]] for e in plain)


def test_the_first_initialised_outputs_pass_through_the_model(shared: Place) -> None:
    """Calibrated NF2 of the tiny model is nearer to the model than LoftQ's on the text it was calibrated on."""

    def distance(changes: dict[str, Any]) -> float:
        init = shared.make(changes)
        model = peft.PeftModel.from_pretrained(
            hf.AutoModelForCausalLM.from_pretrained(init.folder), init.folder / "loftq_init"
        )
        with torch.no_grad():
            found = [model(**batch).logits - whole(**batch).logits for batch in shared.batches()]
        return float(torch.cat([one.flatten() for one in found]).norm())

    whole = hf.AutoModelForCausalLM.from_pretrained(shared.model)
    assert distance({}) < distance({"quant.calibration": "none"})


# What is collected, and when ------------------------------------------------------------------------------------------


def test_a_sweep_over_bits_ranks_and_steps_collects_once(
    place: Place, collected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sweep: list[dict[str, Any]] = [
        {}, {"quant.bits": 4}, {"quant.rank": 4}, {"quant.iter": 3}, {"quant.scale": "search"}, {"quant.rounding": "gptq"},
    ]  # fmt: skip
    folders = {place.make(changes).folder for changes in sweep}
    assert len(folders) == len(sweep)
    assert collected == BLOCKS
    lines = [line for line in caplog.messages if line.startswith("calibrate: ")]
    assert re.fullmatch(r"calibrate: 8 samples, 256 tokens, \d+\.\d s", lines[0])
    assert lines[1:] == ["calibrate: 256 tokens, from the cache"] * 5
    found = {entry["name"]: entry["output_errors"] for entry in place.make({"quant.iter": 3}).report["weights"]}
    for entry in place.make().report["weights"]:
        assert found[entry["name"]][:3] == pytest.approx(entry["output_errors"])


def test_another_text_count_length_seed_kind_or_model_collects_again(
    place: Place, collected: list[str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    place.make()
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("plums", "pears"))
    model = hf.AutoModelForCausalLM.from_pretrained(place.model)
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "changed")
    tiny_tokenizer.save_pretrained(tmp_path / "changed")
    changes: list[dict[str, Any]] = [
        {"calibration.file": str(other)}, {"calibration.samples": 7}, {"calibration.length": 31}, {"calibration.seed": 1},
        {"quant.calibration": "diagonal"}, {"model.path": str(tmp_path / "changed")},
    ]  # fmt: skip
    for change in changes:
        del collected[:]
        place.make(change)
        assert collected == BLOCKS, change
    same = tmp_path / "same.txt"
    same.write_text(TEXT)
    del collected[:]
    first, again = place.make(), place.make({"calibration.file": str(same)})
    assert (collected, again.folder) == ([], first.folder), "content counts, and not where it lies"


def test_damaged_statistics_are_collected_again(
    place: Place, collected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = place.make()
    for path in StatisticsCache(place.root / "cache").entries():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    again = place.make({"save_dir": str(place.root / "again")})
    assert collected == BLOCKS * 2
    assert "deleted, to be collected again" in caplog.text
    assert raw(again) == raw(first)


def test_sequential_order_calibrates_on_the_initialised_prefix(place: Place, collected: list[str]) -> None:
    changes = {"quant.order": "sequential"}
    init = place.make(changes)
    assert collected == BLOCKS
    model = hf.AutoModelForCausalLM.from_pretrained(place.model)
    for entry in init.report["weights"]:
        if entry["name"].startswith(BLOCKS[0]):
            model.get_submodule(entry["name"]).weight.data.copy_(sum(parts(init, entry["name"])))
    parallel, replaced = place.statistics(), collect_statistics(model, place.batches())
    expected = {name: (parallel if name.startswith(BLOCKS[0]) else replaced)[name] for name in parallel}
    found = {}
    for path in StatisticsCache(place.root / "cache").entries():
        stored = StatisticsCache(place.root / "cache").find(path.stem)
        assert stored is not None
        found |= {name: stored.read(name) for name in stored.tensors}
    assert found.keys() == expected.keys()
    for name, one in found.items():
        scale = expected[name].hessian.diagonal().sqrt()
        assert bool(((one.hessian - expected[name].hessian).abs() <= 8 * BOUND * torch.outer(scale, scale)).all()), name
    last = f"{BLOCKS[1]}.mlp.down_proj"
    assert not torch.allclose(parallel[last].hessian, found[last].hessian, rtol=0.01)
    del collected[:]
    again = place.make({**changes, "save_dir": str(place.root / "again")})
    assert collected == []
    assert raw(again) == raw(init)
    place.make({**changes, "quant.bits": 4})
    assert collected == BLOCKS, "another prefix"


def test_sequential_order_with_an_allocation(place: Place) -> None:
    init = place.make({"quant.order": "sequential", "quant.allocation": "error", "quant.bits": 2.5, "quant.iter": 1})
    assert len({entry["bits"] for entry in init.report["weights"]}) > 1
    assert all(entry["output_errors"] for entry in init.report["weights"])


@pytest.mark.parametrize("at", ["while collecting", "while decomposing"])
def test_a_killed_run_goes_on_where_it_was(
    place: Place, collected: list[str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    whole = Place(place.model, place.root / "whole")
    whole.root.mkdir()
    expected = raw(whole.make())
    del collected[:]
    calls = iter(range(100))

    def killed(real: Any, after: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls) == after:
                raise KeyboardInterrupt
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        if at == "while collecting":
            patch.setattr(StatisticsCache, "put", killed(StatisticsCache.put, 1))
        else:
            patch.setattr(stage, "weight_digest", killed(stage.weight_digest, 5))
        with pytest.raises(KeyboardInterrupt):
            place.make()
    done = len(collected)
    init = place.make()
    assert collected[done:] == ([BLOCKS[1]] if at == "while collecting" else [])
    assert raw(init) == expected
    if at == "while decomposing":
        assert init.report["totals"]["cache_hits"] >= 4


# Other models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "order"),
    [("bert", "parallel"), ("deberta v3", "sequential"), ("bart", "sequential"), ("t5", "parallel")],
)
def test_encoders_and_encoder_decoders(
    family: str, order: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def model() -> hf.PreTrainedModel:
        config = FAMILIES[family].make().config
        config.vocab_size = len(tiny_tokenizer)
        return seeded(lambda: type(FAMILIES[family].make())(config))

    kind = FAMILIES[family].kind
    place = Place(with_tokenizer(model, tiny_tokenizer, tmp_path / "model"), tmp_path)
    task = {"kind": "summarization", "name": "xsum"} if kind == "seq2seq" else {"kind": "glue", "name": "rte"}
    init = place.make({"model.kind": kind, "task": task, "quant.order": order, "calibration.length": 24})
    entries = init.report["weights"]
    assert len(entries) == FAMILIES[family].linears
    for entry in entries:
        assert entry["output_errors"][entry["kept_step"]] < entry["output_errors"][0]
    adapter = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in adapter.values())


# The whole run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(tmp_path: Path, tiny_llama_dir: Path) -> list[str]:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 9)]
    for split in ("train", "eval"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "model=llama-2", f"model.path={tiny_llama_dir}", "task=gsm8k", f"task.train_file={tmp_path}/train.jsonl",
        f"task.eval_file={tmp_path}/eval.jsonl", "task.max_target_length=4", "quant.rank=4", "quant.bits=2",
        "quant.iter=1", "quant.calibration=full", "train.max_steps=1", "train.warmup_ratio=0",
        f"output_dir={tmp_path}/out", f"cache_dir={tmp_path}/cache",
    ]  # fmt: skip


def test_a_finetune_alone_finds_the_calibrated_initialisation(
    quick: list[str], collected: list[str], tmp_path: Path
) -> None:
    first = loftq_exp.run(loftq_exp.compose([*quick, "stages=[quantize]"]))
    assert collected == BLOCKS
    found = loftq_exp.run(loftq_exp.compose([*quick, "stages=[finetune]"]))
    assert found.init_dir == first.init_dir
    with pytest.raises(UserError, match="there is no initialised checkpoint at"):
        loftq_exp.run(loftq_exp.compose([*quick, "stages=[finetune]", "calibration.samples=5"]))
    assert collected == BLOCKS


def test_a_missing_text_is_refused_before_a_model_is_fetched(monkeypatch: pytest.MonkeyPatch, quick: list[str]) -> None:
    monkeypatch.setattr(pipeline, "source_of", lambda config: pytest.fail("the model was fetched"))
    with pytest.raises(UserError, match=r"^calibration\.file=/absent\.txt: there is no such file"):
        loftq_exp.run(loftq_exp.compose([*quick, "calibration.file=/absent.txt"]))


def test_few_tokens_are_warned_of_and_no_second_moment_is_none(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    init = place.make({"calibration.samples": 1, "calibration.length": 8})
    assert (
        "calibrate: 8 tokens are fewer than the 128 inputs of the widest layer, so that its statistics are rough; "
        in caplog.text
    )
    assert all(math.isfinite(error) for entry in init.report["weights"] for error in entry["output_errors"])
    assert metric_of(place.statistics()[f"{BLOCKS[0]}.mlp.down_proj"].hessian).full
