"""A multirun that is cut short goes on: after kill -9, after Ctrl-C, and after a job failed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from loftq_exp.commands import dispatch, sweep
from loftq_exp.errors import UserError
from loftq_exp.report.jobs import all_jobs
from loftq_exp.training import finetune

JOBS = ("-m", "quant.rank=2,4", "quant.iter=1", "train.max_steps=1")


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report.html: its plots take seconds."""
    monkeypatch.setattr("loftq_exp.report.sweep.write_page", lambda *_: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """The work that was done since the last call, in any process: what was decomposed, trained and scored."""
    log = tmp_path / "calls"

    def counted(name: str, place: str, key: Callable[..., str]) -> None:
        module, _, attribute = place.rpartition(".")
        work = getattr(__import__(module, fromlist=[attribute]), attribute)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = work(*arguments, **named)
            with log.open("a") as lines:  # once it is done: half a job is no job
                lines.write(f"{name} {key(*arguments)}\n")
            return result

        monkeypatch.setattr(place, wrapped)

    counted("initialise", "loftq_exp.pipeline.initialise", lambda _, config: str(config.quant.rank))
    counted("finetune", "loftq_exp.training.finetune.finetune", lambda *given: str(given[3].quant.rank))
    counted("score", "loftq_exp.evaluation.score.score", lambda *given: str(given[5].quant.rank))

    def taken() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return taken


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], object]) -> None:
    """Do the work in a process that is killed in its course, as by kill -9."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def resume(cli: Any, *arguments: str) -> Any:
    return cli.call(lambda: dispatch.main(["sweep", "resume", *arguments]))


def the_sweep() -> Path:
    (folder,) = Path("outputs/sweeps").iterdir()
    return folder.resolve()


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table.csv, without times and places."""
    with (folder / "table.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    own = {
        name
        for row in rows
        for name in row
        if "seconds" in name or "memory" in name or "folder" in name or "file" in name
    }
    return [{name: value for name, value in row.items() if name not in own} for row in rows]


def kill_after_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Die between the first job and the second."""
    monkeypatch.setattr("loftq_exp.commands.run.Sweep.progress", die)


def kill_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Die in the second job, when it has its initialisation."""
    work = finetune.finetune
    monkeypatch.setattr(finetune, "finetune",
                        lambda *given: die() if given[3].quant.rank == 4 else work(*given))  # fmt: skip


def test_after_kill_9_only_what_is_missing_is_run(cli: Any, calls: Callable[[], list[str]]) -> None:
    everything = [f"{stage} {rank}" for rank in (2, 4) for stage in ("initialise", "finetune", "score")]
    assert cli(*cli.tiny, *JOBS, "output_dir=whole").code == 0
    assert calls() == everything
    (whole,) = Path("whole/sweeps").iterdir()
    for kill, done in ((kill_after_record, 3), (kill_in_training, 4)):
        shutil.rmtree("outputs", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patched:
            kill(patched)
            killed(lambda: cli(*cli.tiny, *JOBS))
        assert calls() == everything[:done]
        folder = the_sweep()
        outcome = cli(*cli.tiny, *JOBS) if kill is kill_after_record else resume(cli, str(folder))
        assert outcome.code == 0, outcome
        assert f"sweep {folder} goes on: 1 of 2 jobs done, 0 failed, 1 missing\n" in outcome.out
        assert "job 0:" not in outcome.out
        assert calls() == ["initialise 4", *everything[4:]]
        assert (
            outcome.out.count("quantize: done before") == done - 3
        )  # that initialisation is found, and not made again
        assert the_sweep() == folder
        assert table(folder) == table(whole)


def test_a_model_by_its_path_alone_has_each_job_once(cli: Any, tiny_llama_dir: Path) -> None:
    """The command adds model=auto to a model.path without a group, and a plan and its records are of the same overrides."""
    outcome = cli("-m", f"model.path={tiny_llama_dir}", "device=cpu", "stages=[quantize]", "quant.rank=2,4")
    assert outcome.code == 0, outcome.err
    found = sweep.Sweep.read(the_sweep())
    assert found is not None
    assert found.states == {"done": 2}
    assert not [job for job in all_jobs(the_sweep()) if job.missing]


def test_a_finished_sweep_is_asked_of_the_runs_again(cli: Any, calls: Callable[[], list[str]]) -> None:
    """Its jobs' results are found by their keys, so that data that changed since is seen."""
    jobs = ("-m", "stages=[quantize]", "quant.rank=2,4")
    assert [cli(*cli.tiny, *jobs).code for _ in range(2)] == [0, 0]
    assert len(list(Path("outputs/sweeps").iterdir())) == 2
    assert not list(Path("outputs/sweeps").glob("*/.*"))


def test_a_setting_that_follows_another_has_each_jobs_value(cli: Any, calls: Callable[[], list[str]]) -> None:
    following = (*cli.tiny, *JOBS, "calibration.seed=${quant.rank}")
    assert "sweep: 2 of 2 jobs done\n" in cli(*following).out
    records = [json.loads(record.read_text()) for record in sorted(the_sweep().glob("job-*.json"))]
    assert [record["metrics"]["config"]["calibration"]["seed"] for record in records] == [2, 4]
    assert len(calls()) == 6
    assert "goes on: 2 of 2 jobs done" in resume(cli, str(the_sweep())).out
    assert calls() == []


def test_failed_jobs_are_named_and_run_again_on_request(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_exp import pipeline

    initialise, broken = pipeline.initialise, [True]

    def sometimes(source: Any, config: Any) -> Any:
        if broken and config.quant.rank == 4:
            raise UserError("save_dir=x: the disk is full")
        return initialise(source, config)

    monkeypatch.setattr(pipeline, "initialise", sometimes)
    command = (*cli.tiny, "-m", "stages=[quantize]", "quant.rank=2,4")
    said = cli.refused(*command)
    folder = the_sweep()
    assert said.endswith(f"to run them again: loftq-exp sweep resume {folder} --failed")
    broken.clear()
    for outcome in (cli(*command), resume(cli, str(folder))):
        assert outcome.code == 1
        assert "goes on: 1 of 2 jobs done, 1 failed, 0 missing" in outcome.out
        assert "job 1 failed: save_dir=x: the disk is full" in outcome.out
        assert "quantize:" not in outcome.out
    outcome = resume(cli, str(folder), "--failed")
    assert outcome.code == 0, outcome
    assert "job 1 failed" not in outcome.out
    assert outcome.out.count("quantize: outputs/inits/") == 1
    assert "sweep: 2 of 2 jobs done\n" in outcome.out


def test_ctrl_c_says_how_to_go_on(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_exp import pipeline

    initialise = pipeline.initialise

    def interrupted(source: Any, config: Any) -> Any:
        if config.quant.rank == 4:
            raise KeyboardInterrupt
        return initialise(source, config)

    monkeypatch.setattr(pipeline, "initialise", interrupted)
    said = cli.refused(*cli.tiny, "-m", "stages=[quantize]", "quant.rank=2,4,8", code=130)
    folder = the_sweep()
    assert said.startswith("interrupted: 1 of 3 jobs done, about ")
    assert said.endswith(f" left; go on with: loftq-exp sweep resume {folder}")
    monkeypatch.setattr(pipeline, "initialise", initialise)
    monkeypatch.chdir("/")  # the command goes back to where the sweep was begun
    outcome = resume(cli, str(folder))
    assert outcome.code == 0
    assert sorted(path.name for path in folder.parents[1].iterdir()) == ["cache", "inits", "runs", "sweeps"]


def test_a_job_whose_rows_changed_since_is_run_again(cli: Any, calls: Callable[[], list[str]]) -> None:
    rows = Path("rows.jsonl")
    rows.write_text('{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n' * 4)
    command = (*cli.tiny, "task=gsm8k", "task.train_file=rows.jsonl", "stages=[quantize,finetune]", "train.max_steps=1",
               "-m", "quant.rank=2,100000")  # fmt: skip
    assert cli(*command).code == 1
    assert calls() == ["initialise 2", "finetune 2"]
    assert cli(*command).code == 1
    assert calls() == []
    rows.write_text('{"question": "What is 2 + 2?", "answer": "2 + 2 = 4\\n#### 4"}\n' * 4)
    outcome = cli(*command)
    assert "job 0: done before, but its settings or its files changed since" in outcome.out
    assert "finetune 2" in calls()


def test_a_sweep_that_runs_is_left_alone(cli: Any) -> None:
    command = (*cli.tiny, "-m", "stages=[quantize]", "quant.rank=100000,2")
    cli(*command)
    folder = the_sweep()
    with FileLock(folder / ".running.lock"):
        outcome = resume(cli, str(folder))
        assert outcome.err == f"error: {folder}: is running; wait for it, or end that process first\n"
        cli(*command)
    assert len(list(Path("outputs/sweeps").iterdir())) == 2


def test_what_cannot_be_resumed(cli: Any) -> None:
    Path("empty").mkdir()
    assert resume(cli, "empty").err.startswith(
        f"error: {Path('empty').resolve()}: no sweep (there is no sound sweep.json in it)"
    )
    cli(*cli.tiny, "-m", "stages=[quantize]", "quant.rank=100000,2")
    plan = the_sweep() / sweep.PLAN
    kept = json.loads(plan.read_text())
    for change, said in (
        ({"jobs": kept["jobs"][:1]}, "its arguments give other jobs than at its start"),
        ({"jobs": None}, "its sweeper chooses the jobs as it goes"),
        ({"place": "/no/such"}, "its command was run in /no/such, which cannot be entered"),
    ):
        plan.write_text(json.dumps(kept | change))
        outcome = resume(cli, str(plan.parent))
        assert outcome.code == 1
        assert said in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(("baseline", "said"), [
    ("lora", "report.baseline=lora: no row matches; choose from: loftq, qlora, LoftQ NF4 iter 5 r2, "),
    ("LoftQ r2", "report.baseline=LoftQ r2: no row matches; choose from: "),
    ("lora,qlora", "report.baseline=lora,qlora: a sweep has one baseline; give one of them"),
])  # fmt: skip
def test_a_baseline_that_no_job_will_have_is_refused_before_the_first(cli: Any, baseline: str, said: str) -> None:
    command = (*cli.tiny[:-1], "-m", "quant=loftq,qlora", "quant.rank=2,4,100000", f"report.baseline={baseline}")
    assert cli.refused(*command).startswith(said)
    assert not Path("outputs").exists()


@pytest.mark.parametrize(("jobs", "said"), [
    (["quant.rank=2,4", "objective=rouge"], "objective=rouge: arithmetic has no such score; choose from: nll, accuracy"),
    (["task=arithmetic,instruct", "objective=f1"], "objective=f1: instruct has no such score; choose from: "),
    (["objective=f1,bleu"], "objective=bleu: arithmetic has no such score; choose from: nll, accuracy"),
])  # fmt: skip
def test_an_objective_that_no_job_has_is_refused_before_the_first(cli: Any, jobs: list[str], said: str) -> None:
    assert cli.refused(*cli.tiny, "-m", *jobs).startswith(said)
    assert not Path("outputs").exists()


def test_an_objective_that_one_job_has(cli: Any) -> None:
    outcome = cli(*cli.tiny, "-m", "stages=[quantize,evaluate]", "objective=accuracy,rouge")
    assert outcome.code == 1
    assert outcome.err.startswith("error: not every job succeeded")
    assert "objective=rouge: arithmetic has no such score" in outcome.out
    done = [json.loads(path.read_text())["metrics"] for path in sorted(Path("outputs/sweeps").glob("*/job-*.json"))]
    assert [bool(metrics) for metrics in done] == [True, False]


def test_a_baseline_that_a_job_will_have(cli: Any) -> None:
    outcome = cli(
        *cli.tiny,
        "-m",
        "stages=[quantize]",
        "quant=loftq,qlora",
        "quant.rank=2",
        "report.baseline='LoftQ NF4 iter 5 r2'",
    )
    assert outcome.code == 0, outcome
