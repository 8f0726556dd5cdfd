"""Packed layers on a GPU beside bitsandbytes' 4-bit layers: unpacking, a training step of a layer, and generation.

    python benchmarks/gpu.py --part packed    (needs CUDA; under a minute on an H100)

The shapes are those of Llama-2-7B. Times are medians of alternating runs, by CUDA events, after a warm-up. In generation and
unpacking, a run goes through enough layers that none is still in the cache. A part that fails records its error.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.loftq.quantizers import make_quantizer

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
BITS = (2, 3, 4)
TRAINING_ROWS = (2048, 4096)
GENERATION_ROWS = (1, 4, 8)
CACHE_BYTES = 128 * 2**20
"""Bytes of the layers of a run; an H100's cache has 50 MiB."""
REPETITIONS = 15
MOST_SECONDS = 55
"""No further part starts after this time."""

Work = Callable[[], Any]


def milliseconds(works: dict[str, Work], device: torch.device) -> dict[str, float]:
    """Return the median time of each, alternating, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(-2, REPETITIONS):
        for name, work in works.items():
            taken = once(work, device)
            if repetition >= 0:
                times[name].append(taken)
    return {name: statistics.median(each) for name, each in times.items()}


def once(work: Work, device: torch.device) -> float:
    """Return the time of one call in milliseconds. A CPU is only for trying this file."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def packed_layer(shape: tuple[int, int], bits: int, device: torch.device) -> PackedLinear:
    """Return a layer of random codes: time does not depend on them."""
    quantizer = make_quantizer("nf", bits, 64, torch.bfloat16)
    layer = PackedLinear(shape[1], shape[0], quantizer, dtype=torch.bfloat16, device=device)
    layer.qweight.copy_(torch.randint(0, 256, layer.qweight.shape, dtype=torch.uint8, device=device))
    layer.scales.fill_(0.05)
    return layer


def bnb_layer(shape: tuple[int, int], device: torch.device) -> nn.Module:
    """Return bitsandbytes' NF4 layer of random values."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    values = torch.randn(shape, dtype=torch.bfloat16, device="cpu" if device.type == "cpu" else device)
    layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(device)


def nbytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


def several(make: Callable[[], nn.Module]) -> list[nn.Module]:
    """Return layers of at least `CACHE_BYTES` together."""
    first = make()
    return [first, *(make() for _ in range(min(CACHE_BYTES // max(nbytes(first), 1), 31)))]


def unpacking(shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Time of one unpacking to bfloat16, and bytes read and written per second."""
    layers = {f"packed NF{bits}": several(lambda bits=bits: packed_layer(shape, bits, device)) for bits in BITS}

    def run(some: list[Any]) -> Work:
        return lambda: [layer.dequantize(torch.bfloat16) for layer in some]

    taken = milliseconds({name: run(some) for name, some in layers.items()}, device)
    found = {}
    for name, some in layers.items():
        each = taken[name] / len(some)
        moved = nbytes(some[0]) + 2 * shape[0] * shape[1]
        found[name] = {"us": 1000 * each, "GB_per_s": moved / each / 1e6}
    return found


def training(shape: tuple[int, int], rows: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of forward and backward of one frozen layer, bfloat16; and ratios to bitsandbytes'."""
    given = torch.randn(rows, shape[1], dtype=torch.bfloat16, device=device, requires_grad=True)
    gradient = torch.randn(rows, shape[0], dtype=torch.bfloat16, device=device)
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
    layers = {"dense": dense, "bitsandbytes NF4": bnb_layer(shape, device)}
    layers |= {f"packed NF{bits}": packed_layer(shape, bits, device) for bits in BITS}

    def step(layer: nn.Module) -> Work:
        def work() -> None:
            given.grad = None
            layer(given).backward(gradient)

        return work

    return with_ratios(milliseconds({name: step(layer) for name, layer in layers.items()}, device))


def generation(shape: tuple[int, int], rows: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer: as called (`eager`), and without the time of launching, by a CUDA graph (`graph`)."""
    given = torch.randn(rows, 1, shape[1], dtype=torch.bfloat16, device=device)
    layers = {"bitsandbytes NF4": several(lambda: bnb_layer(shape, device))}
    layers |= {f"packed NF{bits}": several(lambda bits=bits: packed_layer(shape, bits, device)) for bits in BITS}

    def run(some: list[nn.Module]) -> Work:
        def work() -> None:
            with torch.no_grad():
                for layer in some:
                    layer(given)

        return work

    def per_layer(works: dict[str, Work]) -> dict[str, float]:
        return with_ratios({name: each / len(layers[name]) for name, each in milliseconds(works, device).items()})

    works = {name: run(some) for name, some in layers.items()}
    found = {"eager": per_layer(works)}
    if device.type == "cuda":
        found |= attempt("graph", lambda: per_layer({name: graphed(work) for name, work in works.items()}))
    return found


def graphed(work: Work) -> Work:
    """Return the replay of a CUDA graph of this work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def with_ratios(taken: dict[str, float]) -> dict[str, float]:
    base = taken["bitsandbytes NF4"]
    ratios = {f"{name} / bitsandbytes": each / base for name, each in taken.items() if name.startswith("packed")}
    return taken | ratios


def attempt(name: str, part: Callable[[], Any]) -> dict[str, Any]:
    """Return {name: result}, or the error in its place."""
    try:
        return {name: part()}
    except Exception as error:  # a part must not take the others with it
        return {name: {"error": f"{type(error).__name__}: {error}"[:500]}}


def measure(device: torch.device | None = None, shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, Any]:
    """Return all measurements by part and case. Parts that fail, or for which no time is left, say so."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    began = time.perf_counter()
    cases: list[tuple[str, str, Callable[[], Any]]] = []
    cases += [("unpacking", f"{o}x{i}", lambda s=(o, i): unpacking(s, device)) for o, i in shapes]
    for rows in TRAINING_ROWS:
        cases += [
            ("training", f"{o}x{i}, {rows} rows", lambda s=(o, i), n=rows: training(s, n, device)) for o, i in shapes
        ]
    for rows in GENERATION_ROWS:
        cases += [
            ("generation", f"{o}x{i}, {rows} rows", lambda s=(o, i), n=rows: generation(s, n, device))
            for o, i in shapes
        ]
    found: dict[str, Any] = {"generation": {}, "unpacking": {}, "training": {}}
    for part, name, run in cases:
        late = time.perf_counter() - began > MOST_SECONDS
        found[part] |= {name: {"error": "no time left"}} if late else attempt(name, run)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found
