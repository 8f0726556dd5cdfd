"""The cache answers by content, keeps every byte, finds damage, and is safe to share."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.config.quant import BITS_OF_TYPE
from loftq_exp.errors import UserError
from loftq_exp.initialise import decomposition_cache as module
from loftq_exp.initialise.decomposition_cache import (
    DamagedEntry,
    DecompositionCache,
    Recipe,
    describe_entry,
    read_entry,
    weight_digest,
)
from loftq_exp.loftq import Decomposition, Quantizer, decompose, make_quantizer

RECIPE = Recipe(make_quantizer("nf", 4, 64, torch.bfloat16), rank=4, steps=2, solver="randomized")
QUANTIZERS = [
    make_quantizer(type, bits, 64, dtype)
    for type, widths in BITS_OF_TYPE.items()
    if type != "none"
    for bits in widths
    for dtype in (torch.bfloat16, torch.float32)
]


def a_weight(rows: int = 32, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def computed(weight: torch.Tensor, recipe: Recipe = RECIPE, start: Decomposition | None = None) -> Decomposition:
    return decompose(weight, recipe.quantizer, recipe.rank, recipe.steps, recipe.solver, start=start)


def identical(one: Decomposition, other: Decomposition) -> bool:
    """Equal to the last bit."""
    return (
        all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one.quantized, other.quantized, strict=True))
        and all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in ((one.lora_A, other.lora_A), (one.lora_B, other.lora_B)))
        and (one.errors, one.norm) == (other.errors, other.norm)
    )  # fmt: skip


def name(quantizer: Quantizer) -> str:
    return f"{quantizer.type}-{quantizer.bits}-{str(quantizer.scale_dtype).removeprefix('torch.')}"


# Keys


def test_each_setting_that_shapes_a_result_shapes_the_key() -> None:
    digest = weight_digest(a_weight())
    nf4 = RECIPE.quantizer
    others = {
        "rank": dataclasses.replace(RECIPE, rank=5),
        "steps": dataclasses.replace(RECIPE, steps=3),
        "no steps": dataclasses.replace(RECIPE, steps=0),
        "solver": dataclasses.replace(RECIPE, solver="exact"),
        "bits": dataclasses.replace(RECIPE, quantizer=make_quantizer("nf", 2, 64, torch.bfloat16)),
        "block size": dataclasses.replace(RECIPE, quantizer=dataclasses.replace(nf4, block_size=32)),
        "type": dataclasses.replace(RECIPE, quantizer=make_quantizer("uniform", 4, 64, torch.bfloat16)),
        "save_dtype": dataclasses.replace(RECIPE, quantizer=make_quantizer("nf", 4, 64, torch.float32)),
    }
    keys = {"itself": RECIPE.key(digest)} | {what: recipe.key(digest) for what, recipe in others.items()}
    assert len(set(keys.values())) == len(keys)
    assert dataclasses.replace(RECIPE, steps=3).key(digest) == keys["steps"]


def test_every_quantizer_has_its_own_key() -> None:
    keys = {dataclasses.replace(RECIPE, quantizer=quantizer).key("0" * 40) for quantizer in QUANTIZERS}
    assert len(keys) == len(QUANTIZERS)


@pytest.mark.parametrize("constant", ["FORMAT", "SOLVER_VERSION", "QUANTIZER_VERSION"])
def test_a_new_version_of_what_shapes_a_result_shapes_the_key(monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    before = RECIPE.key("0" * 40)
    place = "loftq_exp.loftq.quantizer" if constant == "QUANTIZER_VERSION" else module.__name__
    monkeypatch.setattr(f"{place}.{constant}", "another")
    assert RECIPE.key("0" * 40) != before


def test_rank_and_solver_do_not_matter_to_quantization_alone() -> None:
    alone = dataclasses.replace(RECIPE, steps=0)
    assert alone.key("0" * 40) == dataclasses.replace(alone, rank=9, solver="exact").key("0" * 40)


def test_keys_and_digests_are_the_same_in_every_version_and_process() -> None:
    # Written down: a change of any of these loses everybody's cache, so it must be meant, and FORMAT counted up.
    digest = weight_digest(torch.arange(12.0).reshape(3, 4))
    assert digest == "923c06befacaff4601909e3421d8332d"
    assert RECIPE.key(digest) == "17842552f17a0dc37ee81a83f09473c1d7bf7c02"


@settings(deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 10**9),
    st.integers(0, 7),
)
def test_one_changed_bit_changes_the_digest(dtype: torch.dtype, place: int, bit: int) -> None:
    weight = a_weight(6, 10).to(dtype)
    changed = weight.clone()
    raw = changed.view(torch.uint8).view(-1)
    raw[place % raw.numel()] ^= 1 << bit
    assert weight_digest(weight) != weight_digest(changed)


def test_a_digest_depends_on_values_type_and_shape_alone() -> None:
    weight = a_weight(6, 10)
    assert weight_digest(weight) == weight_digest(weight.T.contiguous().T), "not on the layout in memory"
    assert weight_digest(weight) == weight_digest(torch.nn.Parameter(weight))
    assert weight_digest(weight) != weight_digest(weight.T)
    assert weight_digest(weight) != weight_digest(weight.reshape(10, 6))
    assert weight_digest(torch.zeros(4, 4)) != weight_digest(torch.zeros(4, 4, dtype=torch.int32))
    assert weight_digest(torch.zeros(4, 4)) != weight_digest(torch.zeros(4, 8, dtype=torch.bfloat16))


# Entries


def test_a_result_comes_back_byte_for_byte(tmp_path: Path) -> None:
    """Of every quantizer, in both types of scales, after 0, 1 and 2 steps."""
    weight = a_weight(9, 35)  # an odd number of values, and a last block that is short
    digest = weight_digest(weight)
    for quantizer, steps in itertools.product(QUANTIZERS, (0, 1, 2)):
        case = f"{name(quantizer)}, {steps} steps"
        cache = DecompositionCache(tmp_path / case)
        recipe = Recipe(quantizer, 3, steps, "randomized")
        assert cache.find(recipe, digest, weight.shape) is None, case
        kept = recipe.after(steps, weight.shape)
        cache.put(kept, digest, computed(weight, kept))
        found = cache.find(recipe, digest, weight.shape)
        assert found is not None, case
        assert identical(found, computed(weight, recipe)), case
        (path,) = cache.entries()
        taken = safetensors.safe_open(path, "pt").get_tensor("codes").nbytes
        assert taken == -(-weight.numel() // 8) * quantizer.bits, f"{case}: codes take no more than their bits"


def test_the_same_weight_under_another_name_hits(tmp_path: Path) -> None:
    weight = a_weight()
    cache = DecompositionCache(tmp_path)
    cache.put(RECIPE, weight_digest(weight), computed(weight))
    assert (
        DecompositionCache(tmp_path).find(dataclasses.replace(RECIPE), weight_digest(weight.clone()), weight.shape)
        is not None
    )
    changed = weight.clone()
    changed[3, 5] += 1e-6
    assert cache.find(RECIPE, weight_digest(changed), changed.shape) is None


def test_the_longest_result_that_is_not_too_long_is_found(tmp_path: Path) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    digest = weight_digest(weight)
    for steps in (0, 1, 3, 5):
        recipe = RECIPE.after(steps, weight.shape)
        cache.put(recipe, digest, computed(weight, recipe))
    found = {
        steps: result.steps
        for steps in range(7)
        if (result := cache.find(dataclasses.replace(RECIPE, steps=steps), digest, weight.shape))
    }
    assert found == {0: 0, 1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5}


@pytest.mark.parametrize("solver", ["randomized", "exact"])
@pytest.mark.parametrize("quantizer", [RECIPE.quantizer, make_quantizer("uniform", 2, 64, torch.float32)], ids=name)
def test_a_longer_result_continues_from_a_shorter_one_with_the_same_bytes(
    tmp_path: Path, quantizer: Quantizer, solver: str
) -> None:
    weight, cache = a_weight(96, 128), DecompositionCache(tmp_path)
    digest = weight_digest(weight)
    short, long = (Recipe(quantizer, 8, steps, solver) for steps in (2, 5))
    cache.put(short, digest, computed(weight, short))
    start = cache.find(long, digest, weight.shape)
    assert start is not None
    assert start.steps == 2
    assert identical(computed(weight, long, start), computed(weight, long))


@pytest.mark.parametrize("quantizer", [RECIPE.quantizer, make_quantizer("uniform", 2, 64, torch.float32)], ids=name)
def test_one_step_at_one_rank_serves_every_smaller_rank(tmp_path: Path, quantizer: Quantizer) -> None:
    weight, cache = a_weight(200, 160), DecompositionCache(tmp_path)
    digest = weight_digest(weight)
    kept = Recipe(quantizer, 8, 1, "randomized").after(1, weight.shape)
    cache.put(kept, digest, computed(weight, kept))
    for rank in (1, 8, 16, 64):
        recipe = Recipe(quantizer, rank, 1, "randomized")
        found = cache.find(recipe, digest, weight.shape)
        assert found is not None
        assert identical(found, computed(weight, recipe))
        left = weight - quantizer.decode_stored(found.quantized) - found.lora_B @ found.lora_A
        assert found.errors[1] == pytest.approx(float(left.norm() / weight.norm()), rel=1e-5)
    assert cache.find(Recipe(quantizer, 65, 1, "randomized"), digest, weight.shape) is None
    assert cache.find(Recipe(quantizer, 8, 1, "exact"), digest, weight.shape) is None
    assert len(list(cache.entries())) == 1


def test_an_entry_tells_its_recipe(tmp_path: Path) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    result = computed(weight)
    cache.put(RECIPE, weight_digest(weight), result)
    (path,) = cache.entries()
    told = describe_entry(path)
    assert told["recipe"] == RECIPE.shaping(weight_digest(weight))
    assert told["recipe"]["quantizer"] == RECIPE.quantizer.identity
    assert (told["recipe"]["rank"], told["recipe"]["steps"], told["recipe"]["solver"]) == (4, 2, "randomized")
    assert told["shape"] == [32, 64]
    assert tuple(told["errors"]) == result.errors


def test_an_entry_that_does_not_tell_its_recipe_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumps = json.dumps

    def without_recipe(value: dict[str, object], **options: bool) -> str:
        return dumps({key: kept for key, kept in value.items() if key != "recipe"}, **options)  # type: ignore[arg-type]

    weight, cache = a_weight(), DecompositionCache(tmp_path)
    result = computed(weight)
    monkeypatch.setattr(module.json, "dumps", without_recipe)
    cache.put(RECIPE, weight_digest(weight), result)
    monkeypatch.undo()
    (path,) = cache.entries()
    assert "recipe" not in describe_entry(path)
    found = cache.find(RECIPE, weight_digest(weight), weight.shape)
    assert found is not None
    assert identical(found, result)


def test_taking_an_entry_renews_its_time_and_reading_it_does_not(tmp_path: Path) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    cache.put(RECIPE, weight_digest(weight), computed(weight))
    (path,) = cache.entries()
    os.utime(path, (1e9, 1e9))
    read_entry(path)
    describe_entry(path)
    assert path.stat().st_mtime == 1e9
    before = time.time() - 1  # a file's clock may be coarser
    cache.find(RECIPE, weight_digest(weight), weight.shape)
    assert path.stat().st_mtime >= before


# Damage


def flipped(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:40],
    "cut after the header": lambda raw: raw[: header_end(raw)],
    "last byte cut": lambda raw: raw[:-1],
    "too long": lambda raw: raw + b"x",
    "garbage": lambda raw: os.urandom(len(raw)),
    "zeros": lambda raw: bytes(len(raw)),
    "bit in the data": lambda raw: flipped(raw, header_end(raw) + 17),
    "last bit": lambda raw: flipped(raw, len(raw) - 1),
    "an error": lambda raw: raw.replace(b"\\\"norm\\\": ", b"\\\"norm\\\": 1", 1),
    "not an object": lambda raw: (2).to_bytes(8, "little") + b"[]",
    "another file": lambda raw: safetensors.torch.save({"weight": torch.ones(3)}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_dropped_told_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    digest = weight_digest(weight)
    cache.put(RECIPE, digest, computed(weight))
    (path,) = cache.entries()
    whole, result = path.read_bytes(), read_entry(path)
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(DamagedEntry):
        read_entry(path)
    with caplog.at_level(logging.WARNING):
        assert cache.find(RECIPE, digest, weight.shape) is None
    assert f"{path} is damaged" in caplog.text
    assert "to be recomputed" in caplog.text
    assert not path.exists()
    cache.put(RECIPE, digest, computed(weight))
    assert identical(read_entry(path), result)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_flipped_bit_and_no_cut_goes_unseen(whole_entry: Path, data: st.DataObject) -> None:
    raw = whole_entry.read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        changed = raw[:place]
    else:
        changed = raw[:place] + bytes([raw[place] ^ (1 << data.draw(st.integers(0, 7)))]) + raw[place + 1 :]
    path = whole_entry.with_name("changed") / whole_entry.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(changed)
    try:
        found = read_entry(path)
    except DamagedEntry:
        return
    assert identical(found, read_entry(whole_entry)), "padding may change, what is read may not"


@pytest.fixture(scope="module")
def whole_entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = DecompositionCache(tmp_path_factory.mktemp("cache"))
    weight = a_weight(8, 16)
    cache.put(RECIPE, weight_digest(weight), computed(weight))
    (path,) = cache.entries()
    return path


def test_an_entry_in_the_place_of_another_is_damage(tmp_path: Path) -> None:
    cache = DecompositionCache(tmp_path)
    weights = [a_weight(seed=seed) for seed in (1, 2)]
    for weight in weights:
        cache.put(RECIPE, weight_digest(weight), computed(weight))
    one, other = (cache.path(RECIPE.key(weight_digest(weight))) for weight in weights)
    other.write_bytes(one.read_bytes())
    with pytest.raises(DamagedEntry):
        read_entry(other)
    assert cache.find(RECIPE, weight_digest(weights[0]), weights[0].shape) is not None
    assert cache.find(RECIPE, weight_digest(weights[1]), weights[1].shape) is None


def test_a_damaged_longer_result_leaves_the_shorter_one_to_continue_from(tmp_path: Path) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    digest = weight_digest(weight)
    short = RECIPE.after(1, weight.shape)
    cache.put(short, digest, computed(weight, short))
    cache.put(RECIPE, digest, computed(weight))
    cache.path(RECIPE.key(digest)).write_bytes(b"")
    found = cache.find(RECIPE, digest, weight.shape)
    assert found is not None
    assert found.steps == 1


def test_entries_of_another_format_are_not_seen_and_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    monkeypatch.setattr(module, "FORMAT", 0)
    cache.put(RECIPE, weight_digest(weight), computed(weight))
    monkeypatch.undo()
    assert cache.find(RECIPE, weight_digest(weight), weight.shape) is None
    (old,) = cache.entries()
    cache.put(RECIPE, weight_digest(weight), computed(weight))
    assert old in set(cache.entries())
    assert len(list(cache.entries())) == 2


# Sharing


def put_and_find(folder: Path, seeds: list[int], times: int) -> None:
    torch.set_num_threads(1)
    cache = DecompositionCache(folder)
    expected = {seed: computed(a_weight(seed=seed)) for seed in seeds}
    for _ in range(times):
        for seed in seeds:
            digest = weight_digest(a_weight(seed=seed))
            cache.put(RECIPE, digest, expected[seed])
            found = cache.find(RECIPE, digest, a_weight().shape)
            assert found is not None
            assert identical(found, expected[seed])


def test_processes_that_write_one_key_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=put_and_find, args=(tmp_path, [1, 2, 3], 30)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    cache = DecompositionCache(tmp_path)
    assert len(list(cache.entries())) == 3
    for path in cache.entries():
        read_entry(path)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path not in set(cache.entries())] == []


def test_a_failed_write_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    weight = a_weight()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=f"cache_dir={tmp_path}: cannot be written .No space left"):
        DecompositionCache(tmp_path).put(RECIPE, weight_digest(weight), computed(weight))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    cache, weight = DecompositionCache(tmp_path / "cache"), a_weight()
    with pytest.raises(UserError, match="cannot be read"):
        cache.find(RECIPE, weight_digest(weight), weight.shape)
    with pytest.raises(UserError, match="cannot be written"):
        cache.put(RECIPE, weight_digest(weight), computed(weight))
    assert (tmp_path / "cache").read_text() == "mine"


def test_an_entry_that_must_not_be_read_is_an_error_and_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    cache.put(RECIPE, weight_digest(weight), computed(weight))

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        cache.find(RECIPE, weight_digest(weight), weight.shape)
    assert len(list(cache.entries())) == 1


def test_an_entry_of_somebody_else_is_taken_though_its_time_cannot_be_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, cache = a_weight(), DecompositionCache(tmp_path)
    cache.put(RECIPE, weight_digest(weight), computed(weight))

    def refused(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert cache.find(RECIPE, weight_digest(weight), weight.shape) is not None


def test_leftovers_are_what_dead_processes_were_writing(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    cache = DecompositionCache(tmp_path)
    folder = cache.path("ab" * 20).parent
    folder.mkdir(parents=True)
    hosts = {"here": socket.gethostname(), "there": "another.machine"}
    pids = {"dead": ended.pid, "alive": os.getpid(), "init": 1}
    now = time.time()
    for (place, host), (state, pid), (age, since) in itertools.product(
        hosts.items(), pids.items(), {"new": 0, "old": 25 * 3600}.items()
    ):
        path = folder / f".{place}-{state}-{age}.safetensors.{host}.{pid}.01234567.tmp"
        path.write_bytes(b"half")
        os.utime(path, (now - since, now - since))
    (folder / ".of-another-time.tmp").write_bytes(b"half")
    found = {path.name.split(".")[1] for path in cache.leftovers()}
    assert "here-dead-new" in found
    assert found == {"here-dead-new"} | {f"{place}-{state}-old" for place in hosts for state in pids}
    assert list(cache.entries()) == []
