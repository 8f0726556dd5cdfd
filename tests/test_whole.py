"""Files and folders that are complete or absent."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from loftq_exp.whole import is_abandoned, put_folder, whole_file, whole_folder, workspace_beside, write_whole


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
