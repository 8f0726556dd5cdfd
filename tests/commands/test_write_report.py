"""`python -m loftq_exp.report`: the runs and sweeps that it finds, and what it writes about them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from loftq_exp.commands import write_report as command


def metrics(rank: int, accuracy: float | None) -> dict[str, Any]:
    quant = {"method": "qlora", "type": "nf", "bits": 4, "rank": rank, "iter": 0}
    column = {"title": "accuracy", "scores": ["accuracy"], "form": "{:.1%}", "scale": 1.0}
    return {
        "label": f"tiny-{rank}",
        "config": {"quant": quant, "task": {"kind": "gsm8k"}},
        "table": [column],
        "scores": {} if accuracy is None else {"accuracy": accuracy},
        "seconds": {},
        "published": None,
        "init": {"bits_per_weight": 4.25, "mean_error": 0.1},
        "backbone_bytes": 2_000_000,
        "adapter_bytes": 100_000,
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, and a sweep over one of them, a third that was deleted since, and one that failed."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs"
    write(folder / "runs" / "a" / "metrics.json", metrics(8, 0.5))
    write(folder / "runs" / "b" / "metrics.json", metrics(16, None))
    for number, (found, error) in enumerate([(metrics(8, 0.25), None), (metrics(32, 0.75), None), (None, "no memory")]):
        write(folder / "sweeps" / "s" / f"job-000{number}.json", {"number": number, "error": error, "metrics": found})
    return folder


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert command.main([*arguments, "--format", "json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_json_is_a_list_of_rows_with_settings_and_scores(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "outputs/runs")
    assert [(row["settings"]["quant"]["rank"], row["scores"]) for row in found] == [(8, {"accuracy": 0.5}), (16, {})]
    assert found[0]["settings"] == metrics(8, 0.5)["config"]
    assert (found[0]["run"], found[0]["file"]) == ("tiny-8", "outputs/runs/a/metrics.json")


def test_a_run_counts_once_and_its_own_record_wins(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {row["run"]: row["scores"].get("accuracy") for row in rows(capsys, "outputs")}
    assert ranks == {"tiny-8": 0.5, "tiny-16": None, "tiny-32": 0.75}
    assert {row["run"]: row["scores"]["accuracy"] for row in rows(capsys, "outputs/sweeps/s")} == {
        "tiny-8": 0.25,
        "tiny-32": 0.75,
    }


@pytest.mark.parametrize("absolute", [False, True])
def test_folders_and_globs(outputs: Path, capsys: pytest.CaptureFixture[str], absolute: bool) -> None:
    start = f"{outputs}" if absolute else "outputs"
    assert [row["run"] for row in rows(capsys, f"{start}/runs/[ab]")] == ["tiny-8", "tiny-16"]
    assert [row["run"] for row in rows(capsys, f"{start}/runs/b", f"{start}/runs/a")] == ["tiny-8", "tiny-16"]


def test_the_other_forms_have_the_columns_of_the_table(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["outputs/runs", "--format", "csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["rank"], row["accuracy"], row["weight error"]) for row in found] == [
        ("8", "50.0%", "0.1000"),
        ("16", "-", "0.1000"),
    ]
    assert command.main(["outputs/runs", "--format", "markdown", "--output", "table.md"]) == 0
    assert capsys.readouterr().out == ""
    lines = Path("table.md").read_text().splitlines()
    assert lines[0] == "| run | bits | rank | weight error | accuracy | init s | train s | backbone MB | adapter MB |"
    assert lines[2] == "| QLoRA NF4 | 4.25 | 8 | 0.1000 | 50.0% | - | - | 2 | 0.1 |"
    assert command.main(["outputs/runs"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs" in shown
    assert "50.0%" in shown


def test_what_is_no_record_is_left_out_with_a_warning(
    outputs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (outputs / "runs" / "a" / "metrics.json").write_text('{"label": "half')
    write(outputs / "runs" / "b" / "metrics.json", {"label": "another program's"})
    assert [row["run"] for row in rows(capsys, "outputs")] == ["tiny-8", "tiny-32"]
    assert caplog.messages == [
        f"outputs/runs/{name}/metrics.json: not the metrics of a run; skipped" for name in ("a", "b")
    ]


@pytest.mark.parametrize(("arguments", "message"), [
    (["outputs/nothing"], "outputs/nothing: there is no such folder; give a run, a sweep or a folder of them"),
    (["outputs/empty*"], "outputs/empty*: there is no such folder"),
    (["empty"], "empty: there is no run with a metrics.json, and no sweep, in it"),
    (["outputs", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
    (["outputs", "--output", "f"], "--output=f: --format=table is for the terminal only; add --format json, csv or markdown"),
    (["outputs", "--format", "csv", "--output", "no/f"], "--output=no/f: cannot be written (No such file or directory)"),
    ([], "the following arguments are required: DIR"),
])  # fmt: skip
def test_refused_in_one_line(
    outputs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty").mkdir()
    assert command.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
