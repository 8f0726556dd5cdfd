"""Kill whole runs, and compare what the next run leaves with what an undisturbed one does: `python tests/killing.py --help`.

One process imports torch and transformers, and makes a run to compile the kernels. Each run of a case is a fork of it. A run
is killed (SIGKILL) before its n-th file operation, of those that Python reports to an audit hook, or at a random time. It
quantizes with calibration, fine-tunes with a checkpoint after each step, evaluates, exports and reports.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OVERRIDES = (
    "model=llama-2", "model.path=model", "output_dir=out", "device=cpu", "quant.rank=4", "quant.iter=1", "quant.dropout=0",
    "quant.calibration=diagonal", "calibration.samples=4", "calibration.length=32", "task=arithmetic",
    "task.max_train_samples=6", "task.max_eval_samples=2", "task.max_source_length=32", "task.max_target_length=2",
    "train.per_device_train_batch_size=2", "train.logging_steps=1", "train.save_steps=1", "train.num_train_epochs=2",
    "task.validation_size=2", "train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=true",
    "train.warmup_ratio=0", "train.learning_rate=1e-3",
)  # fmt: skip
TIMES = {"seconds", "compile_seconds", "peak_memory", "phases", "created", "commit"}
"""Fields that say how long something took, or when it was done. (A commit may be made meanwhile.)"""
PATHS_TAKEN = {"cache_hit", "cache_hits", "computed", "steps_computed", "resumed_from"}
"""Fields that say where a result came from: after a kill from the cache or a checkpoint."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.symlink",
    "shutil.rmtree",
    "os.chmod",
)


def make_model(folder: Path) -> None:
    """Write a llama of one block, 32 wide, with a tokenizer, to `folder`."""
    from checkpoints import byte_level_bpe
    from transformers import PreTrainedTokenizerFast
    from zoo import llama, with_tokenizer

    from loftq_exp.tasks.arithmetic import generate

    texts = [f"{row['question']}\n{row['answer']}" for row in islice(generate("train", 0), 50)]
    bpe = byte_level_bpe(texts, 300, ("<s>", "</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "max_position_embeddings": 128, "dtype": "float32"}  # fmt: skip
    with_tokenizer(lambda: llama(**sizes, bos_token_id=0, eos_token_id=1), tokenizer, folder)


def whole_run(*overrides: str, more: bool = True) -> None:
    """Run all stages in the current folder, and `more`: export and report, as a script of a user would."""
    import loftq_exp
    from loftq_exp.artifact.exported import export
    from loftq_exp.commands import write_report

    result = loftq_exp.run(CONFIGS[overrides] if overrides in CONFIGS else configured(*overrides))
    if not more:
        return
    exported = Path(f"exported-{result.run_dir.name}")
    if not exported.exists():
        export(result.init_dir, exported, result.adapter_dir)
    for form in ("markdown", "csv"):  # html draws figures, which takes as long as all else
        if write_report.main(["out", "--format", form, "--output", f"report.{form}"]):
            raise RuntimeError("no report")


CONFIGS: dict[tuple[str, ...], Any] = {}
"""Settings that were composed before the forks."""


def configured(*overrides: str) -> Any:
    """The settings of a run with further overrides."""
    import loftq_exp

    return loftq_exp.compose([*OVERRIDES, *overrides])


class Start:
    """A process that has loaded everything, from which runs are forked."""

    def __init__(self, folder: Path) -> None:
        """`folder`: an empty one, where cases work."""
        sys.path[:0] = [str(Path(__file__).parent)]
        self.folder = folder
        make_model(folder / "model")
        CONFIGS[()] = configured()
        self.root = folder / "root"
        self.fresh()
        self.log = folder / "log.txt"
        # In this process, so that the forks have the kernels. It also shows what a run leaves.
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
        with _in(self.root), _quiet(self.log):
            whole_run()
        gc.freeze()  # so that a collection in a fork does not copy all pages
        self.fresh()
        self.operations = self.count()
        self.expected = snapshot(self.root)

    def fresh(self) -> None:
        """Empty the folder of a case, all but its model."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        (self.root / "model").symlink_to(self.folder / "model")

    def count(self) -> int:
        """The number of file operations of a whole run, made once."""
        report = self.folder / "count"
        code = self.wait(self.fork(lambda: counting(report)))
        assert code == 0, self.log.read_text()
        return int(report.read_text())

    def fork(
        self,
        before: Callable[[], Any] | None = None,
        overrides: Sequence[str] = (),
        log: Path | None = None,
        more: bool = True,
    ) -> int:
        """Start a whole run in a fork, which first calls `before`. Return its process id."""
        import torch

        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            with _in(self.root), _quiet(log or self.log):
                torch.set_num_threads(
                    1
                )  # torch makes the threads that a fork lacks again, but not in two threads at a time
                done = before() if before else None
                whole_run(*overrides, more=more)
                if callable(done):
                    done()
            code = 0
        finally:
            os._exit(code)

    def wait(self, pid: int, seconds: float | None = None) -> int:
        """Wait for a run, which is killed after `seconds`. Return its exit code; negative: the signal that ended it."""
        end = None if seconds is None else time.monotonic() + seconds
        while end is not None:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def case(self, kills: Sequence[tuple[str, float]]) -> tuple[int, list[str]]:
        """Kill one run after the other, then let one finish. Return the number of kills, and what is wrong afterwards."""
        self.fresh()
        killed = 0
        for kind, place in kills:
            hook = (lambda place=place: killing(int(place))) if kind == "operation" else None
            code = self.wait(self.fork(hook), None if kind == "operation" else place)
            if code not in (0, -signal.SIGKILL):
                return killed, [f"a run after {killed} kills failed: {last_lines(self.log)}"]
            killed += code != 0
        if self.wait(self.fork()):
            return killed, [f"the run after the last kill failed: {last_lines(self.log)}"]
        return killed, differences(self.expected, snapshot(self.root))


def counting(report: Path) -> Callable[[], None]:
    count = [0]
    _hook(lambda: count.__setitem__(0, count[0] + 1))

    def done() -> None:
        report.write_text(str(count[0]))

    return done


def killing(number: int) -> None:
    """Kill this process before its file operation of this number, from 1."""
    count = [0]

    def kill() -> None:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _hook(kill)


def _hook(call: Callable[[], None]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if (opened and not str(arguments[0]).startswith(("/dev/", "/proc/"))) or event in OPERATIONS:
            call()

    sys.addaudithook(hook)


class _in:
    """Work in a folder. (contextlib.chdir needs Python 3.11.)"""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)


class _quiet:
    """Send what the process and its libraries print to a file, the traceback of an error too."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.kept = [os.dup(1), os.dup(2)]
        self.file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for number in (1, 2):
            os.dup2(self.file, number)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            traceback.print_exception(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), self.kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        os.close(self.file)


def last_lines(log: Path) -> str:
    """The end of a log in one line."""
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-4:])[-600:]


# What a run leaves ----------------------------------------------------------------------------------------------------


def snapshot(root: Path) -> dict[str, Any]:
    """What lies below `root`, by name, without times. Logs are what TensorBoard reads of them."""
    from loftq_exp.manifest import faults

    found: dict[str, Any] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() or path.name.startswith(".")):
        name = path.relative_to(root).as_posix()
        if name.startswith("model/") or path.suffix == ".lock" or "/digests/" in name:
            continue
        if "tfevents" in name:
            found[f"{name.rpartition('/')[0]}/{path.suffix}"] = logged(path)
        elif path.name == "manifest.json":
            found[name] = list(faults(path.parent))
        elif path.stem == "report" or not path.is_file():  # a report has times
            found[name] = "present"
        elif path.suffix == ".safetensors" and "/cache/" in name:
            found[name] = content(path)
        elif path.suffix == ".json":
            found[name] = timeless(_parsed(path))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def content(path: Path) -> list[Any]:
    """The tensors and metadata of an entry of the cache. safetensors writes metadata in any order."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return [
                file.metadata(),
                {name: hashlib.sha256(file.get_tensor(name).numpy().tobytes()).hexdigest() for name in names},
            ]
    except SafetensorError as error:  # of a test of damaged files
        return [str(error)]


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        return str(error)


def timeless(value: Any) -> Any:
    """A record without its times and the paths that were taken to it."""
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in TIMES | PATHS_TAKEN}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def logged(path: Path) -> list[tuple[str, int, str]]:
    """The tag, step and value of each entry in an event file, sorted. A figure has no value."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    entries = [
        (value.tag, event.step, value) for event in EventFileLoader(str(path)).Load() for value in event.summary.value
    ]
    moving = ("_hparams_", "init_error_by_layer")
    return sorted((tag, step, "" if tag.startswith(moving) else hashlib.sha256(value.SerializeToString()).hexdigest())
                  for tag, step, value in entries)  # fmt: skip


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """How what was found differs from what an undisturbed run leaves, a line each."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is left behind" for name in found if name not in expected]
    lines += [f"{name} differs: {first_difference(expected[name], found[name])}" for name in expected
              if name in found and expected[name] != found[name]]  # fmt: skip
    for name, entries in found.items():
        if name.endswith("/.training"):
            twice = [key for key, number in Counter((tag, step) for tag, step, _ in entries).items() if number > 1]
            lines += [f"{name}: {tag} of step {step} is logged twice" for tag, step in twice]
    return lines


def first_difference(one: Any, other: Any, place: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(
            first_difference(one[name], other[name], f"{place}.{name}") for name in one if one[name] != other[name]
        )
    return f"{place} {str(one)[:150]} != {str(other)[:150]}"


# Cases ----------------------------------------------------------------------------------------------------------------


def plan(operations: int, cases: int, seed: int, seconds: float) -> Iterator[list[tuple[str, float]]]:
    """The kills of each case: first before each file operation, evenly thinned to `cases`, with a random tenth of times.

    In half of the cases the run after it is killed too, at a random place.
    """
    draw = random.Random(seed)
    timed = max(1, cases // 10)
    places = [1 + place * operations // (cases - timed) for place in range(cases - timed)]
    firsts: list[tuple[str, float]] = [("operation", place) for place in places]
    firsts += [("time", draw.uniform(0, seconds)) for _ in range(timed)]
    for first in firsts:
        again = draw.random() < 0.5
        yield [first, *([("operation", draw.randint(1, operations))] if again else [])]


def kill_all(start: Start, cases: int, seed: int, workers: int) -> dict[str, Any]:
    """Run the cases in `workers` processes at a time. Return the counts and the failures."""
    began, folder = time.monotonic(), start.folder
    start.fresh()
    assert start.wait(start.fork()) == 0, last_lines(start.log)
    planned = list(plan(start.operations, cases, seed, time.monotonic() - began))
    pids = [_worker(start, folder / f"worker{number}", planned[number::workers]) for number in range(workers)]
    codes = [start.wait(pid) for pid in pids]
    assert codes == [0] * workers
    results = [
        json.loads(line) for path in sorted(folder.glob("worker*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {
        "cases": len(results), "kills": sum(result["kills"] for result in results), "operations": start.operations,
        "failures": [failure for result in results for failure in result["failures"]],
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def _worker(start: Start, folder: Path, planned: Sequence[list[tuple[str, float]]]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        folder.mkdir()
        start.root, start.log = folder / "root", folder / "log.txt"
        # A run's files name its folder, so each worker has its own expectation.
        start.fresh()
        assert start.wait(start.fork()) == 0, last_lines(start.log)
        start.expected = snapshot(start.root)
        with folder.with_suffix(".jsonl").open("w", buffering=1) as file:
            for kills in planned:
                killed, wrong = start.case(kills)
                file.write(json.dumps({"kills": killed, "failures": [f"{kills}: {line}" for line in wrong]}) + "\n")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


COLUMNS = ("promise", "how it is tried", "cases", "failures")


def write_row(place: Path, promise: str, how: str, found: dict[str, Any]) -> None:
    """Put the counts of one harness into docs/results/reliability.json. The rows of other promises stay."""
    rows = json.loads(place.read_text())["rows"] if place.exists() else []
    row = {"promise": promise, "how it is tried": how, "cases": found["cases"], "failures": len(found["failures"])}
    places = [number for number, other in enumerate(rows) if other["promise"] == promise]
    rows[places[0] if places else len(rows) :] = [row, *rows[places[0] + 1 :]] if places else [row]
    facts = {"model": "a random llama of one block, 32 wide"}
    columns = [{"name": name, "key": name} for name in COLUMNS]
    place.write_text(json.dumps({"facts": facts, "columns": columns, "rows": rows}, indent=1) + "\n")


PROMISE = (
    "a killed run leaves, after the next run, the bytes of an undisturbed one (but times), each step logged once, "
    "and nothing else"
)


def main() -> None:
    """Print the counts, and each failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--write", type=Path, help="JSON file for the counts: docs/results/reliability.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=0, help="then a round of tests/together.py with so many")
    parser.add_argument("--damaged", type=int, default=0, help="then so many cases of tests/corruption.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="killing-") as folder:
        start = Start(Path(folder))
        found = {"killed": kill_all(start, options.cases, options.seed, options.workers)}
        if options.processes:
            import together  # here, because it imports this module, whose `Start` is __main__'s

            together.CONFIGS = CONFIGS
            found["together"] = together.rounds(start, options.processes, 1)
        if options.damaged:
            import corruption

            corruption.CONFIGS = CONFIGS
            found["damaged"] = corruption.damage_all(corruption.Damage(start), options.damaged, options.seed)
    if options.write:
        killed = found["killed"]
        how = (f"`python tests/killing.py --cases {options.cases} --seed {options.seed}`: {killed['kills']} SIGKILLs, before each "
               f"of {killed['operations']} file operations where the cases suffice, and at random times, over quantize, calibrate, "
               "fine-tune, evaluate, export, report")  # fmt: skip
        write_row(options.write, PROMISE, how, killed)
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
