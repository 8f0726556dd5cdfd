"""The command: its output, composition, errors, and the results of a multirun."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from loftq_exp.commands import run as command
from loftq_exp.commands.run import compose
from loftq_exp.config import RunConfig
from loftq_exp.config.schema import dotted_names
from loftq_exp.errors import UserError
from loftq_exp.tasks import TASKS

KINDS = {"llama-2": "causal", "mistral": "causal", "falcon": "causal", "smollm2": "causal", "bart": "seq2seq", "t5": "seq2seq",
         "deberta": "classification", "bert": "classification", "roberta": "classification",
         "minilm": "classification"}  # fmt: skip
VARIANTS = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "causal"),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", "causal"),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", "causal"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "causal"),
    "code-llama": ("codellama/CodeLlama-7b-hf", "causal"),
    "code-llama-7b": ("codellama/CodeLlama-7b-hf", "causal"),
    "code-llama-13b": ("codellama/CodeLlama-13b-hf", "causal"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "causal"),
    "phi-2": ("microsoft/phi-2", "causal"),
    "falcon-7b": ("tiiuae/falcon-7b", "causal"),
    "bart-large": ("facebook/bart-large", "seq2seq"),
    "t5-base": ("google-t5/t5-base", "seq2seq"),
    "t5-large": ("google-t5/t5-large", "seq2seq"),
    "deberta-v3-base": ("microsoft/deberta-v3-base", "classification"),
    "bert-base": ("google-bert/bert-base-uncased", "classification"),
    "bert-large": ("google-bert/bert-large-uncased", "classification"),
    "roberta-base": ("FacebookAI/roberta-base", "classification"),
    "roberta-large": ("FacebookAI/roberta-large", "classification"),
}
QUANTS = ("loftq", "qlora", "lora")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (command.conf_dir() / group).glob("*.yaml"))


def names_of(run: RunConfig) -> list[str]:
    """Every setting of a run: of those of tasks, the ones that its own task has."""
    return [
        name
        for name in dotted_names(RunConfig)
        if not name.startswith("task.") or hasattr(run.task, name[len("task.") :])
    ]


# What it shows --------------------------------------------------------------------------------------------------------


def test_help_is_a_page_for_a_newcomer(cli: Any) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "LoftQ" in outcome.out
    assert "Usage: python -m loftq_exp" in outcome.out
    for group in set(command.GROUPS) - {"experiment"}:
        assert f"\n{group}: {', '.join(choices(group))}\n" in outcome.out
    assert "\nexperiment: demo-calibrated, demo-loftq, demo-lora, demo-qlora, and the paper's rows" in outcome.out
    assert max(len(line) for line in outcome.out.splitlines()) < 700  # the models'
    assert "--cfg job" in outcome.out
    assert not list(Path.cwd().iterdir())
    section = outcome.out.partition("Common settings\n")[2].partition("\n\n")[0]
    shown = [line.split("=")[0].strip() for line in section.splitlines()]
    assert len(shown) == 11
    assert set(shown) <= set(dotted_names(RunConfig))


def test_help_gives_three_examples_that_work(cli: Any) -> None:
    section = cli("--help").out.partition("Examples\n")[2].partition("\n\n")[0]
    examples = [line.strip() for line in section.splitlines()]
    assert len(examples) == 3
    for example in examples:
        program, arguments = example.split()[:3], example.split()[3:]
        assert program == ["python", "-m", "loftq_exp"]
        if arguments[:1] == ["-m"]:
            arguments = [argument.split(",")[0] for argument in arguments[1:]]
        assert cli("--cfg", "job", *arguments).code == 0


def test_cfg_job_shows_the_run_without_running_it(cli: Any) -> None:
    missing = object()
    outcome = cli("--cfg", "job", "model=mistral", "quant.bits=2")
    assert outcome.code == 0
    run = RunConfig.from_mapping(OmegaConf.to_container(OmegaConf.create(outcome.out)))
    assert run.model.path == "mistralai/Mistral-7B-v0.1"
    assert run.quant.bits == 2
    shown = OmegaConf.create(outcome.out)
    assert all(OmegaConf.select(shown, name, default=missing) is not missing for name in names_of(run))
    assert not list(Path.cwd().iterdir())


# How it composes ------------------------------------------------------------------------------------------------------


def test_every_choice_that_was_promised_is_there() -> None:
    assert set(choices("model")) >= set(KINDS)
    assert set(choices("quant")) >= set(QUANTS)
    assert set(choices("task")) >= {"gsm8k", "arithmetic", "glue", "anli", "squad", "summarization", "wikitext"}


@pytest.mark.parametrize("model", VARIANTS)
def test_every_variant_of_a_published_row_is_one_file(model: str) -> None:
    run = compose([f"model={model}"])
    assert (run.model.path, run.model.kind) == VARIANTS[model]


@pytest.mark.parametrize(("model", "quant"), [*itertools.product(KINDS, QUANTS)])
def test_every_model_composes_with_every_quant(model: str, quant: str) -> None:
    run = compose([f"model={model}", f"quant={quant}"])
    assert run.model.kind == KINDS[model]
    assert run.quant.method == quant


@pytest.mark.parametrize(("task", "quant"), [*itertools.product(TASKS, QUANTS)])
def test_every_task_composes_with_every_quant(task: str, quant: str) -> None:
    named = ["task.name=[gsm8k]"] if task == "lm_eval" else []
    assert compose([f"task={task}", f"quant={quant}", "train=demo", *named]).task.kind == task


def test_a_file_of_choices_sets_only_what_exists() -> None:
    """A setting that a YAML file misspells would be refused in every run; one that it lacks takes the schema's default."""
    names = set(dotted_names(RunConfig))
    for group in ("model", "quant", "task", "train"):
        for choice in choices(group):
            file = command.conf_dir() / group / f"{choice}.yaml"
            settings = OmegaConf.load(file)
            if file.read_text().startswith(
                "# @package _global_"
            ):  # lm_eval also sets its stages, a mixture quant.dropout
                nested = {name: settings[name] for name in settings if OmegaConf.is_dict(settings[name])}
                given = {f"{name}.{key}" for name, values in nested.items() for key in values}
                given |= {name for name in settings if name not in nested and name != "defaults"}
            else:
                given = {f"{group}.{name}" for name in settings if name != "defaults"}
            assert given <= names


@pytest.mark.parametrize("model", choices("model"))
def test_every_setting_can_be_set_without_a_plus(model: str) -> None:
    """Also one that no file of conf/ names: `model.revision=` was refused for every model, though --help shows it."""
    run = compose([f"model={model}", *(["model.path=me/mine"] if model == "auto" else [])])
    here = {
        "model.revision": "v2", "model.trust_remote_code": True, "model.sha256": "ab", "model.member": "weights",
        "model.name": "mine", "hub.revision": "dev", "hub.private": True, "quant.solver": "exact", "train.bf16": True,
        "published": {"accuracy": 35.0}, "seed": 12,
    }  # fmt: skip
    values = {name: functools.reduce(getattr, name.split("."), run) for name in names_of(run)} | here
    changed = compose([f"model={model}", *(f"{name}={as_override(value)}" for name, value in values.items())])
    for name, value in values.items():
        assert functools.reduce(getattr, name.split("."), changed) == value
    added = compose([f"+model={model}", *(f"+{name}={as_override(value)}" for name, value in values.items())])
    assert added == changed  # what scripts of before wrote


def as_override(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{item}" for key, item in value.items()) + "}"
    return json.dumps(value)


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_setting_that_no_file_names_in_a_multirun(cli: Any, plus: str) -> None:
    outcome = cli(*cli.tiny, "-m", "stages=[quantize]", f"{plus}model.revision=a,b", "model.trust_remote_code=false")
    assert (outcome.code, outcome.err) == (0, "")
    jobs = [json.loads(path.read_text()) for path in Path("outputs/sweeps").glob("*/job-*.json")]
    assert sorted(job["metrics"]["config"]["model"]["revision"] for job in jobs) == ["a", "b"]


def test_the_files_of_conf_win_over_the_schema() -> None:
    assert compose(["train=default"]).train.per_device_train_batch_size == 16  # 4 in the schema
    assert compose(["experiment=llama-2-7b_nf4_r64_gsm8k"]).published == {"accuracy": 35.0}


def test_quant_settings_of_the_choices() -> None:
    assert compose(["quant=lora"]).quant.bits == 16
    assert compose(["quant=qlora"]).quant.iter == 0
    assert compose(["quant=loftq", "quant.iter=1", "quant.type=uniform", "quant.alpha=16"]).quant.lora_alpha == 16
    assert compose(["stages=[quantize,evaluate]"]).stages == ("quantize", "evaluate")


def test_python_composes_what_the_command_composes(cli: Any) -> None:
    shown = cli("--cfg", "job", "model=t5", "quant.bits=2").out
    assert compose(["model=t5", "quant.bits=2"]) == RunConfig.from_mapping(
        OmegaConf.to_container(OmegaConf.create(shown))
    )
    for overrides in (["quant.bit=2"], ["model=null"], ["quant.bits=["], ["quant.bits=5"]):
        with pytest.raises(UserError) as caught:
            compose(overrides)
        assert str(caught.value) == cli.refused(*overrides)


# How it refuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["quant.bit=3"], "quant.bit=3: there is no such setting; did you mean 'quant.bits'?"),
    (["bits=3"], "bits=3: there is no such setting; did you mean 'quant.bits'?"),
    (["modle=mistral"], "modle=mistral: there is no such setting; did you mean 'model'?"),
    (["zzz=1"], "zzz=1: there is no such setting; --cfg job shows all of them"),
    (["+quant.foo=1"], "quant.foo: there is no such setting; choose from: method, type, bits, "),
    (["++quant.bit=1"], "quant.bit: there is no such setting; did you mean 'bits'?"),
    (["+train.extra={a:1}"], "train.extra: there is no such setting"),
    (["~quant.bit"], "Could not delete"),
    (["quant=lofq"], "quant=lofq: there is no such choice; did you mean 'loftq'?"),
    (["model=no-model"], "model=no-model: there is no such choice; choose from: auto, bart, "),
    (["model="], "model=: there is no such choice; choose from: auto, bart, "),
    (["model=null"], "model=null: there is no such choice; choose from: auto, bart, "),
    (["task=7"], "task=7: there is no such choice; choose from: anli, arithmetic, commonsense, "),
    (["experiment=demo-loft"], "experiment=demo-loft: there is no such choice; did you mean 'demo-loftq'?"),
    (["~model"], "model.path: no value is set and there is no default; give model.path=VALUE"),
    (["~task"], "task.kind: no value is set and there is no default; give task=NAME"),
    (["model.revison=v2"], "model.revison=v2: there is no such setting; did you mean 'model.revision'?"),

    (["quant.bits=5"], "quant.bits=5: type nf has 2, 3, 4 bits"),
    (["train.learning_rate=-1e-4"], "train.learning_rate=-0.0001: out of range"),
    (["stages=[quantise]"], "stages=quantise: not a choice (did you mean 'quantize'?)"),
    (["seed=4294967296"], "seed=4294967296: out of range; give a value less than 4294967296"),
    (["quant.bits=${nothing}"], "Interpolation key 'nothing' not found"),
    (["quant.bits=???"], "quant.bits: no value is set and there is no default; give quant.bits=VALUE"),
    (["quant.rank=8,16"], "quant.rank=8,16: several values; add -m to run each of them"),
    (["quant=lora,qlora"], "quant=lora,qlora: several values; add -m to run each of them"),
    (["-m", "quant=lora,lofq"], "quant=lofq: there is no such choice; did you mean 'loftq'?"),
    (["-m", "quant.bit=2,3"], "quant.bit=2,3: there is no such setting; did you mean 'quant.bits'?"),
    (["quant.bits"], "quant.bits: not readable as NAME=VALUE"),
    (["quant.bits=["], "quant.bits=[: not readable as NAME=VALUE"),
    (["model.path=a b(c"], "model.path=a b(c: not readable as NAME=VALUE"),
    (["=3"], "=3: there is no such setting"),
    (["--bogus"], "unrecognized arguments: --bogus; give settings as NAME=VALUE"),
    (["--cfg", "all-of-it"], "argument --cfg/-c: invalid choice: 'all-of-it'"),
    (["--cfg", "job", "-m"], "Only one of --run, --multirun, --cfg"),
    (["--resolve"], "The --resolve flag"),
    (["--cfg", "job", "quant.bit=3"], "quant.bit=3: there is no such setting; did you mean 'quant.bits'?"),
    (["--config-name", "nothing"], "Cannot find primary config 'nothing'"),
    (["hydra/launcher=rya"], "hydra/launcher=rya: there is no such choice"),
    (["device=gpu9"], "device=gpu9: not a device; choose auto, cpu, cuda or cuda:N"),
    (["train.optim=adam-w"], "train.optim=adam-w: transformers has no such optimiser; choose one of its OptimizerNames"),
])  # fmt: skip
def test_refused_in_one_line_and_nothing_is_written(cli: Any, arguments: list[str], message: str) -> None:
    assert cli.refused(*arguments).startswith(message)
    assert [path for path in Path.cwd().rglob("*") if path.is_file()] == []


def test_settings_in_a_config_file_of_ones_own_are_checked_too(cli: Any, tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nquant: { rnak: 8 }\n")
    message = cli.refused(f"--config-dir={tmp_path / 'own'}", "experiment=mine")
    assert message == "quant.rnak: there is no such setting; did you mean 'rank'?"
    (own / "mine.yaml").write_text("# @package _global_\nquant: { rank: [\n")
    assert "mine.yaml" in cli.refused(f"--config-dir={tmp_path / 'own'}", "experiment=mine")


# What it runs ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_results_and_a_quiet_terminal(cli: Any) -> None:
    outcome = cli(*cli.tiny)
    assert outcome.code == 0
    assert outcome.err == ""
    assert "tensorboard --logdir outputs/runs" in outcome.out
    assert [path.name for path in Path.cwd().iterdir()] == ["outputs"]
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["cache", "inits", "runs"]
    (run,) = Path("outputs/runs").iterdir()
    assert (run / "metrics.json").is_file()
    again = cli(*cli.tiny, "stages=[evaluate]")
    assert again.code == 0
    assert [path.name for path in Path("outputs/runs").iterdir()] == [run.name]


def test_a_multirun_names_the_failed_job_and_keeps_the_others(cli: Any) -> None:
    outcome = cli(*cli.tiny, "-m", "quant.rank=100000,4")
    assert outcome.code == 1
    assert outcome.err.startswith("error: not every job succeeded; the failed jobs and their errors are listed above; ")
    assert [path.name for path in Path.cwd().iterdir()] == ["outputs"]
    (sweep,) = Path("outputs/sweeps").iterdir()
    left = ["job-0000.json", "job-0001.json", "losses.csv", "losses.png", "losses.svg", "multirun.yaml", "report.html",
            "sweep.json", "table.csv", "table.md"]  # fmt: skip
    assert sorted(path.name for path in sweep.iterdir()) == left
    failed, done = (json.loads((sweep / f"job-000{number}.json").read_text()) for number in (0, 1))
    assert failed["error"].startswith("quant.rank=100000: ")
    assert failed["metrics"] is None
    assert "quant.rank=4" in done["overrides"]
    assert done["error"] is None
    assert done["metrics"]["scores"]["nll"] > 0
    rows = (sweep / "table.md").read_text().splitlines()
    assert rows[2].startswith("| 0 | quant.rank=100000 |")  # only the overrides that differ between the jobs
    assert rows[2].endswith("| failed |")
    assert rows[3].endswith("| done |")
    assert rows[5].startswith("job 0 failed: quant.rank=100000: ")
    assert len(rows) == 6
    assert "failed: quant.rank=100000" in " ".join(outcome.out.split())
    assert "Traceback" not in outcome.out


def test_a_sweeper_gets_the_objective_of_each_job(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[float | None] = []
    job = command._job

    @functools.wraps(job)
    def record(*arguments: Any, **options: Any) -> float | None:
        values.append(job(*arguments, **options))
        return values[-1]

    monkeypatch.setattr(command, "_job", record)
    sweep = (*cli.tiny, "-m", "stages=[quantize,evaluate]", "quant.rank=4,100000")
    assert cli(*sweep, "objective=nll").code == 1
    scores = json.loads(next(iter(Path("outputs/sweeps").rglob("job-0000.json"))).read_text())["metrics"]["scores"]
    assert values[0] == scores["nll"]
    assert values[1] is not None
    assert math.isnan(values[1])  # the failed job
    values.clear()
    cli(*sweep)
    assert values[0] is None


def test_an_objective_that_is_no_score_is_refused_before_work(cli: Any) -> None:
    message = cli.refused(*cli.tiny, "objective=f1")
    assert message.startswith("objective=f1: ")
    assert message.endswith(" has no such score; choose from: nll, accuracy")
    assert (
        cli.refused(*cli.tiny, "objective=nll", "stages=[quantize]")
        == "objective=nll: nothing is scored; add evaluate to stages"
    )
    assert not Path("outputs/runs").exists()


def test_a_multirun_over_seeds_ends_with_a_row_a_setting_and_differences_to_a_baseline(cli: Any) -> None:
    sweep = (*cli.tiny, "-m", "stages=[quantize,evaluate]", "seed=0,1", "quant=qlora,loftq")
    outcome = cli(*sweep, "report.baseline=qlora")
    assert (outcome.code, outcome.err) == (0, "")
    (folder,) = Path("outputs/sweeps").iterdir()
    above, below = outcome.out[outcome.out.rindex("2 rows of 4 runs") :].split("4 jobs")
    assert "Δ: paired difference to QLoRA NF4" in above
    assert below.count(" done ") == 4
    nll = {
        (job["metrics"]["config"]["quant"]["method"], job["metrics"]["config"]["seed"]): job["metrics"]["scores"]["nll"]
        for job in (json.loads(path.read_text()) for path in folder.glob("job-*.json"))
    }
    rows = {row["name"].split()[0]: row for row in csv.DictReader((folder / "table.csv").open())}
    assert float(rows["LoftQ"]["nll"]) == pytest.approx((nll["loftq", 0] + nll["loftq", 1]) / 2)
    assert float(rows["LoftQ"]["nll.std"]) == pytest.approx(abs(nll["loftq", 0] - nll["loftq", 1]) / 2**0.5)
    pairs = [nll["loftq", seed] - nll["qlora", seed] for seed in (0, 1)]
    assert float(rows["LoftQ"]["nll.difference"]) == pytest.approx(sum(pairs) / 2)
    assert rows["QLoRA"]["nll.difference"] == ""
    page = (folder / "table.md").read_text()
    assert page.count("| QLoRA NF4 |") == 3  # a row of the setting, and one for each seed
    runs = {path.name: path.stat().st_mtime_ns for path in Path("outputs/runs").iterdir()}
    again = cli(*sweep, "report.baseline=pissa")
    assert again.code == 1
    assert again.err.startswith("error: report.baseline=pissa: no row matches; choose from: qlora, loftq, QLoRA NF4 ")
    assert again.err.count("\n") == 1
    assert again.out == ""  # before any job
    assert {path.name for path in Path("outputs/runs").iterdir()} == set(runs)  # the baseline shapes no result
    several = cli(*sweep, "report.baseline=qlora,loftq")
    assert several.err == "error: report.baseline=loftq,qlora: a sweep has one baseline; give one of them\n"


def test_the_table_stands_at_the_end_and_a_sweep_without_training_has_no_plot(cli: Any) -> None:
    outcome = cli(*cli.tiny, "-m", "stages=[quantize]", "quant=qlora,loftq", "quant.bits=2,5")
    assert outcome.code == 1
    (sweep,) = Path("outputs/sweeps").iterdir()
    assert len(list(sweep.glob("job-*.json"))) == 4
    assert not (sweep / "losses.png").exists()
    table = outcome.out[outcome.out.rindex("4 jobs") :]
    assert table.count("failed: quant.bits=5: type nf has 2, 3, 4 bits; choose one of them") == 2
    assert "QLoRA NF2" in table
    assert "LoftQ NF2 iter 5" in table


def test_a_multirun_that_succeeds_exits_with_0(cli: Any) -> None:
    outcome = cli(*cli.tiny, "-m", "stages=[quantize]", "quant.iter=0,1")
    assert (outcome.code, outcome.err) == (0, "")


def test_jobs_of_a_multirun_share_the_cache(cli: Any) -> None:
    cli(*cli.tiny, "-m", "stages=[quantize]", "quant.iter=1,2")
    reports = {
        report["quant"]["iter"]: report["weights"]
        for report in map(json.loads, (path.read_text() for path in Path("outputs/inits").glob("*/init_report.json")))
    }
    assert [weight["steps_computed"] for weight in reports[1]] == [1] * 14
    assert [weight["steps_computed"] for weight in reports[2]] == [1] * 14  # continued from the first job's step


def test_a_bug_in_one_job_is_told_and_the_others_run(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_exp import pipeline

    initialise = pipeline.initialise

    def buggy(source: Any, config: RunConfig) -> Any:
        if config.quant.rank == 4:
            raise ZeroDivisionError("division by zero")
        return initialise(source, config)

    monkeypatch.setattr(pipeline, "initialise", buggy)
    outcome = cli(*cli.tiny, "-m", "stages=[quantize]", "quant.rank=4,8")
    assert outcome.code == 1
    assert "failed: ZeroDivisionError: division by zero" in outcome.out
    assert "Traceback" in outcome.out  # it is ours to mend
    assert outcome.err.count("\n") == 1
    assert len(list(Path("outputs/runs").glob("*/metrics.json"))) == 1


def test_ctrl_c_ends_a_multirun(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loftq_exp.pipeline.initialise", interrupted)
    assert cli.refused(*cli.tiny, "-m", "quant.rank=4,8", code=130).startswith("interrupted: ")


def test_a_sweep_whose_folder_cannot_be_made(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = cli.refused("-m", f"output_dir={tmp_path / 'file'}", "quant.rank=4,8")
    assert message.startswith(f"output_dir: {tmp_path / 'file'}/sweeps/")
    assert message.endswith("(Not a directory); set another output_dir")
