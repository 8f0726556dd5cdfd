"""`loftq-exp report`: the runs and sweeps that it finds, and what it writes about them."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from recorded import metrics, write

from loftq_exp.commands import write_report as command
from loftq_exp.commands.dispatch import main as loftq_exp_main


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, and a sweep over one of them, a third that was deleted since, and one that failed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = tmp_path / "outputs"
    write(folder / "runs" / "a" / "metrics.json", metrics({"accuracy": 0.5}, rank=8))
    write(folder / "runs" / "b" / "metrics.json", metrics(rank=16))
    for number, (found, error) in enumerate(
        [(metrics({"accuracy": 0.25}, rank=8), None), (metrics({"accuracy": 0.75}, rank=32), None), (None, "no memory")]
    ):
        job = {"number": number, "overrides": [f"seed={number}"], "error": error, "metrics": found}
        write(folder / "sweeps" / "s" / f"job-000{number}.json", job)
    return folder


@pytest.fixture
def sweep(outputs: Path) -> Path:
    """Two methods at two ranks with three seeds each."""
    folder = outputs / "sweep"
    for method, iterations in (("qlora", 0), ("loftq", 5)):
        for rank in (8, 16):
            for seed in range(3):
                accuracy = 0.3 + rank / 100 + iterations / 50 + (seed - 1) / 100
                found = metrics(
                    {"accuracy": accuracy, "nll": 2 - accuracy}, method=method, iter=iterations, rank=rank, seed=seed
                )
                write(folder / f"{method}-{rank}-{seed}" / "metrics.json", found)
    return folder


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert command.main([*arguments, "--format", "json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def names(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [row["name"] for row in rows(capsys, *arguments)]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main([*arguments]) == 0
    return capsys.readouterr().out


ALL = ["QLoRA NF4 r8", "QLoRA NF4 r16", "LoftQ NF4 iter 5 r8", "LoftQ NF4 iter 5 r16"]


def test_json_is_a_list_of_rows_with_settings_and_scores(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "outputs/runs")
    once = {"mean": 0.5, "std": None, "n": 1, "low": None, "high": None}
    assert [(row["settings"]["quant"]["rank"], row["scores"]) for row in found] == [(8, {"accuracy": once}), (16, {})]
    assert found[0]["settings"] == {
        name: group for name, group in metrics({}, rank=8)["config"].items() if name != "train"
    }
    assert found[0]["runs"] == [
        {
            "run": "tiny-8rank-qlora",
            "file": "outputs/runs/a/metrics.json",
            "state": "done",
            "seed": 11,
            "scores": {"accuracy": 0.5},
        }
    ]


def test_json_has_mean_spread_and_interval_over_seeds(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "outputs/sweep", "--baseline", "qlora")
    assert [row["name"] for row in found] == [*ALL[2:], *ALL[:2]]
    (row,) = [row for row in found if row["name"] == "LoftQ NF4 iter 5 r8"]
    half = 4.302652729749464 * 0.01 / 3**0.5  # the 97.5 % quantile of t with 2 degrees of freedom
    assert row["scores"]["accuracy"] == pytest.approx(
        {"mean": 0.48, "std": 0.01, "n": 3, "low": 0.48 - half, "high": 0.48 + half}
    )
    assert row["differences"]["accuracy"]["mean"] == pytest.approx(0.1)
    assert row["differences"]["accuracy"]["std"] == pytest.approx(0, abs=1e-12)
    assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
    assert "seed" not in row["settings"]


def test_a_run_counts_once_and_its_own_record_wins(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(place: str) -> dict[int, float | None]:
        return {
            row["settings"]["quant"]["rank"]: row["scores"].get("accuracy", {}).get("mean")
            for row in rows(capsys, place)
        }

    assert found("outputs") == {8: 0.5, 16: None, 32: 0.75}
    assert found("outputs/sweeps/s") == {8: 0.25, 32: 0.75}


@pytest.mark.parametrize("absolute", [False, True])
def test_folders_globs_and_files(outputs: Path, capsys: pytest.CaptureFixture[str], absolute: bool) -> None:
    start = f"{outputs}" if absolute else "outputs"
    both = ["QLoRA NF4 r8", "QLoRA NF4 r16"]
    assert names(capsys, f"{start}/runs/[ab]") == both
    assert names(capsys, f"{start}/runs/b", f"{start}/runs/a") == both
    assert names(capsys, *map(str, outputs.glob("runs/*/*"))) == both  # as the shell expands it
    assert names(capsys, f"{start}/sweeps/s/*") == ["QLoRA NF4 r8", "QLoRA NF4 r32"]


@pytest.mark.parametrize("form", ["csv", "html"])
def test_an_output_that_cannot_be_written_is_one_line(
    outputs: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert command.main(["outputs/runs", "--format", form, "--output", "absent/file"]) == 1
    assert capsys.readouterr().err == "error: --output=absent/file: cannot be written (No such file or directory)\n"


def test_the_other_forms(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(csv.DictReader(io.StringIO(shown(capsys, "outputs/runs", "--format", "csv"))))
    assert [
        (row["name"], row["quant.rank"], row["accuracy"], row["accuracy.std"], row["weight_error"]) for row in found
    ] == [
        ("QLoRA NF4 r8", "8", "0.5", "", "0.1"),
        ("QLoRA NF4 r16", "16", "", "", "0.1"),
    ]
    assert shown(capsys, "outputs/runs", "--format", "markdown", "--output", "table.md") == ""
    lines = Path("table.md").read_text().splitlines()
    assert lines[0] == "| run | bits | rank | weight error | accuracy | init s | train s | backbone MB | adapter MB |"
    assert lines[2] == "| QLoRA NF4 | 4.25 | 8 | 0.1000 | 50.0% | 2.0 | - | 2 | 0.1 |"
    out = shown(capsys, "outputs/runs")
    assert "2 runs" in out
    assert "50.0%" in out
    assert "single runs" not in out


def test_the_terminal_shows_rows_and_below_them_the_single_runs(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, "outputs/sweep", "--baseline", "qlora")
    above, below = out.split("12 single runs")
    assert "4 rows of 12 runs" in above
    for text in ("38.0% ± 1.0%", "[35.5%, 40.5%]", "+10.0% [+10.0%, +10.0%]", "the nearest qlora row"):
        assert text in above
    assert [line.split("│")[2].strip() for line in below.splitlines() if line.startswith("│")] == ["0", "1", "2"] * 4


@pytest.mark.parametrize("width", [30, 60, 80, 100, 150])
def test_a_narrow_terminal_drops_columns_and_no_digits(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    whole = set(re.findall(r"[\d.]+%?", shown(capsys, "outputs/sweep", "--baseline", "qlora")))
    monkeypatch.setenv("COLUMNS", str(width))
    out = shown(capsys, "outputs/sweep", "--baseline", "qlora")
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    for table in out.split("single runs"):
        cells = [line for line in table.splitlines() if line.startswith("│")]
        assert cells
        assert set(re.findall(r"[\d.]+%?", " ".join(cells))) <= whole
    assert re.search(r"no room for: [^;]*backbone\s+MB,\s+adapter\s+MB;\s+--format\s+csv", out)


def test_csv_has_all_digits(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(csv.DictReader(io.StringIO(shown(capsys, "outputs/sweep", "--format", "csv", "--baseline", ALL[0]))))
    as_json = {row["name"]: row for row in rows(capsys, "outputs/sweep", "--baseline", ALL[0])}
    assert len(found) == 4
    for row in found:
        for name in ("accuracy", "nll"):
            for statistic in ("std", "n", "low", "high"):
                assert float(row[f"{name}.{statistic}"]) == as_json[row["name"]]["scores"][name][statistic]
            assert float(row[name]) == as_json[row["name"]]["scores"][name]["mean"]
        difference = as_json[row["name"]]["differences"].get("nll")
        assert row["nll.difference"] == ("" if difference is None else repr(difference["mean"]))


def test_latex_is_a_tabular_with_everything_escaped(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, decay in ((0, "a_b"), (1, "a_b"), (0, r"50%&{x}#~^\$")):
        accuracy = 0.3 if decay == "a_b" else 0.2
        found = metrics({"accuracy": accuracy + seed / 10}, seed=seed, method="loftq", iter=1, train__optim=decay)
        write(outputs / "more" / f"{seed}-{len(decay)}" / "metrics.json", found)
    text = shown(capsys, "outputs/more", "--format", "latex", "--baseline", "LoftQ NF4 iter 1 r8 optim=a_b")
    lines = text.splitlines()
    for rule in ("toprule", "midrule", "bottomrule"):
        assert lines.count(f"\\{rule}") == 1
    (b, a) = [line for line in lines if line.startswith("LoftQ")]
    assert r"& a\_b &" in a
    assert r"& 35.0\% $\pm$ 7.1\% &" in a
    assert r"& 50\%\&\{x\}\#\textasciitilde{}\textasciicircum{}\textbackslash{}\$ &" in b
    assert "& $-$10.0\\% &" in b
    columns = re.search(r"begin\{tabular\}\{(\w+)\}", text)
    assert columns is not None
    for row in (a, b):
        assert len(re.split(r"(?<!\\)&", row)) == len(columns[1])
        assert row.endswith(r"\\")


@pytest.mark.parametrize(("filters", "left"), [
    (["rank>8"], [ALL[3], ALL[1]]),
    (["quant.rank=8", "method=loftq"], [ALL[2]]),
    (["method!=loftq"], [ALL[0], ALL[1]]),
    (["accuracy<0.4"], [ALL[0]]),
    (["nll <= 1.56", "rank= 16.0"], [ALL[3], ALL[1]]),
    (["backbone_bytes>=2e6", "task=gsm8k", "model=tiny", "alpha=null"], [ALL[2], ALL[3], ALL[0], ALL[1]]),
])  # fmt: skip
def test_filters(sweep: Path, capsys: pytest.CaptureFixture[str], filters: list[str], left: list[str]) -> None:
    assert names(capsys, "outputs/sweep", *(f"--filter={each}" for each in filters)) == left


def test_a_filter_on_seeds_leaves_runs_and_a_baseline_may_be_filtered_out(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, "outputs/sweep", "--filter", "seed!=0", "--filter", "method=loftq", "--baseline", "qlora")
    assert [(row["name"], row["scores"]["nll"]["n"]) for row in found] == [(ALL[2], 2), (ALL[3], 2)]
    assert [row["differences"]["nll"]["mean"] for row in found] == pytest.approx([-0.1, -0.1])


@pytest.mark.parametrize(("sort", "order"), [
    (["--sort", "nll"], [3, 2, 1, 0]),
    (["--sort", "-nll"], [0, 1, 2, 3]),
    (["--sort=-rank"], [3, 1, 2, 0]),
    (["--sort", "-quant.method"], [0, 1, 2, 3]),
])  # fmt: skip
def test_sort(sweep: Path, capsys: pytest.CaptureFixture[str], sort: list[str], order: list[int]) -> None:
    assert names(capsys, "outputs/sweep", *sort) == [ALL[index] for index in order]


def test_rows_without_a_value_are_last(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sort in ("accuracy", "-accuracy"):
        assert names(capsys, "outputs", "--sort", sort)[-1] == "QLoRA NF4 r16"


def test_groups_follow_from_model_and_task_or_are_chosen(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "outputs/sweep", "--format", "markdown", "--group-by", "rank")
    assert [line for line in out.splitlines() if line.startswith("**")] == [
        "**quant.rank=8: 2 rows of 6 runs**",
        "**quant.rank=16: 2 rows of 6 runs**",
    ]
    write(sweep / "other" / "metrics.json", metrics({"nll": 1.0}, task__kind="wikitext", seed=0))
    out = shown(capsys, "outputs/sweep", "--format", "markdown")
    assert [line for line in out.splitlines() if line.startswith("**")] == [
        "**gsm8k: 4 rows of 12 runs**",
        "**wikitext: 1 run**",
    ]
    assert "accuracy" not in out.split("**wikitext")[1]


def test_columns_follow_from_what_differs(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate, decay in ((1e-4, 0.1), (1e-3, 0.1), (1e-3, 0.0)):
        found = metrics({"nll": 1.0}, train__learning_rate=rate, train__weight_decay=decay, train__optim="adamw_torch")
        write(outputs / "more" / f"{rate}-{decay}" / "metrics.json", found)
    heading, _, *lines = shown(capsys, "outputs/more", "--format", "markdown").splitlines()
    assert heading.startswith("| run | bits | rank | learning_rate | weight_decay | weight error | NLL |")
    assert [line.split(" | ")[3:5] for line in lines] == [["0.0001", "0.1"], ["0.001", "0.0"], ["0.001", "0.1"]]


def test_a_run_that_is_not_finished_is_shown(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = metrics(rank=8, seed=3)["config"] | {"stages": ["quantize", "finetune", "evaluate"]}
    write(
        outputs / "runs" / "c" / "config.json", {"format": 2, **config, "initialisation": {"key": "0", "folder": "f"}}
    )
    write(outputs / "inits" / "model" / "config.json", {"model_type": "llama"})
    (first, _) = rows(capsys, "outputs/runs")
    assert (first["scores"]["accuracy"]["n"], [run["state"] for run in first["runs"]]) == (1, ["unfinished", "done"])
    out = shown(capsys, "outputs/runs", "outputs/inits")
    assert "1 of the runs is not finished" in out
    assert "50.0% (n 1)" in out
    assert len(re.findall(r"│ unfinished +│", out)) == 1


@pytest.mark.parametrize("form", ["table", "json", "csv", "markdown", "latex", "html"])
def test_a_failed_job_is_named_with_its_reason(
    outputs: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert command.main(["outputs", "--format", form, *["--output=page.html"] * (form == "html")]) == 0
    assert caplog.messages[0] == "outputs/sweeps/s: job 2 failed: no memory (seed=2)"
    if form == "json":
        json.loads(capsys.readouterr().out)
    if form == "html":
        assert "job 2 failed: no memory\n<pre>seed=2</pre>" in Path("page.html").read_text()


def test_a_run_that_failed_is_told_from_one_that_runs(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (3, 4):
        config = metrics(rank=8, seed=seed)["config"] | {"stages": ["quantize"]}
        write(outputs / "runs" / str(seed) / "config.json", {"format": 2, **config, "initialisation": {"key": "0"}})
    job = {"number": 3, "overrides": ["seed=4"], "error": "no memory", "metrics": None, "config": config}
    write(outputs / "sweeps" / "s" / "job-0003.json", job)
    states = [run["state"] for row in rows(capsys, "outputs") for run in row["runs"]]
    assert sorted(states) == ["done", "done", "done", "failed", "unfinished"]
    assert "1 of the runs is not finished" in (said := shown(capsys, "outputs"))
    assert "1 of the runs failed" in said


def test_a_sweep_of_which_every_job_failed(outputs: Path, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    assert command.main(["outputs/sweeps/s/job-0002.json"]) == 1
    assert caplog.messages == ["outputs/sweeps/s: job 2 failed: no memory (seed=2)"]
    assert capsys.readouterr().err.endswith("error: outputs/sweeps/s/job-0002.json: every job failed, as said above\n")


def test_the_history_of_a_search_goes_on_over_its_sweeps(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sweeps, as after a kill. The second has a failed job."""
    for folder, values in (("1", [0.5, 0.7]), ("2", [None, 0.6, 0.9])):
        write(outputs / "search" / folder / "sweep.json", {"jobs": None, "direction": "maximize"})
        for number, value in enumerate(values):
            rank = 8 * (number + 1) + len(folder) * int(folder)
            found = metrics({"accuracy": value}, rank=rank) if value else None
            if found:
                found["config"]["objective"] = "accuracy"
            job = {
                "number": number,
                "overrides": [f"quant.rank={rank}"],
                "error": None if found else "no memory",
                "metrics": found,
            }
            write(outputs / "search" / folder / f"job-000{number}.json", job)
    best = "best of 4 trials: accuracy 0.9 with quant.rank=26"
    assert best in shown(capsys, "outputs/search")
    assert command.main(["outputs/search", "--format", "html"]) == 0
    page = Path("report.html").read_text()
    assert best.capitalize() in page
    titles = re.findall(r"best up to trial \d: [\d.]+", page)
    assert list(dict.fromkeys(titles)) == [f"best up to trial {at}" for at in ("0: 0.5", "1: 0.7", "3: 0.7", "4: 0.9")]
    assert shown(capsys, "outputs/sweeps").find("best of") == -1


def test_what_is_no_record_is_left_out_with_a_warning(
    outputs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (outputs / "runs" / "a" / "metrics.json").write_text('{"label": "half')
    broken = [{"label": "another program's"}, {**metrics(), "scores": {"nll": "low"}}, {**metrics(), "config": {"quant": 4}},
              metrics(method="of another version")]  # fmt: skip
    for number, content in enumerate(broken):
        write(outputs / "runs" / f"b{number or ''}" / "metrics.json", content)
    assert names(capsys, "outputs") == ["QLoRA NF4 r8", "QLoRA NF4 r32"]
    assert caplog.messages[:-1] == [
        f"outputs/runs/{name}/metrics.json: not the metrics of a run; skipped" for name in ("a", "b", "b1", "b2", "b3")
    ]


def test_scores_that_are_not_finite_are_absent(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(outputs / "runs" / "a" / "metrics.json", metrics({"accuracy": float("nan"), "nll": 1.0}))
    assert list(rows(capsys, "outputs/runs/a")[0]["scores"]) == ["nll"]


def test_it_is_a_command_and_a_module(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loftq_exp_main(["report", "outputs/runs", "--format", "csv"]) == 0
    assert capsys.readouterr().out == shown(capsys, "outputs/runs", "--format", "csv")


@pytest.mark.parametrize(("arguments", "message"), [
    (["outputs/nothing"], "outputs/nothing: there is no such folder; give a run, a sweep or a folder of them"),
    (["outputs/empty*"], "outputs/empty*: there is no such folder"),
    (["empty"], "empty: there is no run with a metrics.json, and no sweep, in it"),
    (["outputs", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
    (["outputs", "--output", "f"],
     "--output=f: --format=table is for the terminal only; add --format json, csv, markdown, latex or html"),
    (["outputs", "--format", "csv", "--output", "no/f"], "--output=no/f: cannot be written (No such file or directory)"),
    (["outputs", "--baseline", "lora"], "--baseline=lora: no row matches; choose from: qlora, QLoRA NF4 r8, QLoRA NF4 r16"),
    (["outputs", "--filter", "rank"], "--filter=rank: not readable; give NAME=VALUE, or NAME with !=, <, >, <= or >= and a value"),
    (["outputs", "--filter", "rank<many"], "--filter=rank<many: < needs a number; give rank<NUMBER"),
    (["outputs", "--filter", "rnak=8"], "--filter=rnak: there is no such name; did you mean 'rank'?"),
    (["outputs", "--filter", "rank=8", "--filter", "rank=9"], "--filter=rank=9: no row is left of 3; loosen a filter"),
    (["outputs", "--sort", "-xxyyzz"], "--sort=xxyyzz: there is no such name; give a setting, such as quant.rank, or accuracy, "),
    (["outputs", "--sort", "revision"], "--sort=revision: several settings have this name; choose from: hub.revision, "),
    (["sweep", "--sort", "seed"], "--sort=seed: the runs of QLoRA NF4 r8 differ in it; give a setting that differs between rows"),
    (["sweep", "--group-by", "seed"], "--group-by=seed: the runs of QLoRA NF4 r8 differ in it"),
    (["outputs", "--group-by", "accuracy"], "--group-by=accuracy: there is no such name; "),
    ([], "the following arguments are required: DIR"),
])  # fmt: skip
def test_refused_in_one_line(
    outputs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty").mkdir()
    for seed in (0, 1):
        write(Path("sweep") / str(seed) / "metrics.json", metrics({"accuracy": 0.5}, seed=seed))
    assert command.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
