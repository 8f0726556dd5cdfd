"""Files and folders that are complete or absent."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loftq_exp.errors import UserError
from loftq_exp.whole import is_abandoned, locked, put_folder, whole_file, whole_folder, workspace_beside, write_whole


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_appears_when_it_is_written(tmp_path: Path, shared: bool) -> None:
    place = tmp_path / "scores.json"
    place.write_text("old")
    with whole_file(place, shared) as beside:
        beside.write_text("new")
        assert place.read_text() == "old"
        assert beside.name.startswith(".scores.json.")
        assert beside.name.endswith(".tmp")
    assert content(tmp_path) == {"scores.json": "new"}


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    place = tmp_path / "scores.json"
    write_whole(place, "old")

    def half() -> None:
        with whole_file(place) as beside:
            beside.write_text("ne")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        half()
    assert content(tmp_path) == {"scores.json": "old"}


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    (tmp_path / ".adapter.partial").mkdir()
    (tmp_path / ".adapter.partial" / "half").write_text("of a killed process")
    for text in ("old", "new"):
        with whole_folder(place) as folder:
            assert list(folder.iterdir()) == []
            (folder / f"{text}.txt").write_text(text)
    assert content(tmp_path) == {"adapter/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_fails_leaves_the_old_one_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "adapter") as folder:
        (folder / "old.txt").write_text("old")

    def half() -> None:
        with whole_folder(tmp_path / "adapter") as folder:
            (folder / "new.txt").write_text("ne")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        half()
    assert content(tmp_path) == {"adapter/old.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_of_a_workspace_only_what_is_put_in_place_stays(tmp_path: Path) -> None:
    with workspace_beside(tmp_path / "model") as workspace:
        (workspace / "download").write_text("large")
        (workspace / "ready").mkdir()
        (workspace / "ready" / "weights").write_text("w")
        put_folder(workspace / "ready", tmp_path / "model")
    assert content(tmp_path) == {"model/weights": "w"}


def test_a_file_is_not_abandoned_while_its_writer_lives(tmp_path: Path) -> None:
    with whole_file(tmp_path / "entry", shared=True) as beside:
        beside.write_text("half")
        assert socket.gethostname() in beside.name
        assert not is_abandoned(beside)
        os.utime(beside, (0, 0))
        assert is_abandoned(beside), "more than a day old"


# Locks ----------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from loftq_exp.whole import locked
with locked(Path(sys.argv[1]), "holding on", "output_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_waits_says_for_what_and_a_dead_holder_blocks_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    threading.Timer(1.0, holder.kill).start()
    with caplog.at_level(logging.INFO), locked(tmp_path / "lock", "running a job", "output_dir"):
        assert holder.wait() == -signal.SIGKILL
    (line,) = [line for line in caplog.messages if line.startswith("waiting")]
    assert line == f"waiting for another process that is running a job (it holds {tmp_path / 'lock'})"


@pytest.mark.parametrize(("number", "works"), [(errno.ENOSYS, True), (errno.ENOTSUP, False), (errno.ENOLCK, False)])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, works: bool) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    if works:  # filelock then uses the existence of the file
        with locked(tmp_path / "lock", "running a job", "output_dir"):
            pass
        return
    told = (
        rf"^output_dir={tmp_path}: cannot be locked \(.*\); set another output_dir, on a file system with file locks$"
    )
    with pytest.raises(UserError, match=told), locked(tmp_path / "lock", "running a job", "output_dir"):
        pass


def test_abandoned_temporary_files_of_a_target_go_with_its_next_write(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".entry.{socket.gethostname()}.{pid}.0123abcd.tmp" for pid in (dead.pid, os.getpid())]
    for name in names:
        (tmp_path / name).write_text("half")
    with whole_file(tmp_path / "entry", shared=True) as beside:
        beside.write_text("whole")
    assert sorted(content(tmp_path)) == [names[1], "entry"]
