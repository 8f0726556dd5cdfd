"""The CUDA path measured on one card: the decomposition beside PEFT's, packed layers, the quantize stage on Llama-2-7B's shapes.

    python benchmarks/gpu.py [--layers 4] [--part solver packed stage]      (make gpu runs it)

Needs no network: weights are drawn. Each part has a limit of seconds, LIMITS; what it measured until then is kept, and its file
says so. A part that fails ends with its reason, after the others. Writes docs/results/gpu-PART.json, which
scripts/result_tables.py puts into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from loftq_exp.loftq import loftq_init
from loftq_exp.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent))
import gpu_stage
from gpu_packed import BITS, measure

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LIMITS = {"tests": 5, "solver": 60, "packed": 75, "stage": 130}
"""Seconds that each part may take. With 280 for the tests, `make gpu` takes under ten minutes."""


class OutOfTime(BaseException):
    """A part's limit is reached. No `except Exception` on the way takes it for an error of its own."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds."""

    def end(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def card() -> dict[str, Any]:
    """The card, its driver and the versions that made a result."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    shown = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return {"command": "make gpu", "card": shown[0] if shown else torch.cuda.get_device_name(),
            "cuda": torch.version.cuda, "provenance": provenance()}  # fmt: skip


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median time of `work` in seconds after one run that warms up, with the card idle before and after."""
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def error(weight: torch.Tensor, result: tuple[torch.Tensor, ...]) -> float:
    """The relative error of Q + B A, in float64."""
    backbone, lora_A, lora_B = (part.to(weight.device).double() for part in result[:3])
    return float(torch.linalg.norm(weight.double() - backbone - lora_B @ lora_A) / torch.linalg.norm(weight.double()))


def solver() -> Iterator[dict[str, Any]]:
    """Yield seconds and error of one weight, rank 64, 5 steps: PEFT's function (NF4 alone exists there) and ours."""
    from peft.utils.loftq_utils import loftq_init as pefts

    generator = torch.Generator("cuda").manual_seed(0)
    for shape in ((4096, 4096), (11008, 4096)):
        weight = torch.randn(shape, generator=generator, device="cuda") * 0.02
        inputs = torch.randn(2 * shape[1], shape[1], generator=generator, device="cuda")
        hessian = inputs.T @ inputs / len(inputs)
        began = time.perf_counter()
        theirs = pefts(weight, 4, 64, num_iter=5)
        torch.cuda.synchronize()
        base = time.perf_counter() - began
        known = {"out x in": f"{shape[0]} x {shape[1]}"}
        row = {**known, "what": "PEFT, NF4", "ms": base * 1e3, "error": error(weight, theirs)}
        yield row
        theirs_error = row["error"]
        grid: dict[str, Any] = {"scale": "search", "levels": "optimal"}
        for what, bits, settings in (
            ("NF4", 4, {}), ("NF2", 2, {}), ("2 bits, searched", 2, grid), ("2 bits, calibrated", 2, grid | {"hessian": hessian}),
        ):  # fmt: skip

            def work(weight: torch.Tensor = weight, bits: int = bits, settings: dict[str, Any] = settings) -> Any:
                return loftq_init(weight, bits, 64, 5, **settings)

            taken = seconds(work, 5)
            row = {**known, "what": what, "ms": taken * 1e3, "error": error(weight, work())}
            if what == "NF4":
                row |= {"faster": base / taken, "error_ratio": row["error"] / theirs_error}
            yield row


def packed() -> Iterator[dict[str, Any]]:
    """Yield packed layers beside bitsandbytes' NF4 layer, by benchmarks/gpu_packed.py: microseconds, ratios to bitsandbytes'."""
    found = measure()
    for part, how in (("training", None), ("generation", "eager"), ("generation", "graph")):
        for case, taken in found[part].items():
            each = taken if how is None or "error" in taken else taken.get(how, {"error": "not measured"})
            row = {"what": f"{part}{f', {how}' if how else ''}", "case": case, "reason": each.get("error")}
            for name in ("dense", "bitsandbytes NF4", *(f"packed NF{bits}" for bits in BITS)):
                if name in each:
                    row[name] = 1e3 * each[name]
                if (ratio := each.get(f"{name} / bitsandbytes")) is not None:
                    row[f"{name} / bitsandbytes"] = ratio
            yield row
    for case, taken in found["unpacking"].items():
        row = {"what": "unpacking alone", "case": case, "reason": taken.get("error")}
        yield row | {name: each["us"] for name, each in taken.items() if name != "error"}


SOLVER = [
    {"key": "out x in", "name": "out x in"},
    {"key": "what", "name": "what"},
    {"key": "ms", "name": "ms", "format": "{:.1f}"},
    {"key": "error", "name": "weight error", "format": "{:.4f}"},
    {"key": "faster", "name": "faster than PEFT by", "format": "{:.0f}"},
    {"key": "error_ratio", "name": "error / PEFT's", "format": "{:.4f}"},
]
NAMES = ("dense", "bitsandbytes NF4", *(f"packed NF{bits}" for bits in BITS))
PACKED = [
    {"key": "what", "name": "what"},
    {"key": "case", "name": "out x in, rows"},
    *({"key": name, "name": f"{name}, us", "format": "{:.0f}"} for name in NAMES),
    *(
        {"key": f"packed NF{bits} / bitsandbytes", "name": f"NF{bits} / bitsandbytes", "format": "{:.2f}"}
        for bits in BITS
    ),
    {"key": "reason", "name": "not measured because"},
]


TESTS = [
    {"key": name, "name": name} for name in ("tests", "passed", "failed", "skipped", "seconds", "names of failed tests")
]


def tests(report: Path) -> Iterator[dict[str, Any]]:
    """Yield what a JUnit report of `pytest -m gpu` counts. One that was stopped by its limit holds the tests that ended."""
    suite = ElementTree.parse(report).getroot()[0]
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    count, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    yield {"tests": count, "passed": count - skipped - len(bad), "failed": len(bad), "skipped": skipped,
           "seconds": round(float(suite.attrib["time"])),
           "names of failed tests": ", ".join(case.attrib["name"] for case in bad)}  # fmt: skip


def run_part(
    part: str, rows: Iterator[dict[str, Any]], columns: list[dict[str, str]], limit: float, place: Path
) -> str | None:
    """Measure a part within its limit of seconds, write what it yielded to `place`, and return why it did not end, or None."""
    began, facts, found, problem = time.perf_counter(), card(), [], None
    try:
        with limited(limit):
            for row in rows:
                print(part, json.dumps(row), flush=True)
                found.append(row)
    except OutOfTime:
        problem = f"its limit of {limit:g} s was reached after {len(found)} rows"
    except Exception as error:  # a part that fails must not cost the others their results
        problem = f"{type(error).__name__}: {error}"
    facts |= {"seconds": round(time.perf_counter() - began, 1), "not_whole": problem}
    if found:
        place.write_text(json.dumps({"facts": facts, "columns": columns, "rows": found}, indent=1) + "\n")
    return problem and f"{part}: {problem}"


def main() -> None:
    """Measure the parts and write their result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=["solver", "stage", "packed"], default=["solver", "packed", "stage"]
    )
    parser.add_argument("--tests", type=Path, metavar="XML", help="JUnit report of pytest -m gpu, for gpu-tests.json")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="the limit of each part, in place of LIMITS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    parts: dict[str, tuple[Callable[[], Iterator[dict[str, Any]]], list[dict[str, str]]]] = {
        "tests": (lambda: tests(args.tests), TESTS),
        "solver": (solver, SOLVER),
        "packed": (packed, PACKED),
        "stage": (lambda: gpu_stage.measure(args.layers, torch.device("cuda", 0)), gpu_stage.COLUMNS),
    }
    failed = []
    for part in (["tests"] if args.tests else []) + args.part:
        work, columns = parts[part]
        limit = args.seconds or LIMITS[part]
        if problem := run_part(part, work(), columns, limit, args.results / f"gpu-{part}.json"):
            failed.append(problem)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
