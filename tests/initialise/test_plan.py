"""Which weight gets how many bits and what rank: the rules on bare layouts, and their effect in checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from zoo import FAMILIES, seeded

from loftq_exp.artifact.card import model_card
from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.config.quant import QuantConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.plan import candidates, code_bits, make_plan
from loftq_exp.initialise.stage import initialise
from loftq_exp.loftq import decompose, make_quantizer
from loftq_exp.loftq.allocation import Precision
from loftq_exp.source.layout import AUTO_CLASSES, Layout
from loftq_exp.source.locate import locate
from loftq_exp.source.target import Target
from loftq_exp.storage.bnb4 import bnb4_config

PROJECTIONS = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 128)}


def layout_of(layers: int) -> Layout:
    """Blocks of three projections each, named as llama's."""
    targets = [Target(f"model.layers.{layer}.{kind}", f"model.layers.{layer}.{kind}.weight", shape, f"model.layers.{layer}")
               for layer in range(layers) for kind, shape in PROJECTIONS.items()]  # fmt: skip
    return Layout(tuple(targets), tuple(PROJECTIONS), ("lm_head",), (), (), (), (), False)


def quant(**changes: Any) -> QuantConfig:
    return QuantConfig(**({"method": "loftq", "rank": 8} | changes))


def bits_of_layers(layers: int, **changes: Any) -> list[int]:
    """Bits of each layer, which must be the same for all of its weights."""
    layout = layout_of(layers)
    plan = make_plan(layout, quant(**changes))
    assert list(plan) == [target.module for target in layout.targets]
    found = []
    for block in layout.blocks:
        (bits,) = {plan[target.module].bits for target in layout.targets if target.block == block}
        found.append(bits)
    return found


# The paper's rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "bits", "at_four"), [
    (32, 3, 16), (32, 2.5, 8), (32, 2.25, 4), (40, 3, 20), (40, 2.5, 10), (40, 2.25, 5),  # as published
    (40, 2.3, 6),  # a little less than 6 in binary floating point
    (30, 2.25, 3), (3, 2.5, 0), (32, 2, 0), (32, 4, 32),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["nf", "uniform"])
def test_the_papers_rule_gives_the_first_layers_four_bits(layers: int, bits: float, at_four: int, kind: str) -> None:
    found = bits_of_layers(layers, type=kind, bits=bits, allocation="paper")
    assert found == [4] * at_four + [2] * (layers - at_four)
    if bits != int(bits):
        assert bits_of_layers(layers, type=kind, bits=bits) == found


def test_three_bits_alone_are_the_types_own() -> None:
    assert bits_of_layers(4, bits=3) == [3] * 4
    assert bits_of_layers(4, bits=3.0) == [3] * 4


# Patterns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patterns", "expected"), [
    ({"*": 3}, [3] * 12),
    ({"*.layers.0-1.*": 4, "*": 2}, [4] * 2 + [2] * 10),
    ({"*.layers.9-11.*": 4, "*": 2}, [2] * 9 + [4] * 3),
    ({"model.layers.?.*": 4, "*.layers.1?.*": 3}, [4] * 10 + [3] * 2),
    ({"*.layers.1.*": 2, "*.layers.0-1.*": 4, "*": 3}, [4, 2] + [3] * 10),
    ({"*.0-3.*": 4, "*.4-1000.*": 2}, [4] * 4 + [2] * 8),
])  # fmt: skip
def test_the_first_pattern_that_matches_counts(patterns: dict[str, int], expected: list[int]) -> None:
    assert bits_of_layers(12, bits_per_layer=patterns) == expected


def test_a_pattern_may_name_kinds_and_single_weights() -> None:
    patterns = {"model.layers.1.mlp.down_proj": 4, "*.self_attn.?_proj": 3, "*_proj": 2}
    plan = make_plan(layout_of(2), quant(bits_per_layer=patterns))
    assert [precision.bits for precision in plan.values()] == [3, 3, 2, 3, 3, 4]


@pytest.mark.parametrize(("patterns", "message"), [
    ({"*.layers.0.*": 4}, "quant.bits_per_layer: no pattern matches model.layers.1.self_attn.q_proj; add one that does"),
    ({"*.layers.2-9.*": 4, "*": 2}, "quant.bits_per_layer.*.layers.2-9.*: matches no weight (model.layers.0.self_attn.q_proj is one)"),
    ({"*": 2, "*.layers.0.*": 4}, "quant.bits_per_layer.*.layers.0.*: matches no weight that an earlier pattern does not"),
    ({"lm_head": 4, "*": 2}, "quant.bits_per_layer.lm_head: matches no weight"),
    ({"model.layers.0": 4, "*": 2}, "quant.bits_per_layer.model.layers.0: matches no weight"),
    ({"*.[qk]_proj": 4, "*": 2}, "quant.bits_per_layer.*.[qk]_proj: matches no weight"),  # the bracket is itself
    ({"*.layers.1-0.*": 4, "*": 2}, "quant.bits_per_layer.*.layers.1-0.*: matches no weight"),
    ({"*.layers.0-99999999999.*": 4, "model*": 2}, "quant.bits_per_layer.model*: matches no weight that an earlier"),
])  # fmt: skip
def test_a_pattern_that_fits_no_weight_or_leaves_one_out_is_refused(patterns: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(layout_of(2), quant(bits_per_layer=patterns))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


# The budget -----------------------------------------------------------------------------------------------------------


def made_up_errors(layout: Layout, settings: QuantConfig) -> dict[str, dict[Precision, float]]:
    """Less with each bit and rank, and another one for each weight."""
    return {
        target.module: {
            precision: (1 + math.sin(number)) * 2.0**-precision.bits * 0.9 ** math.sqrt(precision.rank)
            for precision in candidates(target, settings)
        }
        for number, target in enumerate(layout.targets)
    }


@pytest.mark.parametrize("rule", ["error", "error+rank"])
@pytest.mark.parametrize("bits", [2.1, 2.5, 3])
def test_a_budget_is_spent_where_the_errors_sum_to_least(bits: float, rule: str) -> None:
    layout, settings = layout_of(2), quant(bits=bits, allocation=rule, rank_choices=(4, 8) if "rank" in rule else None)
    errors = made_up_errors(layout, settings)
    plan = make_plan(layout, settings, errors)
    values = [math.prod(target.shape) for target in layout.targets]
    edges = [sum(target.shape) for target in layout.targets]

    def cost(choice: tuple[Precision, ...]) -> float:
        return sum(errors[t.module][p] ** 2 for t, p in zip(layout.targets, choice, strict=True))

    def within(choice: tuple[Precision, ...]) -> bool:
        return sum(v * p.bits for v, p in zip(values, choice, strict=True)) <= bits * sum(values) + 1e-6 and sum(
            e * p.rank for e, p in zip(edges, choice, strict=True)
        ) <= settings.rank * sum(edges)

    chosen = tuple(plan.values())
    assert within(chosen)
    every = itertools.product(*(errors[target.module] for target in layout.targets))
    assert cost(chosen) == pytest.approx(min(cost(choice) for choice in every if within(choice)), rel=1e-5)
    assert code_bits(layout, plan) <= bits
    assert len({p.bits for p in chosen}) > 1 or bits == 3


@pytest.mark.parametrize(("kind", "widths"), [("nf", (2, 3, 4)), ("uniform", (2, 3, 4, 5, 6, 7, 8))])
@pytest.mark.parametrize("end", [0, -1])
def test_a_budget_of_the_smallest_or_largest_choice_gives_it_to_all(
    kind: str, widths: tuple[int, ...], end: int
) -> None:
    layout, settings = layout_of(2), quant(type=kind, bits=widths[end], allocation="error")
    plan = make_plan(layout, settings, made_up_errors(layout, settings))
    assert {precision.bits for precision in plan.values()} == {widths[end]}


def test_ranks_to_choose_from() -> None:
    target = layout_of(1).targets[1]  # 32 x 64
    assert quant(rank=32, allocation="error+rank").ranks == (16, 32, 64)
    assert quant(rank=1, allocation="error+rank").ranks == (1, 2)
    assert quant(rank=32, allocation="error+rank", rank_choices=(48, 8)).ranks == (8, 48)
    assert quant(rank=32, allocation="error").ranks == quant(rank=32).ranks == (32,)
    settings = quant(rank=32, allocation="error+rank", bits=3)
    assert {precision.rank for precision in candidates(target, settings)} == {16, 32}  # 64 is more than its rows


# In checkpoints -------------------------------------------------------------------------------------------------------


def made(model: Path, root: Path, kind: str = "causal", save_format: str = "dense", **changes: Any) -> Initialised:
    """The initialised checkpoint of `model` with these settings of `quant`; one cache for all in `root`."""
    values = {
        "model": {"path": str(model), "kind": kind},
        "quant": {"method": "loftq", "rank": 8, "iter": 2} | changes, "task": {"kind": "gsm8k"}, "train": {},
        "stages": ["quantize"], "save_dir": str(root / str(len(list(root.iterdir())))), "cache_dir": str(root / "cache"),
        "device": "cpu", "save_format": save_format,
    }  # fmt: skip
    config = RunConfig.from_mapping(values)
    return initialise(locate(config.model, config.cache_path), config)


def expected_error(model: Path, weight: dict[str, Any], steps: int) -> float:
    """The error at the report's bits and rank, recomputed."""
    value = load_file(model / "model.safetensors")[f"{weight['name']}.weight"]
    quantizer = make_quantizer("nf", weight["bits"], 64, torch.bfloat16)
    return decompose(value, quantizer, weight["rank"], steps).errors[-1]


@torch.no_grad()
def reloaded_errors(init: Initialised, model: Path) -> dict[str, float]:
    """||W - Q - s B A|| / ||W|| of each weight, of the model as PEFT loads it from the folder."""
    backbone = AUTO_CLASSES["causal"].from_pretrained(init.folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(backbone, str(init.folder), subfolder="loftq_init", is_trainable=True)
    weights, errors = load_file(model / "model.safetensors"), {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            product = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            weight = weights[f"{name}.weight"].double()
            left = weight - module.base_layer.weight.double() - module.scaling["default"] * product
            errors[name] = float(left.norm() / weight.norm())
    return errors


@pytest.mark.parametrize("alpha", [None, 4])
def test_bits_and_ranks_of_a_plan_reach_peft_with_one_scaling(
    tiny_llama_dir: Path, tmp_path: Path, alpha: float | None
) -> None:
    init = made(tiny_llama_dir, tmp_path, bits=2.5, allocation="error+rank", alpha=alpha)
    weights = {weight["name"]: weight for weight in init.report["weights"]}
    assert len({weight["rank"] for weight in weights.values()}) > 1, "or this test shows nothing"
    assert len({weight["bits"] for weight in weights.values()}) > 1
    adapter = json.loads((init.folder / "loftq_init" / "adapter_config.json").read_text())
    assert adapter["rank_pattern"] == {name: w["rank"] for name, w in weights.items() if w["rank"] != 8}
    assert adapter["alpha_pattern"] == {name: rank * (alpha or 8) / 8 for name, rank in adapter["rank_pattern"].items()}
    errors = reloaded_errors(init, tiny_llama_dir)
    assert errors.keys() == weights.keys()
    for name, weight in weights.items():
        assert errors[name] == pytest.approx(weight["errors"][-1], rel=1e-4)
        assert weight["errors"][-1] == pytest.approx(expected_error(tiny_llama_dir, weight, 2), rel=1e-6)
    factors = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    uniform = made(tiny_llama_dir, tmp_path)
    largest = load_file(uniform.folder / "loftq_init" / "adapter_model.safetensors")
    assert sum(f.numel() for f in factors.values()) <= sum(f.numel() for f in largest.values())


def test_a_plan_of_ranks_passes_the_plain_check(tiny_llama_dir: Path, tmp_path: Path) -> None:
    check = Path(__file__).parents[3] / "shared" / "checks" / "load_plain.py"
    if not check.is_file():
        pytest.skip(f"the check is not there ({check})")
    init = made(tiny_llama_dir, tmp_path, bits=2.5, allocation="error+rank", rank_choices=(4, 8, 16))
    told = subprocess.run([sys.executable, str(check), str(init.folder)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    adapter_values = init.report["bits_plan"]["adapter_values"]
    assert json.loads(told.stdout.splitlines()[-1])["trainable"] == adapter_values


def test_a_mix_of_two_and_four_bits_stays_exact_in_four_bit_layers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    init = made(tiny_llama_dir, tmp_path, bits_per_layer={"*.layers.0.*": 4, "*": 2})
    assert init.folder.name.endswith("-mixedbit-8rank")
    stored = load_file(init.folder / "model.safetensors")
    four_bit = AUTO_CLASSES["causal"].from_pretrained(init.folder, dtype=torch.bfloat16,
                                                      quantization_config=bnb4_config(["lm_head"], torch.bfloat16))  # fmt: skip
    for weight in init.report["weights"]:
        value = stored[f"{weight['name']}.weight"]
        assert weight["bits"] == (4 if ".layers.0." in weight["name"] else 2)
        assert max(len(block.unique()) for block in value.reshape(-1, 64)) in (
            (3, 4) if weight["bits"] == 2 else range(5, 17)
        )
        layer = four_bit.get_submodule(weight["name"])
        assert isinstance(layer, Linear4bit)
        assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), value)


def test_a_plan_of_bits_and_ranks_is_the_same_model_packed_and_dense(tiny_llama_dir: Path, tmp_path: Path) -> None:
    logits = []
    for save_format in ("dense", "packed"):
        init = made(tiny_llama_dir, tmp_path, save_format=save_format, bits=2.5, allocation="error+rank")
        backbone = AUTO_CLASSES["causal"].from_pretrained(init.folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(backbone, str(init.folder), subfolder="loftq_init")
        with torch.no_grad():
            logits.append(model(torch.arange(3, 23)[None]).logits)
    assert 3 in {weight["bits"] for weight in init.report["weights"]}, "which bitsandbytes' layers could not hold"
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "first"), [
    ("t5", ("encoder.block.0.", "encoder.block.1.", "decoder.block.0.")),
    ("bart", ("model.encoder.layers.0.", "model.encoder.layers.1.", "model.decoder.layers.0.")),
])  # fmt: skip
def test_an_encoders_layers_come_before_a_decoders(model: str, first: tuple[str, ...], tmp_path: Path) -> None:
    seeded(FAMILIES[model].make).save_pretrained(tmp_path / "source")
    init = made(tmp_path / "source", tmp_path, "seq2seq", bits=3.2, iter=1, allocation="paper")  # 3 of 5 layers
    for weight in init.report["weights"]:
        assert weight["bits"] == (4 if weight["name"].startswith(first) else 2)
    totals = init.report["totals"]
    values = {bits: sum(math.prod(w["shape"]) for w in init.report["weights"] if w["bits"] == bits) for bits in (2, 4)}
    mean = (2 * values[2] + 4 * values[4]) / sum(values.values())
    assert init.report["bits_plan"]["code_bits"] == pytest.approx(mean)
    assert totals["bits_per_weight"] == pytest.approx(mean + 16 / 64)


def test_a_budget_finds_what_a_sweep_measured_and_leaves_what_it_measures(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for bits in (2, 3):
        made(tiny_llama_dir, tmp_path, bits=bits)
    entries = tmp_path / "cache" / "decompositions"
    before = set(entries.rglob("*.safetensors"))
    budget = made(tiny_llama_dir, tmp_path, bits=2.5, allocation="error")
    after = set(entries.rglob("*.safetensors"))
    assert len(after) - len(before) == 14, "4 bits were new, the others known"
    assert budget.report["totals"]["computed"] == 0
    paper = made(tiny_llama_dir, tmp_path, bits=2.5)
    assert set(entries.rglob("*.safetensors")) == after
    sums = [sum(weight["errors"][-1] ** 2 for weight in init.report["weights"]) for init in (budget, paper)]
    assert sums[0] < sums[1]
    assert budget.report["bits_plan"]["code_bits"] <= 2.5


def test_the_card_says_what_was_mixed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    init = made(tiny_llama_dir, tmp_path, bits=2.5, allocation="error+rank")
    values = {"model": {"path": str(tiny_llama_dir), "kind": "causal"}, "task": {"kind": "gsm8k"}, "train": {},
              "quant": {"method": "loftq", "rank": 8, "iter": 2, "bits": 2.5, "allocation": "error+rank"}}  # fmt: skip
    card = model_card(init, RunConfig.from_mapping(values), None)
    widths = sorted({weight["bits"] for weight in init.report["weights"]})
    ranks = sorted({weight["rank"] for weight in init.report["weights"]})
    assert f"| bits | {init.report['bits_plan']['code_bits']:.4g} on average: {', '.join(map(str, widths))} (" in card
    assert f"| rank | {', '.join(map(str, ranks))} (in total at most that of rank 8 everywhere) |" in card
    assert "- 2.5-bit\n" in card


def test_a_budget_for_qlora_follows_quantization_alone(tiny_llama_dir: Path, tmp_path: Path) -> None:
    init = made(tiny_llama_dir, tmp_path, method="qlora", iter=0, type="uniform", bits=5, allocation="error")
    assert init.report["bits_plan"]["code_bits"] <= 5
    assert init.report["totals"]["bits_per_weight"] == pytest.approx(
        init.report["bits_plan"]["code_bits"] + 2 * 16 / 64
    )


# From the command -----------------------------------------------------------------------------------------------------


def test_the_plan_is_printed_and_saved(cli: Any) -> None:
    outcome = cli(*cli.tiny, "stages=[quantize]", "quant.bits=2.5", "quant.allocation=error+rank", "save_dir=kept")
    assert outcome.code == 0, outcome
    assert "bits per value by error+rank; weights (and millions of values) by bits, weights by rank:" in outcome.out
    assert "\n  mlp.down_proj" in outcome.out
    (run,) = Path("outputs/runs").iterdir()
    assert "-2.5bit-error+rank-4rank-loftq-iter5-" in run.name
    plan = json.loads((run / "metrics.json").read_text())["bits_plan"]
    report = json.loads((Path("kept") / "tiny-llama0-2.5bit-4rank" / "init_report.json").read_text())
    assert plan == report["bits_plan"]
    for kind, counts in plan["kinds"].items():
        of_kind = [weight for weight in report["weights"] if weight["name"].endswith(f".{kind}")]
        assert len(of_kind) == 2
        for bits in (2, 3, 4):
            assert counts["weights"].get(str(bits), 0) == sum(weight["bits"] == bits for weight in of_kind)
    assert "LoftQ NF2.5 error+rank iter 5" in outcome.out
    again = cli(*cli.tiny, "stages=[evaluate]", "quant.bits=2.5", "quant.allocation=error+rank", "save_dir=kept")
    assert again.code == 0, again
    message = cli.refused(*cli.tiny, "stages=[evaluate]", "quant.bits=2.5", "save_dir=kept")
    assert message.startswith(
        "quant.allocation=None: the checkpoint at kept/tiny-llama0-2.5bit-4rank was made with error+rank"
    )


def test_patterns_on_the_command_line(cli: Any) -> None:
    pattern = "quant.bits_per_layer={*.layers.0-0.*:4,*.mlp.*: 3,*:2}"
    outcome = cli(*cli.tiny, "stages=[quantize]", pattern, "save_dir=kept")
    assert outcome.code == 0, outcome
    assert "LoftQ NF mixed iter 5" in outcome.out
    report = json.loads((Path("kept") / "tiny-llama0-mixedbit-4rank" / "init_report.json").read_text())
    for weight in report["weights"]:
        assert weight["bits"] == (4 if ".layers.0." in weight["name"] else 3 if ".mlp." in weight["name"] else 2)
    other = "quant.bits_per_layer={*.mlp.*:3,*.layers.0-0.*:4,*:2}"  # the same patterns, others first
    assert "was made with {'*.layers.0-0.*': 4" in cli.refused(*cli.tiny, "stages=[evaluate]", other, "save_dir=kept")
    assert cli.refused(*cli.tiny, "stages=[quantize]", "quant.bits_per_layer={*.layers.7.*:4,*:2}").startswith(
        "quant.bits_per_layer.*.layers.7.*: matches no weight "
    )
