"""Each expert's statistics are those of the tokens that the model sends to it, by a record of its products in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.overrides import TorchFunctionMode
from zoo import MODELS, seeded

from loftq_exp.calibration import collect_statistics
from loftq_exp.errors import UserError

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "granite-moe", "deepseek-v3", "qwen3.5-moe")
Batches = Sequence[Mapping[str, torch.Tensor]]


class Products(TorchFunctionMode):
    """Records the left side of every product with one matrix of a parameter (experts, ., .)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.matrices = {
            f"{name}.{expert}": matrix for name, value in stacks(model).items() for expert, matrix in enumerate(value)
        }
        self.inputs: dict[str, list[torch.Tensor]] = {name: [] for name in self.matrices}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__"):
            with torch._C.DisableTorchFunction():
                for name, matrix in self.matrices.items():
                    if args[1].shape == matrix.shape and torch.equal(args[1], matrix):
                        self.inputs[name].append(args[0].detach().clone())
        return function(*args, **(kwargs or {}))


def stacks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.ndim == 3 and ".experts." in name}


def drawn(name: str) -> hf.PreTrainedModel:
    model = seeded(MODELS[name]).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1 and (not bool(parameter.any()) or parameter.std() < 0.05):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1  # routers that tell tokens apart
    for key, value in model.named_parameters():
        if key.endswith("_proj_bias"):
            value.data = torch.randn(value.shape, generator=generator)
    return model


def text(rows: int, length: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 90, (rows, length), generator=generator)} for _ in range(2)]


@torch.no_grad()
def recorded(model: hf.PreTrainedModel, batches: Batches) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The rows that each matrix is multiplied with, and those that reach each module of experts, in float64."""
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")
    layers: dict[str, list[torch.Tensor]] = {}

    def hook(owner: str) -> Callable[..., None]:
        return lambda module, args: layers.setdefault(owner, []).append(args[0].detach().clone())

    for name in stacks(wide):
        owner = name.rpartition(".")[0]
        if not wide.get_submodule(owner)._forward_pre_hooks:
            wide.get_submodule(owner).register_forward_pre_hook(hook(owner))
    products = Products(wide)
    with products:
        for batch in batches:
            wide(**batch)
    inside = {
        key: value.shape[0 if "gpt_oss" in type(wide).__module__ else 1] for key, value in products.matrices.items()
    }
    empty = {key: torch.zeros(0, width, dtype=torch.float64) for key, width in inside.items()}
    rows = {key: torch.cat(some) if some else empty[key] for key, some in products.inputs.items()}
    return rows, {owner: torch.cat(some) for owner, some in layers.items()}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = float(wanted.diagonal().mean() if wanted.ndim == 2 else wanted.mean())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_reads_its_own_tokens(name: str, implementation: str) -> None:
    model, batches = drawn(name), text(8, 40)
    rows, _ = recorded(model, batches)
    model.set_experts_implementation(implementation)
    found = collect_statistics(model, batches, modules=list(rows))
    assert len(rows) >= 8
    assert min(map(len, rows.values())) < max(map(len, rows.values()))
    read = 0
    for key, own in rows.items():
        assert found[key].tokens == len(own), key
        if len(own) >= found[key].hessian.shape[0]:
            close(found[key].hessian, own.T @ own / len(own))
            read += 1
    assert read > len(rows) / 2
    assert set(rows) <= set(collect_statistics(model, batches, "diagonal"))


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_an_expert_with_few_tokens_or_none_is_filled(name: str, kind: str) -> None:
    """Up to as many tokens as inputs: with the layer's mean before the first matrix, with the plain norm before the last."""
    model = drawn(name)
    for batches in (text(1, 1)[:1], text(1, 30)):
        rows, layers = recorded(model, batches)
        found = collect_statistics(model, batches, kind, list(rows))
        counts = {len(own) for own in rows.values()}
        assert (0 in counts) if len(batches) == 1 else max(counts) > 1
        for key, own in rows.items():
            owner, last, _ = key.rsplit(".", 2)
            layer, width = layers[owner], found[key].hessian.shape[0]
            fill = layer.T @ layer / len(layer)
            if last == "down_proj":
                fill = torch.eye(width, dtype=torch.float64) * (own.square().mean() if len(own) else 1)
            missing = max(width - len(own), 0)
            wanted = (own.T @ own + missing * fill) / (len(own) + missing)
            close(found[key].hessian, wanted if kind == "full" else wanted.diagonal())
            assert found[key].tokens == len(own)


def test_padding_is_not_counted() -> None:
    model, (batch, _) = drawn("mixtral"), text(4, 30)
    names = [f"{name}.{expert}" for name in stacks(model) for expert in range(4)]
    names += ["model.layers.1.self_attn.q_proj"]
    mask = torch.ones_like(batch["input_ids"])
    mask[2:, 20:] = 0
    padded = collect_statistics(model, [{**batch, "attention_mask": mask}], modules=names)
    ids = batch["input_ids"]
    whole = collect_statistics(model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:, :20]}], modules=names)
    for key, one in padded.items():
        assert one.tokens == whole[key].tokens
        close(one.hessian, whole[key].hessian.double())


def test_a_name_of_no_expert_is_refused() -> None:
    model = drawn("mixtral")
    for name in (
        "model.layers.0.mlp.experts.down_proj.4",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.gate.0",
    ):
        with pytest.raises(UserError, match=f"modules: {name} is no linear layer of MixtralForCausalLM"):
            collect_statistics(model, text(1, 4), modules=[name])


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = drawn("mixtral")
    model.model.layers[0].mlp.experts.gate_up_proj.data[:] = float("nan")
    with pytest.raises(UserError, match=r"layers.0.mlp.experts.down_proj.\d: its inputs are NaN or infinite"):
        collect_statistics(model, text(1, 4), modules=[f"model.layers.0.mlp.experts.down_proj.{at}" for at in range(4)])
