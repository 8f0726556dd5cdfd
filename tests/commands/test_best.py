"""`loftq-exp sweep best`: the best learning rate of each method, then several seeds of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recorded import metrics

from loftq_exp.commands import dispatch
from loftq_exp.commands.best import best_jobs
from loftq_exp.errors import UserError
from loftq_exp.report.jobs import Job


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report.html: its plots take seconds."""
    monkeypatch.setattr("loftq_exp.report.sweep.write_page", lambda *_: None)


def best(cli: Any, *arguments: str) -> Any:
    return cli.call(lambda: dispatch.main(["sweep", "best", *arguments]))


def job(number: int, nll: float | None, *overrides: str) -> Job:
    found = metrics({"nll": nll}) if nll is not None else None
    if found:
        found["config"]["objective"] = "nll"
    return Job(Path(f"job-{number}.json"), number, overrides, None if found else "no memory", found)


def test_each_method_has_its_own_best_by_the_mean_over_seeds() -> None:
    values = {
        ("qlora", "1e-4"): (2.0, 2.2),
        ("qlora", "1e-3"): (1.0, 3.0),
        ("loftq", "1e-4"): (2.0, 1.0),
        ("loftq", "1e-3"): (0.5, None),
    }
    jobs = [job(0, nll, f"quant={method}", f"train.learning_rate={rate}", f"seed={seed}", "report.baseline=qlora")
            for (method, rate), of in values.items() for seed, nll in enumerate(of)]  # fmt: skip
    chosen = {
        group: found.overrides[1] for group, found in best_jobs(jobs, ["train.learning_rate"], maximised=False).items()
    }
    assert chosen == {("quant=qlora",): "train.learning_rate=1e-3", ("quant=loftq",): "train.learning_rate=1e-4"}
    highest = best_jobs(jobs, ["train.learning_rate"], maximised=True)
    assert highest["quant=qlora",].overrides[1] == "train.learning_rate=1e-4"


def test_a_method_of_which_every_job_failed_is_named() -> None:
    with pytest.raises(UserError, match=r"^quant=qlora: no job has a score"):
        best_jobs([job(0, None, "quant=qlora", "seed=1")], ["seed"], maximised=False)


def test_the_best_rate_of_each_method_runs_with_each_seed(cli: Any) -> None:
    overrides = (*cli.tiny, "train.max_steps=2", "quant=lora,qlora", "train.learning_rate=1e-4,1e-1", "objective=nll",
                 "seed=0", "report.baseline=lora")  # fmt: skip
    outcome = best(cli, "--over", "train.learning_rate", "--seeds", "0,1", *overrides)
    assert outcome.code == 0, outcome
    first, *others = sorted(Path("outputs/sweeps").iterdir())
    scores: dict[str, dict[str, float]] = {}
    for path in sorted(first.glob("job-*.json")):
        found = json.loads(path.read_text())
        method, rate = (
            found["metrics"]["config"][group][name] for group, name in (("quant", "method"), ("train", "learning_rate"))
        )
        scores.setdefault(method, {})[str(rate)] = found["metrics"]["scores"]["nll"]
    assert all(len(set(of.values())) == 2 for of in scores.values())
    assert len(others) == 2
    for method, folder in zip(("lora", "qlora"), others, strict=True):
        configs = [json.loads(path.read_text())["metrics"]["config"] for path in sorted(folder.glob("job-*.json"))]
        assert [config["seed"] for config in configs] == [0, 1]
        assert {config["quant"]["method"] for config in configs} == {method}
        rates = {str(config["train"]["learning_rate"]) for config in configs}
        assert rates == {min(scores[method], key=lambda rate: scores[method][rate])}
    assert len(list(Path("outputs/runs").iterdir())) == 6  # seed 0 of the best is not run again
    assert "2 rows of 4 runs" in outcome.out
    assert "\nbest of quant=qlora: train.learning_rate=" in outcome.out
    assert "Δ NLL" in outcome.out


@pytest.mark.parametrize(("arguments", "said"), [
    (["--over", "train.learning_rate", "--seeds", "0,1", "train.learning_rate=1e-4,1e-3"], "objective=null: the best score is chosen"),
    (["--over", "quant.rank", "--seeds", "0", "objective=nll", "seed=1,2"], "--over=quant.rank: not among the overrides"),
    (["--over", "quant.rank", "--seeds", "0", "objective=nll", "quant.rank=0,1", "no.such=1"], "no.such=1: there is no such setting"),
    (["--seeds", "0", "objective=nll"], "the following arguments are required: --over"),
])  # fmt: skip
def test_refused_in_one_line(cli: Any, arguments: list[str], said: str) -> None:
    outcome = best(cli, *arguments)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {said}")
    assert outcome.err.count("\n") == 1
    assert not list(Path().glob("outputs/runs/*"))
