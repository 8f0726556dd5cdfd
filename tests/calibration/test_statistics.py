"""`collect_statistics`: second moments against a float64 computation, what counts, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from zoo import FAMILIES, llama, seeded

import loftq_exp
from loftq_exp.calibration.moments import BOUND, CHUNK, Statistics
from loftq_exp.calibration.statistics import collect_statistics
from loftq_exp.errors import UserError

Batch = dict[str, torch.Tensor]
QUERY, KEY, DOWN = (f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "mlp.down"))


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return seeded(llama)


class Wide(nn.Module):
    """One linear layer behind the identity, so that its inputs are the batch itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, 3))])

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.layers[0](x)
        return out


def float64_inputs(model: PreTrainedModel, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Every input that counts of each linear layer, (tokens, in), from the model in float64."""
    wide, rows = copy.deepcopy(model).double(), {}
    for name, module in wide.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(args[0]))
    counted = []
    with torch.no_grad():
        for batch in batches:
            wide(**batch)
            counted.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool())
    return {name: torch.cat([x[mask] for x, mask in zip(found, counted, strict=True)]) for name, found in rows.items()}


def assert_within(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Each value differs by at most `bound` sqrt(h_ii h_jj)."""
    diagonal = expected if expected.ndim == 1 else expected.diagonal()
    scale = expected if expected.ndim == 1 else torch.outer(diagonal.sqrt(), diagonal.sqrt())
    assert bool(((found.double() - expected.double()).abs() <= bound * scale.double()).all())


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def padded(side: str) -> list[Batch]:
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, left in enumerate((0, 5, 11)):
        mask[row, slice(0, left) if side == "left" else slice(12 - left, 12)] = 0
    return [{"input_ids": ids, "attention_mask": mask}, {"input_ids": random_ids(1, 20, 1)}]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_they_are_those_of_float64_and_padding_does_not_count(model: PreTrainedModel, kind: str, side: str) -> None:
    batches = padded(side)
    found = loftq_exp.collect_statistics(model, batches, kind=kind)
    inputs = float64_inputs(model, batches)
    assert list(found) == list(inputs)
    assert len(found) == 14
    for name, x in inputs.items():
        expected = x.T @ x / len(x)
        assert found[name].tokens == len(x) == 12 + 7 + 1 + 20
        assert found[name].hessian.dtype == torch.float32
        # The model's own float32 activations differ too: its depth times a few units in the last place.
        assert_within(found[name].hessian, expected if kind == "full" else expected.diagonal(), 5 * BOUND)
        assert torch.equal(found[name].hessian, found[name].hessian.T if kind == "full" else found[name].hessian)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_batches_and_threads_change_it_within_the_bound(kind: str) -> None:
    width, rows = 48, 3 * CHUNK + 77
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, width) + 0.5
    model = Wide(width)
    expected = x.double().T @ x.double() / rows
    expected = expected if kind == "full" else expected.diagonal()
    found = []
    for number, sizes in ((1, rows), (2, rows), (1, 501), (2, CHUNK)):
        with threads(number):
            batches = [{"x": part[None]} for part in x.split(sizes)]
            found.append(collect_statistics(model, batches, kind=kind)["layers.0.0"].hessian)
        assert_within(found[-1], expected, BOUND / 2)
    for one in found[1:]:
        assert_within(one, found[0], BOUND)


def test_padding_of_any_length_gives_the_same_as_none() -> None:
    x, model = torch.randn(1, 9, 8), Wide(8)
    whole = collect_statistics(model, [{"x": x}])["layers.0.0"]
    mask = torch.tensor([[1] * 9 + [0] * 4])
    longer = torch.cat([x, torch.full((1, 4, 8), torch.nan)], dim=1)
    found = collect_statistics(model, [{"x": longer, "attention_mask": mask}])["layers.0.0"]
    assert torch.equal(found.hessian, whole.hessian)
    assert found.tokens == 9


def test_layers_that_read_one_tensor_share_its_statistics(model: PreTrainedModel) -> None:
    found = collect_statistics(model, padded("right"))
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert found[attention[0]].hessian is found[attention[1]].hessian is found[attention[2]].hessian
    assert found[attention[0]].digest == found[attention[1]].digest != found[attention[3]].digest
    assert found["model.layers.1.mlp.gate_proj"] is found["model.layers.1.mlp.up_proj"]
    assert len({id(one.hessian) for one in found.values()}) == 2 * 4


def test_named_modules_alone_are_collected(model: PreTrainedModel) -> None:
    whole = collect_statistics(model, padded("right"))
    found = collect_statistics(model, padded("right"), modules=[DOWN, KEY])
    assert list(found) == [DOWN, KEY]
    assert all(torch.equal(found[name].hessian, whole[name].hessian) for name in found)
    head = collect_statistics(model, padded("right"), modules=["lm_head"])
    assert head["lm_head"].hessian.shape == (64, 64)


def test_cross_attention_reads_the_encoders_text() -> None:
    model = seeded(FAMILIES["t5"].make)
    batch = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9), "labels": random_ids(2, 5, 1)}
    found = collect_statistics(model, [batch])
    tokens = {name: one.tokens for name, one in found.items()}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == 18
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == 18
    assert tokens["decoder.block.0.layer.1.EncDecAttention.q"] == 10


class Relative(nn.Module):
    """As deberta: q and k read a table of positions too, v the text alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkv"})])
        self.positions = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> None:
        for table, names in ((x, "qkv"), (self.positions, "kq")):
            for name in names:
                self.layers[0][name](table)  # type: ignore[index]


def test_a_layer_that_reads_two_tensors_has_the_mean_of_both() -> None:
    model = Relative()
    texts = [torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (7, 4)]
    found = collect_statistics(model, [{"x": x} for x in texts])
    text = torch.cat([x[0] for x in texts])
    both = torch.cat([text, model.positions.detach(), model.positions.detach()])
    for name, rows in (("q", both), ("k", both), ("v", text)):
        one = found[f"layers.0.{name}"]
        assert one.tokens == len(rows)
        assert_within(one.hessian, rows.double().T @ rows.double() / len(rows), BOUND)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_has_its_own_inputs(family: str) -> None:
    """Against hooks that keep every input of every layer."""
    model, rows = seeded(FAMILIES[family].make), {}
    batch = {"input_ids": random_ids(2, 11)} | (
        {"labels": random_ids(2, 7)} if FAMILIES[family].kind == "seq2seq" else {}
    )
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    found = collect_statistics(model, [batch])
    assert len(found) == FAMILIES[family].linears
    for name, one in found.items():
        x = torch.cat(rows[name]).double()
        assert one.tokens == len(x)
        assert_within(one.hessian, x.T @ x / len(x), BOUND)


def test_training_mode_hooks_and_parameters_are_as_before(model: PreTrainedModel) -> None:
    modules = dict(model.named_modules())
    modules["model.layers.1.mlp"].train()
    before = {name: module.training for name, module in modules.items()}
    values = {name: value.clone() for name, value in model.named_parameters()}
    try:
        collect_statistics(model, padded("right"))
        with pytest.raises(RuntimeError, match="in the middle"):
            collect_statistics(model, failing())
        assert {name: module.training for name, module in modules.items()} == before
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules.values())
        assert all(torch.equal(value, values[name]) for name, value in model.named_parameters())
        assert all(value.grad is None and value.requires_grad for value in model.parameters())
    finally:
        model.eval()


def failing() -> Iterator[Batch]:
    yield from padded("right")
    raise RuntimeError("in the middle")


def test_dropout_does_not_act() -> None:
    model = seeded(lambda: llama(attention_dropout=0.5)).train()
    one, two = (collect_statistics(model, padded("right"))[DOWN].hessian for _ in range(2))
    assert torch.equal(one, two)


def test_the_digest_is_of_values_shape_and_tokens() -> None:
    values = torch.arange(4.0)
    found = {Statistics(values, 3).digest, Statistics(values, 4).digest, Statistics(values.reshape(2, 2), 3).digest,
             Statistics(values + 1, 3).digest}  # fmt: skip
    assert len(found) == 4
    assert Statistics(values.clone(), 3).digest in found


def twice_shared(model: PreTrainedModel) -> Any:
    """q and k share their input in the first batch alone."""
    layer = model.model.layers[0].self_attn

    def batches() -> Iterator[Batch]:
        yield {"input_ids": random_ids(1, 4)}
        layer.q_proj.register_forward_pre_hook(lambda module, args: (args[0].clone(),), prepend=True)
        yield {"input_ids": random_ids(1, 4)}

    return batches()


IDS = {"input_ids": random_ids(2, 6)}
LABELLED = {**IDS, "labels": random_ids(2, 6)}
HALF = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
REFUSED: dict[str, tuple[str, Callable[[], dict[str, Statistics]]]] = {
    "no text": (r"^data: there is no batch; ", lambda: collect_statistics(llama(), [])),
    "nothing but padding": (
        r"^model\.layers\.0\.self_attn\.q_proj: .* it has read no token that counts; ",
        lambda: collect_statistics(llama(), [{**IDS, "attention_mask": torch.zeros(2, 6)}]),
    ),
    "no such module": (
        r"^modules: model\.q is no linear layer of LlamaForCausalLM; ",
        lambda: collect_statistics(llama(), [IDS], modules=["model.q"]),
    ),
    "no linear layer": (
        r"^modules: model\.norm is no linear layer of LlamaForCausalLM; ",
        lambda: collect_statistics(llama(), [IDS], modules=["model.norm"]),
    ),
    "no blocks": (r"^Linear: has no linear layer in a block; ", lambda: collect_statistics(nn.Linear(2, 2), [])),
    "never called": (
        r"^lm_head: has read no calibration text \(1 such layers\); ",
        lambda: collect_statistics(BodyAlone(), [IDS], modules=[DOWN, "lm_head"]),
    ),
    "kind": (r"^kind=some: unknown; choose full or diagonal$", lambda: collect_statistics(llama(), [IDS], kind="some")),
    "not finite": (
        r"^layers\.0\.0: its inputs are NaN or infinite ",
        lambda: collect_statistics(Wide(4), [{"x": torch.full((1, 3, 4), torch.nan)}]),
    ),
    "too large": (
        r"^layers\.0\.0: the squares of its inputs are too large ",
        lambda: collect_statistics(Wide(4), [{"x": torch.full((1, 3, 4), 1e25)}]),
    ),
    "shared once": (
        r"k_proj: shares its input with different layers in different batches; ",
        lambda: collect_statistics(model := llama(), twice_shared(model)),
    ),
    "unknown padding": (
        r"^layers\.0\.0: inputs of shape \(2, 3, 4\) and a mask of \(2, 6\) with padding: ",
        lambda: collect_statistics(Wide(4), [{"x": torch.ones(2, 3, 4), "attention_mask": HALF}]),
    ),
    **{
        f"padded encoder-decoder: {name}": (
            r"^data: a batch has padding, and an encoder-decoder's layers read two texts; ",
            lambda more=more: collect_statistics(FAMILIES["bart"].make(), [{**LABELLED, **more}]),
        )
        for name, more in {
            "text": {"attention_mask": HALF},
            "target": {"decoder_attention_mask": HALF},
            "labels": {"labels": torch.where(HALF == 0, -100, LABELLED["labels"])},
        }.items()
    },
}


class BodyAlone(nn.Module):
    """A llama whose head is never called."""

    def __init__(self) -> None:
        super().__init__()
        whole = llama()
        self.model, self.lm_head = whole.model, whole.lm_head

    def forward(self, input_ids: torch.Tensor) -> None:
        self.model(input_ids)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_collected_is_refused_in_one_line(case: str) -> None:
    message, call = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


def test_inputs_are_counted_in_any_type_and_shape() -> None:
    x = torch.randn(2, 3, 5, 8)
    model = Wide(8).to(torch.bfloat16)
    found = collect_statistics(model, [{"x": x.to(torch.bfloat16)}])["layers.0.0"]
    rows = x.to(torch.bfloat16).double().reshape(-1, 8)
    assert found.tokens == 30
    assert_within(found.hessian, rows.T @ rows / 30, BOUND)
