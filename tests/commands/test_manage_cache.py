"""`python -m loftq_exp.cache`: what it shows and what it removes, also while others use the cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from loftq_exp.calibration.cache import StatisticsCache
from loftq_exp.calibration.moments import Statistics
from loftq_exp.commands import manage_cache as command
from loftq_exp.initialise.decomposition_cache import DecompositionCache, Recipe, weight_digest
from loftq_exp.loftq import decompose, make_quantizer
from loftq_exp.source import digests
from loftq_exp.source.digests import FileDigests

RECIPES = {
    "nf4": Recipe(make_quantizer("nf", 4, 64, torch.bfloat16), 4, 2, "randomized"),
    "uniform3": Recipe(make_quantizer("uniform", 3, 32, torch.float32), 8, 1, "exact"),
    "int8": Recipe(make_quantizer("int", 8, 64, torch.bfloat16), 4, 0, "randomized"),
}
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may reach the outputs/cache of the folder that the tests are started in."""
    monkeypatch.chdir(tmp_path)


def put(cache: DecompositionCache, recipe: Recipe, seed: int = 0) -> Path:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    result = decompose(weight, recipe.quantizer, recipe.rank, recipe.steps, recipe.solver)
    cache.put(recipe, weight_digest(weight), result)
    return cache.path(recipe.key(weight_digest(weight)))


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Path]:
    """A cache in tmp_path with three entries, used one, two and three days ago, and a model."""
    cache = DecompositionCache(tmp_path)
    paths = {name: put(cache, recipe) for name, recipe in RECIPES.items()}
    for days, path in enumerate(paths.values(), 1):
        os.utime(path, (time.time() - days * DAY,) * 2)
    model = tmp_path / "models" / "tiny-1.0-01234567"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(1_500_000))
    (model.parent / ".tiny-1.0-01234567.lock").touch()
    return paths


@pytest.fixture
def leftover(tmp_path: Path, entries: dict[str, Path]) -> Path:
    """What a process that is dead by now was writing."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = entries["nf4"].with_name(f".{entries['nf4'].name}.{os.uname().nodename}.{dead.pid}.01234567.tmp")
    path.write_bytes(b"half")
    return path


def run(folder: Path, *arguments: str) -> int:
    return command.main(["--cache-dir", str(folder), *arguments])


def kept(entries: dict[str, Path]) -> set[str]:
    return {name for name, path in entries.items() if path.exists()}


def test_list_shows_what_each_entry_holds(
    tmp_path: Path, entries: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    entries["int8"].write_bytes(b"garbage")
    os.utime(entries["int8"], (0, 0))
    assert run(tmp_path, "list") == 0
    lines = [" ".join(re.split(r"[^\w.,:+ -]+", line)) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if any(path.stem[:12] in line for path in entries.values())]
    assert "3 decompositions" in lines[0]
    assert [name for row in rows for name, path in entries.items() if path.stem[:12] in row] == [*entries], (
        "last used first"
    )
    nf4, uniform3, int8 = (" ".join(row.split()) for row in rows)
    assert "32 x 64 nf 4 bits, blocks of 64, bfloat16 4 2 randomized 0." in nf4
    assert "32 x 64 uniform 3 bits, blocks of 32, float32 8 1 exact 0." in uniform3
    assert "damaged" in int8


def test_quantization_alone_has_neither_rank_nor_solver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(DecompositionCache(tmp_path), RECIPES["int8"])
    assert run(tmp_path, "list") == 0
    assert re.search(r"int 8 bits, bfloat16\W+-\W+0\W+-\W+0\.00", capsys.readouterr().out)


def test_size_counts_by_kind(
    tmp_path: Path, entries: dict[str, Path], leftover: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "size") == 0
    megabytes = sum(path.stat().st_size for path in entries.values()) / 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"3 decompositions, {megabytes:.1f} MB",
        "1 converted model, 1.5 MB",
        "1 incomplete file of killed processes, 0.0 MB; prune removes them",
    ]


def test_an_empty_folder_is_an_empty_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["list"], ["size"], ["verify"], ["prune", "--all"]):
        assert run(tmp_path, *arguments) == 0
    out = capsys.readouterr().out
    assert "no decompositions" in out
    assert "0 decompositions, 0.0 MB\n0 converted models, 0.0 MB\n" in out
    assert "0 decompositions, 0 damaged" in out
    assert "removed 0 decompositions, 0.0 MB; 0 remain" in out
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_damage_and_drops_it_when_told_to(
    tmp_path: Path, entries: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "verify") == 0
    assert "3 decompositions, 0 damaged\n" in capsys.readouterr().out
    raw = bytearray(entries["nf4"].read_bytes())
    raw[-1] ^= 1
    entries["nf4"].write_bytes(raw)
    entries["int8"].write_bytes(b"")
    assert run(tmp_path, "verify") == 1
    out = capsys.readouterr().out
    assert all(f"damaged: {entries[name]} (" in out for name in ("nf4", "int8"))
    assert "3 decompositions, 2 damaged (verify --drop removes them)" in out
    assert kept(entries) == {*entries}
    assert run(tmp_path, "verify", "--drop") == 1
    assert "2 damaged (dropped)" in capsys.readouterr().out
    assert kept(entries) == {"uniform3"}
    assert run(tmp_path, "verify") == 0


def test_verify_and_list_do_not_count_as_use(tmp_path: Path, entries: dict[str, Path]) -> None:
    before = {name: path.stat().st_mtime for name, path in entries.items()}
    assert run(tmp_path, "verify") == run(tmp_path, "list") == 0
    assert {name: path.stat().st_mtime for name, path in entries.items()} == before


def test_prune_all(
    tmp_path: Path, entries: dict[str, Path], leftover: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "prune", "--all") == 0
    assert "removed 3 decompositions and 1 incomplete file, 0.0 MB; 0 remain, 0.0 MB" in capsys.readouterr().out
    assert kept(entries) == set()
    assert not leftover.exists()
    assert (tmp_path / "models/tiny-1.0-01234567/model.safetensors").exists(), "a job may be about to open it"


@pytest.mark.parametrize(
    ("days", "staying"),
    [("0", set()), ("1.5", {"nf4"}), ("2.5", {"nf4", "uniform3"}), ("30", {"nf4", "uniform3", "int8"})],
)
def test_prune_by_age(tmp_path: Path, entries: dict[str, Path], leftover: Path, days: str, staying: set[str]) -> None:
    assert run(tmp_path, "prune", "--older-than", days) == 0
    assert kept(entries) == staying
    assert not leftover.exists()


def test_prune_by_size_removes_what_was_used_longest_ago(tmp_path: Path, entries: dict[str, Path]) -> None:
    nf4, uniform3, int8 = (path.stat().st_size for path in entries.values())
    assert run(tmp_path, "prune", "--max-gb", repr((nf4 + uniform3 + int8) / 1e9)) == 0
    assert kept(entries) == {"nf4", "uniform3", "int8"}
    assert run(tmp_path, "prune", "--max-gb", repr((nf4 + uniform3 + int8 - 1) / 1e9)) == 0
    assert kept(entries) == {"nf4", "uniform3"}
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    DecompositionCache(tmp_path).find(RECIPES["uniform3"], weight_digest(weight), weight.shape)  # a job uses it
    assert run(tmp_path, "prune", "--max-gb", repr(max(nf4, uniform3) / 1e9)) == 0
    assert kept(entries) == {"uniform3"}
    assert run(tmp_path, "prune", "--max-gb", "0") == 0
    assert kept(entries) == set()


def test_prune_leaves_what_a_living_process_is_writing(tmp_path: Path, leftover: Path) -> None:
    living = leftover.with_name(re.sub(r"\.\d+\.01234567", f".{os.getpid()}.01234567", leftover.name))
    living.write_bytes(b"half")
    assert run(tmp_path, "prune", "--all") == 0
    assert not leftover.exists()
    assert living.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "list|size|verify|prune"),
        (["lst"], "invalid choice: 'lst'"),
        (["prune"], "one of the arguments --all --max-gb --older-than is required"),
        (["prune", "--all", "--max-gb", "1"], "not allowed with argument --all"),
        (["prune", "--max-gb", "-1"], "--max-gb: '-1' is not a number of at least 0"),
        (["prune", "--max-gb", "nan"], "--max-gb: 'nan' is not a number of at least 0"),
        (["prune", "--older-than", "inf"], "--older-than: 'inf' is not a number of at least 0"),
        (["prune", "--older-than", "soon"], "--older-than: 'soon' is not a number of at least 0"),
        (["verify", "--dorp"], "unrecognized arguments: --dorp"),
        (["list", "--cache-dir", "/no/where"], "--cache-dir=/no/where: there is no such folder"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    tmp_path: Path, entries: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert run(tmp_path, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert told in captured.err
    assert kept(entries) == {*entries}


def test_a_file_that_cannot_be_removed_or_read_is_told_in_one_line(
    tmp_path: Path, entries: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, **options: bool) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(Path, "read_bytes", refused)
    for arguments, told in ((["prune", "--all"], "cannot be removed"), (["verify", "--drop"], "cannot be read")):
        assert run(tmp_path, *arguments) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(rf"error: .* {told} \(Permission denied\); ask its owner\n", error)


def test_the_folder_may_come_after_the_subcommand_and_defaults_to_outputs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(DecompositionCache(tmp_path / "outputs" / "cache"), RECIPES["nf4"])
    monkeypatch.chdir(tmp_path)
    for arguments in (["size"], ["size", "--cache-dir", "outputs/cache"], ["--cache-dir", "outputs/cache", "size"]):
        assert command.main(arguments) == 0
        assert capsys.readouterr().out.startswith("1 decomposition, ")


def keep_putting(folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    cache, until, seed = DecompositionCache(folder), time.monotonic() + seconds, 0
    weights = [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    recipe = RECIPES["nf4"]
    results = [decompose(weight, recipe.quantizer, recipe.rank, recipe.steps) for weight in weights]
    while time.monotonic() < until:
        seed = (seed + 1) % len(weights)
        if cache.find(recipe, weight_digest(weights[seed]), weights[seed].shape) is None:
            cache.put(recipe, weight_digest(weights[seed]), results[seed])


def test_all_of_it_beside_running_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=keep_putting, args=(tmp_path, 1.5)) for _ in range(2)]
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs):
        for arguments in (["list"], ["size"], ["verify", "--drop"], ["prune", "--max-gb", "1e-5"], ["prune", "--all"]):
            assert run(tmp_path, *arguments) == 0
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert run(tmp_path, "verify") == 0
    assert list(tmp_path.rglob("*.tmp")) == []


def test_as_a_module(tmp_path: Path, entries: dict[str, Path]) -> None:
    entries["nf4"].write_bytes(b"")
    call = [sys.executable, "-m", "loftq_exp.cache", "verify", "--cache-dir", str(tmp_path)]
    result = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, "")
    assert "3 decompositions, 1 damaged" in result.stdout


# Calibration statistics ------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks(tmp_path: Path) -> dict[str, Path]:
    """The statistics of two blocks beside one decomposition, used four, five and one days ago."""
    cache, width = StatisticsCache(tmp_path), 12
    shared, other = Statistics(torch.eye(width), 40), Statistics(torch.eye(2 * width), 40)
    found = {
        "full": cache.put("aa0", {"q": shared, "k": shared, "o": other}).path,
        "diagonal": cache.put("bb1", {"q": Statistics(torch.ones(width), 7)}).path,
        "nf4": put(DecompositionCache(tmp_path), RECIPES["nf4"]),
    }
    for path, days in zip(found.values(), (4, 5, 1), strict=True):
        os.utime(path, (time.time() - days * DAY,) * 2)
    return found


def test_statistics_are_listed_and_sized(
    tmp_path: Path, blocks: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "list") == 0
    out = capsys.readouterr().out
    assert ": 1 decomposition" in out
    titles = " ".join(out.split())  # a narrow table's title has several lines
    assert "2 files of calibration statistics" in titles
    assert re.search(r"aa0\W+3\W+2\W+full\W+40\W", out)
    assert re.search(r"bb1\W+1\W+1\W+diagonal\W+7\W", out)
    assert out.index("aa0") < out.index("bb1"), "last used first"
    assert run(tmp_path, "size") == 0
    megabytes = sum(blocks[name].stat().st_size for name in ("full", "diagonal")) / 1e6
    assert f"\n2 files of calibration statistics, {megabytes:.1f} MB\n" in capsys.readouterr().out
    blocks["full"].write_bytes(b"")
    assert run(tmp_path, "list") == 0
    assert re.search(r"aa0\W+damaged", capsys.readouterr().out)


def test_statistics_are_verified(tmp_path: Path, blocks: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "verify") == 0
    assert capsys.readouterr().out.endswith(
        "1 decomposition, 0 damaged\n2 files of calibration statistics, 0 damaged\n"
    )
    raw = bytearray(blocks["full"].read_bytes())
    raw[-1] ^= 1
    blocks["full"].write_bytes(raw)
    assert run(tmp_path, "verify") == 1
    out = capsys.readouterr().out
    assert out.startswith(f"damaged: {blocks['full']} (its checksum differs)\n")
    assert (
        "1 decomposition, 0 damaged\n2 files of calibration statistics, 1 damaged (verify --drop removes them)" in out
    )
    assert run(tmp_path, "verify", "--drop") == 1
    assert kept(blocks) == {"diagonal", "nf4"}
    assert run(tmp_path, "verify") == 0


@pytest.mark.parametrize(
    ("arguments", "staying", "told"),
    [
        (["--all"], set(), "removed 1 decomposition and 2 files of calibration statistics, 0.0 MB; 0 remain, 0.0 MB"),
        (["--older-than", "2"], {"nf4"}, "removed 0 decompositions and 2 files of calibration statistics, "),
        (["--older-than", "4.5"], {"nf4", "full"}, "removed 0 decompositions and 1 file of calibration statistics, "),
        (["--max-gb", "1"], {"nf4", "full", "diagonal"}, "removed 0 decompositions, 0.0 MB; 3 remain, 0.0 MB"),
    ],
)
def test_statistics_are_pruned_by_their_last_use(
    tmp_path: Path, blocks: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], staying: set[str],
    told: str,
) -> None:  # fmt: skip
    assert run(tmp_path, "prune", *arguments) == 0
    assert told in capsys.readouterr().out
    assert kept(blocks) == staying


def test_incomplete_statistics_of_killed_processes_go(tmp_path: Path, blocks: dict[str, Path], leftover: Path) -> None:
    half = blocks["full"].with_name(leftover.name)
    half.write_bytes(b"half")
    assert run(tmp_path, "prune", "--older-than", "30") == 0
    assert not half.exists()
    assert kept(blocks) == {*blocks}


# Initialisations ------------------------------------------------------------------------------------------------------


def stored(name: str, run: str | None = None, megabytes: float = 1.0) -> Path:
    """An initialisation in the store of outputs/, and a run's folder that names it."""
    folder = Path("outputs/inits") / name
    (folder / "loftq_init").mkdir(parents=True)
    report = {"model": {"requested": "me/tiny"}, "quant": {"method": "loftq", "iter": 5}}
    (folder / "init_report.json").write_text(json.dumps(report))
    (folder / "model.safetensors").write_bytes(bytes(int(megabytes * 1e6) - len(json.dumps(report))))
    if run:
        place = Path("outputs/runs") / run
        place.mkdir(parents=True)
        config = {
            "format": 2,
            "initialisation": {"key": "0", "folder": f"/elsewhere/inits/{name}"},
        }  # outputs/ was moved
        (place / "config.json").write_text(json.dumps(config))
    return folder


def test_inits_are_listed_sized_and_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    named, free = stored("tiny-4bit-4rank-0123abcd", "run-1"), stored("tiny-2bit-4rank-89ef0123", megabytes=2)
    half = named.parent / ".gone-4bit-4rank-00000000.partial"
    half.mkdir()
    assert command.main(["inits", "list"]) == 0
    out = capsys.readouterr().out
    assert "2 initialisations" in out
    assert re.search(r"tiny-4bit-4rank-0123abcd\W+me/tiny\W+loftq\W+5\W+1\.0\W+1\W", out)
    assert re.search(r"tiny-2bit-4rank-89ef0123\W+me/tiny\W+loftq\W+5\W+2\.0\W+0\W", out)
    assert command.main(["inits", "size"]) == 0
    assert capsys.readouterr().out == "2 initialisations, 3.0 MB; 1 unused, 2.0 MB\n"
    assert command.main(["inits", "--output-dir", "outputs", "prune"]) == 0
    assert capsys.readouterr().out == "removed 1 initialisation, 2.0 MB; 1 remain, 1.0 MB\n"
    assert (named.is_dir(), free.exists(), half.exists()) == (True, False, False)


def test_an_init_that_a_run_names_goes_only_by_force(capsys: pytest.CaptureFixture[str]) -> None:
    named = stored("tiny-4bit-4rank-0123abcd", "run-1")
    assert command.main(["inits", "prune", named.name]) == 1
    message = f"error: {named.name}: runs/run-1 still uses it; add --force to remove it anyway\n"
    assert capsys.readouterr().err == message
    assert command.main(["inits", "prune", "other"]) == 1
    assert capsys.readouterr().err.startswith("error: other: there is no such initialisation in outputs/inits; ")
    assert named.is_dir()
    assert command.main(["inits", "prune", named.name, "--force"]) == 0
    assert not named.exists()


def test_an_init_that_is_being_written_stays(capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored("tiny-4bit-4rank-0123abcd")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        assert command.main(["inits", "prune"]) == 0
    assert capsys.readouterr().out.startswith(
        f"{folder.name}: a job is writing it; it is kept\nremoved 0 initialisations"
    )
    assert folder.is_dir()


def test_inits_of_version_0_1_are_counted_and_stay(capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored("tiny-4bit-4rank-0123abcd")
    old = Path("outputs/runs/tiny-0a1b2c3d")
    old.mkdir(parents=True)
    (old / "config.json").write_text('{"seed": 11}')
    folder = folder.rename(old / "tiny-4bit-4rank")
    for arguments in (["list"], ["size"], ["prune", "--force"]):
        assert command.main(["inits", *arguments]) == 0
        out = capsys.readouterr().out
        assert arguments[0] == "prune" or out.endswith(
            "1 initialisation of version 0.1 inside run folders, 1.0 MB: left alone\n"
        )
    assert folder.is_dir()


def test_verify_reads_files_whose_digest_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1)
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**12))
    files = [tmp_path / name for name in ("sound", "wrong", "changed")]
    for file in files:
        file.write_bytes(b"weights")
    known = FileDigests(tmp_path / "cache")
    known.of(files)
    entries = {json.loads(entry.read_text())["path"]: entry for entry in known.entries()}
    wrong = entries[str(files[1].resolve())]
    wrong.write_text(wrong.read_text().replace(json.loads(wrong.read_text())["digest"], "0" * 32))
    files[2].write_bytes(b"others")
    assert command.main(["verify", "--cache-dir", str(tmp_path / "cache")]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"wrong digest: the bytes of {files[1].resolve()} changed, but its size and dates are those that were recorded"  # fmt: skip
    assert out.endswith("3 remembered digests, 1 wrong (verify --drop removes them)\n")
    assert command.main(["verify", "--drop", "--cache-dir", str(tmp_path / "cache")]) == 1
    assert [json.loads(entry.read_text())["path"] for entry in known.entries()] == [str(files[0].resolve())]
