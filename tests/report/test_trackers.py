"""The experiment trackers, for real and offline: what each stored is read back and compared with the run's own records."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import Command

import loftq_exp
from loftq_exp.report import loggers

Read = Callable[
    [Path, dict[str, Any]], tuple[dict[tuple[str, int], float], dict[str, Any], list[list[Any]], dict[str, bytes]]
]
"""Returns what a tracker stored in an output folder: values by name and step, settings, table of errors, files."""


def read_mlflow(output: Path, metrics: dict[str, Any]) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("loftq_exp")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    (folder,) = (output / "runs").iterdir()
    assert run.info.run_name == folder.name
    values = {
        (name, each.step): each.value
        for name in run.data.metrics
        for each in client.get_metric_history(run.info.run_id, name)
    }
    place = Path(client.download_artifacts(run.info.run_id, ""))
    table = json.loads((place / "init_error.json").read_text())["data"]
    files = {path.name: path.read_bytes() for path in (place / "report").iterdir()}
    return values, {"seed": int(run.data.params["seed"]), "rank": int(run.data.params["quant.rank"])}, table, files


def read_trackio(output: Path, metrics: dict[str, Any]) -> Any:
    """In a process of its own, because the library keeps the folder of the first run."""
    (folder,) = (output / "runs").iterdir()
    program = (
        "import json, sys\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "name = sys.argv[1]\n"
        "print(json.dumps([S.get_logs('loftq_exp', name), S.get_run_config('loftq_exp', name)]))\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(output / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", program, folder.name], env=environment, capture_output=True, text=True, check=True
    )
    logs, config = json.loads(done.stdout.splitlines()[-1])
    values = {
        (name, entry["step"]): value for entry in logs for name, value in entry.items() if isinstance(value, float)
    }
    (table,) = [
        list(map(list, (row.values() for row in entry["init_error"]["_value"])))
        for entry in logs
        if "init_error" in entry
    ]
    blobs = [path.read_bytes() for path in (output / "trackio" / "artifacts").rglob("*") if path.is_file()]
    names = ("metrics.json", "init_report.json", "samples.jsonl")
    files = {name: next(blob for blob in blobs if blob.startswith(start)) for name, start in
             zip(names, ((folder / names[0]).read_bytes()[:200], init_report(metrics, output)[:200],
                         (folder / names[2]).read_bytes()[:200]), strict=True)}  # fmt: skip
    return values, {"seed": config["seed"], "rank": config["quant"]["rank"]}, table, files


def read_wandb(output: Path, metrics: dict[str, Any]) -> Any:
    """From the file of the offline run: records of protobuf in the log format of LevelDB, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (output / "wandb").glob("offline-run-*/run-*.wandb")
    records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(file.read_bytes()[7:], 7)]
    (folder,) = (output / "runs").iterdir()
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert run.display_name == folder.name
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in run.config.update}
    values, table = dict[tuple[str, int], float](), None
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            values |= {
                (name, row["step"]): value
                for name, value in row.items()
                if isinstance(value, (int, float)) and name[0] != "_"
            }
            if path := row.get("init_error.path") or (row.get("init_error") or {}).get("path"):
                table = json.loads((file.parent / "files" / path).read_text())["data"]
    manifest = [entry for record in records if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "report"
                for entry in record.artifact.manifest.contents]  # fmt: skip
    files = {entry.path: Path(entry.local_path).read_bytes() for entry in manifest}
    return values, {"seed": config["seed"], "rank": config["quant"]["rank"]}, table, files


def leveldb_records(data: bytes, start: int, block: int = 32768) -> list[bytes]:
    """The records of a log in LevelDB's format; `start` bytes of its first block precede `data`."""
    records, parts, place = list[bytes](), b"", start
    data = bytes(start) + data
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0:
            break
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


READERS: dict[str, Any] = {"mlflow": read_mlflow, "trackio": read_trackio, "wandb": read_wandb}


def init_report(metrics: dict[str, Any], output: Path) -> bytes:
    return next((output / "inits").glob("*/init_report.json")).read_bytes()


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_stores_the_run(cli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the extra {name} is not installed")
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DATA_DIR", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens: nothing may be sent
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    output = tmp_path / "out"
    overrides = (*cli.tiny, f"train.report_to=[tensorboard,{name}]", f"output_dir={output}", "train.logging_steps=1",
                 "train.eval_strategy=epoch")  # fmt: skip
    outcome = cli(*overrides)
    assert outcome.code == 0, outcome
    assert "train.report_to" not in outcome.out, outcome.out
    (folder,) = (output / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    values, config, table, files = READERS[name](output, metrics)
    assert config == {"seed": 11, "rank": 4}
    for step, loss in metrics["losses"]:
        assert values["train/loss", step] == pytest.approx(loss)
    steps = metrics["finetune"]["steps"]
    for score, value in metrics["scores"].items():
        assert values[f"score/{score}", steps] == pytest.approx(value)
    for step, each in metrics["validation"]["values"]:
        assert values["validation/loss", step] == pytest.approx(each["loss"])
    report = json.loads(init_report(metrics, output))
    assert [(row[0], row[3], row[4]) for row in table] == [
        (weight["name"], step, pytest.approx(error))
        for weight in report["weights"]
        for step, error in enumerate(weight["errors"])
    ]
    assert values["init_error_mean", len(report["weights"][0]["errors"]) - 1] == pytest.approx(
        metrics["init"]["mean_error"]
    )
    assert files == {
        "metrics.json": (folder / "metrics.json").read_bytes(),
        "init_report.json": init_report(metrics, output),
        "samples.jsonl": (folder / "samples.jsonl").read_bytes(),
    }
    kept = [path for path in output.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".lock")]
    assert [path for path in kept if b"hf_secretsecret" in path.read_bytes()] == []
    # The same command again logs nothing.
    stored = {path: path.stat().st_mtime_ns for path in kept if name in str(path.relative_to(output))}
    assert cli(*overrides).code == 0
    assert {path: path.stat().st_mtime_ns for path in stored} == stored


@pytest.mark.parametrize("name", READERS)
def test_a_missing_extra_is_refused_before_any_work(cli: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    message = f"train.report_to=[{name}]: not installed; run: pip install 'loftq_exp[{name}]'"
    assert cli.refused(*cli.tiny, f"train.report_to=[{name}]") == message
    assert not Path("outputs").exists()


def test_an_unknown_logger_is_refused_with_the_known_ones(cli: Command) -> None:
    assert cli.refused(*cli.tiny, "train.report_to=[wandbb]") == (
        "train.report_to=wandbb: not a choice (did you mean 'wandb'?); choose from: tensorboard, wandb, mlflow, trackio"
    )


def test_a_logger_named_twice_is_refused(cli: Command) -> None:
    """It would log everything twice."""
    assert cli.refused(*cli.tiny, "train.report_to=[mlflow,mlflow]") == (
        "train.report_to=[mlflow,mlflow]: a logger is named twice; name each once"
    )


def test_no_logger_leaves_no_log(cli: Command) -> None:
    outcome = cli(*cli.tiny, "train.report_to=[]", "stages=[quantize,finetune]")
    assert outcome.code == 0
    assert "tensorboard" not in outcome.out
    (folder,) = Path("outputs/runs").iterdir()
    assert not (folder / "tensorboard").exists()
    assert (folder / "metrics.json").is_file()


class Keeps(loggers.Tracker):
    """Keeps what it is given, over all runs."""

    name = "keeps"
    kept: ClassVar[list[tuple[int, str]]] = []
    artifacts = 0

    def open(self, known: str | None) -> str:
        return known or "id"

    def scalars(self, step: int, values: Any) -> None:
        self.kept.extend((step, name) for name in values)

    def table(self, name: str, columns: Any, rows: Any) -> None:
        self.kept.append((0, name))

    def artifact(self, files: Any) -> None:
        Keeps.artifacts += 1

    def end(self, failed: bool) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, tracker: type[loggers.Tracker]) -> None:
    """Put a tracker in the place of wandb."""
    monkeypatch.setattr(loggers, "_TRACKERS", {"wandb": ""})
    monkeypatch.setattr(loggers, "_tracker", lambda _: tracker)
    monkeypatch.setattr("loftq_exp.pipeline.check_loggers", lambda _: None)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", ["training", "report"])
def test_a_killed_and_resumed_run_is_logged_once(cli: Command, monkeypatch: pytest.MonkeyPatch, killed_at: str) -> None:
    """Killed at step 3, after the checkpoint of step 2; or between the scores and the report."""
    use(monkeypatch, Keeps)
    monkeypatch.setattr(Keeps, "kept", [])
    monkeypatch.setattr(Keeps, "artifacts", 0)
    overrides = (*cli.tiny, "train.report_to=[wandb]", "train.max_steps=4", "train.save_steps=2", "train.logging_steps=1",
                 "train.eval_strategy=steps", "train.eval_steps=1")  # fmt: skip
    with monkeypatch.context() as patched:
        real = getattr(loggers.Loggers, killed_at)

        def dies(self: Any, *given: Any) -> None:
            if killed_at == "training":
                real(self, *given)
                if given[0] < 3 or "eval_loss" not in given[1]:
                    return
            raise Killed

        patched.setattr(loggers.Loggers, killed_at, dies)
        with pytest.raises(Killed):
            cli(*overrides)
    assert (3, "train/loss") in Keeps.kept
    assert cli(*overrides).code == 0
    assert len(Keeps.kept) == len(set(Keeps.kept))
    for name, steps in {"train/loss": (1, 2, 3, 4), "validation/loss": (1, 2, 3, 4), "score/nll": (4,)}.items():
        assert {step for step, found in Keeps.kept if found == name} == set(steps)
    assert (0, "init_error") in Keeps.kept
    assert Keeps.artifacts == 1
    # A finished run adds nothing.
    before = list(Keeps.kept)
    assert cli(*overrides).code == 0
    assert (Keeps.kept, Keeps.artifacts) == (before, 1)


class Fails(loggers.Tracker):
    name = "fails"

    def open(self, known: str | None) -> str:
        return "id"

    def scalars(self, step: int, values: Any) -> None:
        raise RuntimeError("the store\nis full")

    table = artifact = end = scalars  # type: ignore[assignment]


def test_a_failing_tracker_does_not_end_the_run(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fails)
    outcome = cli(*cli.tiny, "train.report_to=[wandb]")
    assert outcome.code == 0, outcome
    assert (
        outcome.out.count("train.report_to: fails failed (RuntimeError: the store is full); the run goes on without it")
        == 1
    )
    assert loftq_exp.__name__ in sys.modules
