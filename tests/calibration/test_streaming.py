"""Statistics collected block by block equal those of the whole model, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from zoo import FAMILIES, MODELS, seeded

from loftq_exp.calibration import Statistics, collect_statistics, spill
from loftq_exp.calibration.moments import BOUND
from loftq_exp.calibration.spill import Spill
from loftq_exp.calibration.streaming import BlockRunner
from loftq_exp.device import compute_device
from loftq_exp.errors import UserError
from loftq_exp.source.layout import Layout, find_layout
from loftq_exp.source.locate import Source
from loftq_exp.source.tensors import open_tensors

CPU = compute_device("cpu")


def batches_for(model: transformers.PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows, length in ((2, 9), (1, 14), (3, 5)):
        ids = torch.randint(3, 90, (rows, length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            batch["labels"] = torch.randint(3, 90, (rows, length - 2), generator=generator)
        batches.append(batch)
    return batches


def assert_same(found: dict[str, Statistics], expected: dict[str, Statistics], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        two = expected[name]
        assert one.tokens == two.tokens, name
        scale = two.hessian.diagonal().sqrt() if two.hessian.ndim == 2 else None
        bound = two.hessian if scale is None else torch.outer(scale, scale)
        # The activations themselves are computed by other batches' products: a few units in the last place.
        assert bool(((one.hessian - two.hessian).abs() <= factor * BOUND * bound + 1e-12).all()), name


class Place:
    """A saved model of a family, open for a runner."""

    def __init__(self, family: str, folder: Path) -> None:
        self.kind = FAMILIES[family].kind
        self.model = seeded(FAMILIES[family].make).eval()
        self.model.save_pretrained(folder)
        self.source = Source(folder, family, str(folder), None)
        self.batches = batches_for(self.model)

    def layout(self) -> Layout:
        with open_tensors(self.source.folder) as tensors:
            return find_layout(self.source.folder, self.kind, tensors.shapes())


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3", "gpt2"])
def test_streamed_is_whole_in_experts_and_in_conv1d(name: str, tmp_path: Path) -> None:
    """Experts are loaded whole, from one tensor or from those of each expert."""
    model = seeded(MODELS[name]).eval()
    model.save_pretrained(tmp_path)
    batches, source = batches_for(model), Source(tmp_path, name, str(tmp_path), None)
    found: dict[str, Statistics] = {}
    with open_tensors(tmp_path) as tensors:
        layout = find_layout(tmp_path, "causal", tensors.shapes())
        runner = BlockRunner(source, layout, "causal", False, tensors, batches, CPU, Spill(tmp_path))
        for block in runner.blocks:
            with runner.loaded(block):
                found |= runner.collect(block, "full")
    names = [target.module for target in layout.targets]
    assert names
    assert_same(found, collect_statistics(model, batches, modules=names), 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("held", [spill.HELD, 0], ids=["in memory", "in files"])
def test_streamed_is_whole(family: str, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "HELD", held)
    place = Place(family, tmp_path)
    layout = place.layout()
    expected = collect_statistics(place.model, place.batches, modules=[target.module for target in layout.targets])
    found: dict[str, Statistics] = {}
    with open_tensors(tmp_path) as tensors:
        runner = BlockRunner(place.source, layout, place.kind, False, tensors, place.batches, CPU, Spill(tmp_path))
        for block in runner.blocks:
            with runner.loaded(block):
                found |= runner.collect(block, "full")
    assert_same(found, expected, 4)


def test_what_is_held_beyond_the_bound_is_in_files_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "HELD", 100)
    keeper = Spill(tmp_path / "cache")
    small, large = torch.arange(20.0), torch.arange(30, dtype=torch.bfloat16).reshape(5, 6)
    assert keeper.kept(small, "a") is small
    kept, nothing = keeper.kept((large, None), "b")
    assert nothing is None
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, large)
    assert kept.data_ptr() != large.data_ptr()
    assert keeper.kept(small * 2, "a") is not None  # takes the place of the first
    assert keeper.kept(large, "c") is not large
    assert not list((tmp_path / "cache").iterdir())


def test_no_descriptor_is_held_for_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may often have only 1024 open files, and there may be more batches."""
    monkeypatch.setattr(spill, "HELD", 0)
    keeper, before = Spill(tmp_path), len(list(Path("/dev/fd").iterdir()))
    kept = [keeper.kept(torch.full((3,), float(number)), number) for number in range(100)]
    assert len(list(Path("/dev/fd").iterdir())) < before + 10
    assert [float(value[2]) for value in kept] == list(range(100))


def test_no_space_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "HELD", 0)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UserError, match=r"^cache_dir=.*: 4 bytes .* free space there or set another cache_dir$"):
        Spill(blocked / "cache").kept(torch.zeros(1), "a")
