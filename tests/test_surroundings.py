"""Folders, names, locales, clocks and disks of shared machines: one line, intact state, and the next run goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Command

QUANTIZE = "stages=[quantize]"
ODD_NAMES = ("a blank", "über 文件 🙂", 'quote\'d "x"', "percent%20", "-dash", "n" * 200)


def partial(folder: Path) -> list[Path]:
    """What a process that ended in the middle of its work would have left behind."""
    return [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp", ".replaced"))]


def called(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own. A variable of None is unset."""
    given = {**os.environ, **environment}
    own = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, "-m", "loftq_exp", *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, errors="replace", check=False)


def test_a_current_folder_that_is_gone(cli: Command, tmp_path: Path) -> None:
    (gone := tmp_path / "gone").mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert cli.refused(*cli.tiny) == "the current folder: was deleted or unmounted; change to one that exists"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_folders(cli: Command, tmp_path: Path, name: str, tiny_llama_dir: Path) -> None:
    place = tmp_path / name
    place.mkdir()
    (place / "model").symlink_to(tiny_llama_dir)
    quoted = str(place).replace("\\", "\\\\").replace('"', '\\"')
    settings = [f'{setting}="{quoted}/{part}"' for setting, part in
                (("model.path", "model"), ("save_dir", "init"), ("cache_dir", "cache"), ("output_dir", "out"))]  # fmt: skip
    outcome = cli(*cli.tiny, QUANTIZE, *settings)
    assert (outcome.code, outcome.err) == (0, "")
    assert [path.name for path in (place / "init").iterdir() if path.is_dir()] == ["model-4bit-4rank"]
    assert "done before" in cli(*cli.tiny, QUANTIZE, *settings).out


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: a disk that is full at the write that would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.slow
def test_no_space_at_each_write(cli: Command) -> None:
    """The limit meets each file of a run in turn: records, adapter, TensorBoard log, backbone, optimizer state."""
    done = []
    for limit in [0, *(int(10 * 1.6**step) for step in range(26))]:
        with file_size(limit):
            outcome = cli(*cli.tiny, "train.save_steps=1", f"output_dir=out{limit}")
        done.append(outcome.code == 0)
        if outcome.code:
            assert outcome.err.startswith("error: "), outcome
            assert outcome.err.count("\n") == 1, outcome
            assert "cannot be written" in outcome.err or "cannot be stored" in outcome.err, outcome
        assert partial(Path()) == []
        again = cli(*cli.tiny, "train.save_steps=1", f"output_dir=out{limit}")
        assert (again.code, again.err) == (0, ""), (limit, again)
    assert not done[0]
    assert done[-1]


@pytest.mark.parametrize("years", [-20, 20])
def test_a_clock_that_was_moved(cli: Command, years: int) -> None:
    assert cli(*cli.tiny).code == 0
    for path in Path("outputs").rglob("*"):
        os.utime(path, (time.time() + years * 365 * 86400,) * 2)
    again = cli(*cli.tiny)
    assert (again.code, again.err) == (0, "")
    assert "finetune: done before" in again.out
    assert "evaluate: done before" in again.out


@pytest.mark.slow
def test_the_locale_c(cli: Command, tmp_path: Path, tiny_llama_dir: Path) -> None:
    c = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None}
    plain = called(*cli.tiny, **c)
    assert (plain.returncode, plain.stderr) == (0, "")
    (tmp_path / "modèle").symlink_to(tiny_llama_dir)
    told = called(*cli.tiny, f'model.path="{tmp_path}/modèle"', QUANTIZE, **c)
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1
    assert "not readable in this locale; set LC_ALL=C.UTF-8" in told.stderr
    assert called(*cli.tiny, f'model.path="{tmp_path}/modèle"', QUANTIZE, **c | {"PYTHONUTF8": "1"}).returncode == 0


@pytest.mark.slow
def test_without_a_home_folder(cli: Command) -> None:
    found = called(*cli.tiny, QUANTIZE, HOME=None, XDG_CACHE_HOME=None, HF_HOME=None)
    assert (found.returncode, found.stderr) == (0, "")
    found = called(*cli.tiny, QUANTIZE, "quant.rank=8", HOME="/proc/no-home", XDG_CACHE_HOME=None, HF_HOME=None)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["quantize", "finetune"])
def test_sigterm_leaves_no_scratch(cli: Command, stage: str) -> None:
    """As from Slurm at the end of a job's time: tidied up, and the same command goes on."""
    waits = {
        "quantize": "outputs/inits/.*.partial",
        "finetune": "outputs/runs/*/checkpoints/checkpoint-*/trainer_state.json",
    }
    settings = ("quant.iter=1000",) if stage == "quantize" else ("train.num_train_epochs=100000", "train.save_steps=5")
    command = [sys.executable, "-m", "loftq_exp", *cli.tiny, *settings]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 240
            while not list(Path().glob(waits[stage])):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, err) == (
        143,
        "error: interrupted: finished work is kept; run the same command again to resume\n",
    )
    assert partial(Path("outputs")) == []
    if stage == "finetune":
        (run,) = Path("outputs/runs").iterdir()
        assert not (run / "adapter").exists()
        assert json.loads((run / "config.json").read_text())["format"]
