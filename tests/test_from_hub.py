"""Whole runs whose model and data come from a hub, as a user makes them: the command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub


@pytest.fixture
def hub(tiny_llama_dir: Path) -> Iterator[Hub]:
    """A hub with a model and a data set of prompts and completions."""
    hub = Hub()
    hub.publish("me/tiny", {file.name: file.read_bytes() for file in tiny_llama_dir.iterdir()})
    hub.publish("datasets/me/pairs", pairs("The answer is {}."))
    yield hub
    hub.close()


def pairs(answer: str) -> dict[str, bytes]:
    """The files of a data set with 16 training and 4 test rows."""
    rows = [json.dumps({"prompt": f"What is {a} plus 2?\n", "completion": answer.format(a + 2)}) for a in range(20)]
    return {"train.jsonl": "\n".join(rows[:16]).encode(), "test.jsonl": "\n".join(rows[16:]).encode()}


def run(hub: Hub, folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One call of the command in `folder`, whose hub is `hub` and whose caches are below `folder`."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    command = [sys.executable, "-m", "loftq_exp", "model.path=me/tiny", "quant.rank=4", "quant.bits=4", "task=instruct",
               "task.dataset=me/pairs", "task.train_split=train", "task.eval_split=test",
               "train=demo", "train.num_train_epochs=1", "device=cpu", "cache_dir=cache", *overrides]  # fmt: skip
    return subprocess.run(
        command, cwd=folder, env=os.environ | settings | environment, capture_output=True, text=True, timeout=300
    )


def metrics_in(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the finished runs below an output_dir, oldest first."""
    files = sorted((folder / "runs").glob("*/metrics.json"), key=lambda file: file.stat().st_mtime)
    return [json.loads(file.read_text()) for file in files]


def test_a_run_from_the_hub_is_that_of_the_same_files_in_folders(
    hub: Hub, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    for name, data in pairs("The answer is {}.").items():
        (tmp_path / name).write_bytes(data)
    files = (f"model.path={tiny_llama_dir}", "task.train_file=train.jsonl", "task.eval_file=test.jsonl")
    for overrides in ((), (*files, "output_dir=local", "cache_dir=apart")):
        done = run(hub, tmp_path, *overrides)
        assert done.returncode == 0, done.stderr
    [metrics], [of_files] = metrics_in(tmp_path / "outputs"), metrics_in(tmp_path / "local")
    assert metrics["scores"] == of_files["scores"]
    commit = hub.repositories["me/tiny"].names["main"]
    [report] = (tmp_path / "outputs").glob("**/init_report.json")
    assert commit in report.read_text(), "what was quantized is named by its commit"
    asked = len(hub.requests)
    again = run(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(metrics_in(tmp_path / "outputs")) == 1
    assert len(hub.requests) == asked


@pytest.mark.slow
def test_a_new_commit_of_the_data_is_scored_anew(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "stages=[quantize,evaluate]").returncode == 0
    [first] = metrics_in(tmp_path / "outputs")
    hub.publish("datasets/me/pairs", pairs("It makes {}."))
    done = run(hub, tmp_path, "stages=[quantize,evaluate]")
    assert done.returncode == 0, done.stderr
    second = metrics_in(tmp_path / "outputs")[-1]
    assert first["scores"] != second["scores"]
    assert first["init"] | {"cache_hits": 0, "computed": 0} == second["init"] | {"cache_hits": 0, "computed": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.path=me/tyni"], "model.path=me/tyni"),
        (["task.dataset=me/paris"], "me/paris"),
        (["task.eval_split=tests"], "tests"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path, overrides: list[str], named: str) -> None:
    done = run(hub, tmp_path, *overrides)
    assert done.returncode == 1
    assert named in done.stderr
    *bars, last = done.stderr.splitlines()  # the bars are those of the hub's own client
    assert last.startswith("error: ")
    assert not any("Traceback" in line or "error" in line for line in bars)
    assert not metrics_in(tmp_path / "outputs")


def test_a_revision_of_the_data_is_not_replaced_by_the_copy_that_was_cached_last(hub: Hub, tmp_path: Path) -> None:
    old = hub.publish("datasets/me/pairs", pairs("old {}"), "v1")

    def first_row(revision: str | None, **environment: str) -> str:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        asked = f"kind='instruct', dataset='me/pairs', train_split='train', dataset_revision={revision!r}"
        code = f"from loftq_exp.tasks import *; print(load_task(task_settings({asked})).rows('train')[0]['completion'])"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings | environment, text=True,
                              capture_output=True, timeout=100)  # fmt: skip
        return (done.stdout or done.stderr).splitlines()[-1]

    assert (first_row("v1"), first_row(None)) == ("old 2", "The answer is 2.")
    for revision in ("v1", old):
        said = first_row(revision, HF_HUB_OFFLINE="1")
        assert f"task.dataset_revision={revision}: the hub cannot be reached, and the copy" in said, said
    assert first_row(None, HF_HUB_OFFLINE="1") == "The answer is 2."
    assert first_row("v1") == "old 2"


def test_a_data_set_of_several_configs_names_the_setting(hub: Hub, tmp_path: Path) -> None:
    files = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in "ab"]
    rows = pairs("{}")["train.jsonl"]
    card = f"---\nconfigs: {json.dumps(files)}\n---\n".encode()
    hub.publish("datasets/me/pairs", {"README.md": card, "a.jsonl": rows, "b.jsonl": rows})
    done = run(hub, tmp_path)
    assert done.returncode == 1
    assert "among the available configs: ['a', 'b']" in done.stderr
    assert "check these settings and task.dataset_config" in done.stderr
