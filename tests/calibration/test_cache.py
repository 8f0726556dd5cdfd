"""The cache of statistics: bit for bit, whole files only, and damage that is dropped and collected again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_exp.calibration.cache import StatisticsCache, check_file, describe_file, packed, statistics_key, unpacked
from loftq_exp.calibration.moments import Statistics
from loftq_exp.errors import UserError

KEY = statistics_key(model="m", block="layers.0")


def moments(kind: str, seed: int = 0) -> dict[str, Statistics]:
    """Three layers, of which two share their inputs."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for width, tokens in ((24, 30), (16, 20)):
        x = torch.randn(tokens, width, generator=generator)
        mean = (x.T @ x / tokens).triu()
        found.append(Statistics(mean + mean.triu(1).T if kind == "full" else mean.diagonal().clone(), tokens))
    return {"q": found[0], "k": found[0], "o": found[1]}


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_they_come_back_bit_for_bit_and_are_stored_once(tmp_path: Path, kind: str) -> None:
    cache, given = StatisticsCache(tmp_path), moments(kind)
    cache.put(KEY, given)
    found = StatisticsCache(tmp_path).find(KEY)
    assert found is not None
    assert (list(found.tensors), found.tokens) == (["q", "k", "o"], {"q": 30, "k": 30, "o": 20})
    for name, one in given.items():
        assert torch.equal(found.read(name).hessian, one.hessian)
        assert found.read(name).digest == found.digests[name] == one.digest
    values = 24 * 25 // 2 + 16 * 17 // 2 if kind == "full" else 24 + 16
    assert 4 * values < cache.path(KEY).stat().st_size < 4 * values + 2000
    assert describe_file(cache.path(KEY))["kind"] == kind
    check_file(cache.path(KEY))
    assert [*cache.entries()] == [cache.path(KEY)]
    assert list(tmp_path.rglob("*.tmp")) == []


@given(width=st.integers(1, 200))
def test_the_triangle_of_any_width(width: int) -> None:
    values = torch.arange(float(width * width)).reshape(width, width)
    hessian = values.triu() + values.triu(1).T
    assert torch.equal(unpacked(packed(hessian)), hessian)
    assert torch.equal(unpacked(packed(hessian.diagonal())), hessian.diagonal())


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert StatisticsCache(tmp_path).find(KEY) is None
    StatisticsCache(tmp_path).put(KEY, moments("full"))
    assert StatisticsCache(tmp_path).find(statistics_key(model="m", block="layers.1")) is None


def test_a_key_depends_on_names_and_values_and_not_on_their_order() -> None:
    assert statistics_key(a=1, b=2) == statistics_key(b=2, a=1)
    assert len({statistics_key(a=1, b=2), statistics_key(a=2, b=1), statistics_key(a=1), statistics_key(a="1")}) == 4


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 16
    path.write_bytes({"cut": whole[:-40], "empty": b"", "garbage": b"x" * len(whole), "a bit": bytes(flipped)}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "a bit", "another key"])
def test_a_damaged_file_is_dropped_with_a_warning(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = StatisticsCache(tmp_path)
    cache.put(KEY, moments("full"))
    path = cache.path(KEY)
    if how == "another key":
        other = statistics_key(model="other")
        cache.put(other, moments("full", 1))
        path.write_bytes(cache.path(other).read_bytes())
    else:
        damage(path, how)
        with pytest.raises(ValueError, match=r"whole|checksum|key|Expecting"):
            check_file(path)
    with caplog.at_level(logging.WARNING):
        assert cache.find(KEY) is None
    assert f"cache: {path} is damaged (" in caplog.text
    assert "deleted, to be collected again" in caplog.text
    assert not path.exists()
    cache.put(KEY, moments("full"))
    assert cache.find(KEY) is not None


@pytest.mark.parametrize("how", ["cut", "a bit", "gone"])
def test_damage_after_it_was_found_is_refused(tmp_path: Path, how: str) -> None:
    found = StatisticsCache(tmp_path).put(KEY, moments("full"))
    damage(found.path, how) if how != "gone" else found.path.unlink()
    with pytest.raises(UserError, match=r"^cache_dir: .*; (remove it and )?run again$"):
        found.read("o")


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "statistics").write_text("a file")
    with pytest.raises(
        UserError, match=rf"^cache_dir={tmp_path}: cannot be written \(.*\); free space there or set another"
    ):
        StatisticsCache(tmp_path).put(KEY, moments("full"))


def test_a_find_is_a_use(tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path)
    path = cache.put(KEY, moments("diagonal")).path
    os.utime(path, (0, 0))
    describe_file(path)
    assert path.stat().st_mtime == 0
    cache.find(KEY)
    assert path.stat().st_mtime > 0


def keep_putting(folder: Path, rounds: int) -> None:
    cache = StatisticsCache(folder)
    given = moments("full")
    for _ in range(rounds):
        cache.put(KEY, given)
        found = cache.find(KEY)
        assert found is not None
        assert torch.equal(found.read("q").hessian, given["q"].hessian)


def test_processes_and_threads_may_write_the_same_file(tmp_path: Path) -> None:
    jobs = [multiprocessing.get_context("fork").Process(target=keep_putting, args=(tmp_path, 30)) for _ in range(2)]
    threads = [threading.Thread(target=keep_putting, args=(tmp_path, 30)) for _ in range(2)]
    for one in (*jobs, *threads):
        one.start()
    for one in (*jobs, *threads):
        one.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    check_file(StatisticsCache(tmp_path).path(KEY))
    assert list(tmp_path.rglob("*.tmp")) == []
