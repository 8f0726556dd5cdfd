"""Launchers: the same table as the plain loop, from jobs in other processes."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import slurm
import yaml
from ray_cluster import two_nodes

from loftq_exp.commands import dispatch, launchers
from loftq_exp.commands.run import conf_dir

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(path.stem for path in (conf_dir() / "hydra" / "launcher").glob("*.yaml"))
SLURM = [
    "hydra/launcher=submitit_slurm", "hydra.launcher.partition=here", "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1",
]  # fmt: skip
JOBS = ("-m", "quant=lora,qlora", "seed=1,2")


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table, without times and peak memory."""
    with (folder / "table.csv").open() as lines:
        return [
            {name: value for name, value in row.items() if "seconds" not in name and "memory" not in name}
            for row in csv.DictReader(lines)
        ]


def environment(**more: str) -> dict[str, str]:
    """The environment of a command that imports this copy."""
    return {**os.environ, **more, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def needs(launcher: str) -> None:
    if not launchers.is_installed(launcher):
        pytest.skip(f"the extra of {launcher} is not installed")


def start(cli: Any, *overrides: str, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loftq_exp", *cli.tiny, *overrides]
    return subprocess.Popen(
        command,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def check_same_table(cli: Any, *overrides: str, **more: str) -> str:
    """Run the jobs in a plain loop and by a launcher; return what the latter printed."""
    assert cli(*cli.tiny, *JOBS, "output_dir=plain").code == 0
    sweep = start(cli, *JOBS, *overrides, "output_dir=spread", **more)
    out, err = sweep.communicate(timeout=500)
    assert sweep.returncode == 0, err
    (plain,), (spread,) = Path("plain/sweeps").iterdir(), Path("spread/sweeps").iterdir()
    assert table(spread) == table(plain)
    assert [len(list(folder.glob("job-*.json"))) for folder in (plain, spread)] == [4, 4]
    names = [sorted(path.name for path in Path(folder, "inits").glob("[!.]*")) for folder in ("plain", "spread")]
    assert names[0] == names[1]
    assert "4 jobs" in out
    return out


@pytest.mark.slow
def test_joblib_makes_the_table_of_the_plain_loop(cli: Any) -> None:
    needs("joblib")
    check_same_table(cli, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.mark.slow
def test_submitit_local_makes_the_table_of_the_plain_loop_and_shows_its_progress(cli: Any) -> None:
    needs("submitit_local")
    out = check_same_table(cli, "hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2")
    assert "sweep: 4 of 4 jobs done\n" in out


@pytest.fixture
def slurm_cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Slurm cluster on this machine."""
    needs("submitit_slurm")
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.cluster(tmp_path / "slurm") as found:
        yield found


@pytest.mark.slow
def test_slurm_makes_the_table_of_the_plain_loop(cli: Any, slurm_cluster: dict[str, str]) -> None:
    check_same_table(cli, *SLURM, SLURM_CONF=slurm_cluster["SLURM_CONF"])


@pytest.mark.slow
def test_slurm_refuses_in_one_line_and_ctrl_c_ends_its_jobs(cli: Any, slurm_cluster: dict[str, str]) -> None:
    sweep = start(
        cli, "-m", "seed=1,2", *SLURM, "hydra.launcher.partition=other", SLURM_CONF=slurm_cluster["SLURM_CONF"]
    )
    _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 1
    assert "error: hydra/launcher=submitit_slurm: FailedJobError: sbatch: error: invalid partition" in err
    assert not list(Path("outputs/sweeps").iterdir())
    sweep = start(cli, *JOBS, *SLURM, SLURM_CONF=slurm_cluster["SLURM_CONF"])
    until(lambda: "R" in queue(slurm_cluster))
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 130
    assert "error: interrupted: 0 of 4 jobs done; go on with: loftq-exp sweep resume " in err
    until(lambda: not queue(slurm_cluster))


def queue(found: dict[str, str]) -> list[str]:
    """The states of the jobs in the queue of a Slurm cluster."""
    command = ["squeue", "--noheader", "--format=%t"]
    return subprocess.run(command, env=found, capture_output=True, text=True, check=True).stdout.split()


def until(holds: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end
        time.sleep(0.5)
    return value


@pytest.mark.slow
def test_ray_on_two_nodes_makes_the_table_of_the_plain_loop(cli: Any) -> None:
    needs("ray")
    with two_nodes() as address:
        check_same_table(cli, "hydra/launcher=ray", f"hydra.launcher.ray.init.address='{address}'")


def submitted() -> list[int]:
    """The numbers of the jobs that submitit started."""
    return [int(path.name) for path in Path().glob("outputs/sweeps/*/.submitit/*") if path.name.isdecimal()]


@pytest.mark.slow
def test_a_job_that_is_killed_is_named_and_the_others_go_on(cli: Any) -> None:
    needs("submitit_local")
    sweep = start(cli, "-m", "seed=1,2,3", "stages=[quantize]", "hydra/launcher=submitit_local")
    numbers = sorted(until(lambda: len(found := submitted()) == 3 and found))
    (folder,) = Path("outputs/sweeps").iterdir()
    (job,) = until(lambda: psutil.Process(numbers[1]).children())
    job.kill()
    out, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 1
    assert "hydra/launcher=submitit_local: UncompletedJobError: " in out
    assert "job 1 ended without a result; its process was killed or not started" in out
    assert [path.name for path in sorted(folder.glob("job-*.json"))] == ["job-0000.json", "job-0002.json"]
    assert f"to run them again: loftq-exp sweep resume {folder.resolve()} --failed" in err


@pytest.mark.slow
def test_a_killed_worker_of_joblib_ends_the_sweep_and_resume_runs_the_rest(cli: Any) -> None:
    needs("joblib")
    sweep = start(cli, "-m", "seed=range(8)", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = until(lambda: sorted(Path("outputs/sweeps").glob("*/job-*.json")))
    workers = [child for child in psutil.Process(sweep.pid).children() if "loky" in " ".join(child.cmdline())]
    next(worker for worker in workers if "resource_tracker" not in " ".join(worker.cmdline())).kill()
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert "hydra/launcher=joblib: TerminatedWorkerError: " in out + err
    assert "Traceback" not in err
    folder = done[0].parent
    assert f"loftq-exp sweep resume {folder.resolve()}" in err
    assert len(list(folder.glob("job-*.json"))) < 8
    resumed = cli.call(lambda: dispatch.main(["sweep", "resume", str(folder), "--failed"]))
    assert resumed.code == 0, resumed.err
    assert len(table(folder)) == 1  # one setting, eight seeds
    assert "8 jobs" in resumed.out


@pytest.mark.slow
def test_ray_starts_a_killed_job_again(cli: Any) -> None:
    needs("ray")
    with two_nodes() as address:
        sweep = start(cli, "-m", "seed=1,2,3,4", "hydra/launcher=ray", f"hydra.launcher.ray.init.address='{address}'")
        until(lambda: list(Path("outputs/sweeps").glob("*/job-*.json")))
        running = [
            each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [""])[0] == "ray::_run_job"
        ]
        running[0].kill()
        out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, err
    assert "4 jobs" in out
    assert len(list(Path("outputs/sweeps").glob("*/job-*.json"))) == 4


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_not_installed(cli: Any, monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    extra = launcher.partition("_")[0]
    said = cli.refused("-m", "seed=1,2", f"hydra/launcher={launcher}")
    assert said == f"hydra/launcher={launcher}: not installed; run: pip install 'loftq_exp[{extra}]'"
    assert not Path("outputs").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_file_opens_with_its_command_and_says_whether_it_was_run(launcher: str) -> None:
    text = (conf_dir() / "hydra" / "launcher" / f"{launcher}.yaml").read_text()
    first, *rest = text.splitlines()
    assert first.startswith(f"# python -m loftq_exp -m quant.rank=8,16 hydra/launcher={launcher}")
    assert any("Run in tests" in line or "Not run" in line for line in rest)
    assert "_target_" in yaml.safe_load(text)
