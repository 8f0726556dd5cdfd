"""The quantize stage: convert a pre-trained checkpoint to an initialised one, weight by weight.

Only the weights being processed are in memory. Each is read from the cache or decomposed, and its backbone values and
factors are written directly to the output files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_exp.artifact.folder import (
    ADAPTER,
    Initialised,
    exclusive,
    write_report,
    write_surroundings,
    written_whole,
)
from loftq_exp.artifact.writer import SafetensorsWriter
from loftq_exp.config import RunConfig, digest_of
from loftq_exp.costs import StageWatch
from loftq_exp.errors import UserError
from loftq_exp.initialise.calibrate import Calibration, calibrate
from loftq_exp.initialise.coverage import bits_per_weight, coverage, written_names
from loftq_exp.initialise.decomposer import Decomposer
from loftq_exp.initialise.decomposition_cache import Kept, weight_digest
from loftq_exp.initialise.fit import check_fit
from loftq_exp.initialise.kept import remove_damaged
from loftq_exp.initialise.key import REPORT_FORMAT, MadeFrom, check_unchanged, done_before, init_dir, made_from
from loftq_exp.initialise.measure import measuring
from loftq_exp.initialise.plan import Plan, code_bits, describe_plan, is_measured, log_plan, make_plan
from loftq_exp.initialise.polish import polish, polish_samples
from loftq_exp.initialise.prequantized import check_types
from loftq_exp.initialise.proof import check_surroundings
from loftq_exp.initialise.transfer import Copied, read_ahead, to_device
from loftq_exp.initialise.verify import Forms, check_written
from loftq_exp.initialise.workers import Phases, side_by_side
from loftq_exp.loftq import kaiming_uniform_A
from loftq_exp.loftq.allocation import Precision
from loftq_exp.manifest import SMALL
from loftq_exp.progress import Advance, progress
from loftq_exp.provenance import provenance
from loftq_exp.source.dequantized import open_values
from loftq_exp.source.finite import check_finite, is_finite
from loftq_exp.source.head import PREFIX, head_tensors
from loftq_exp.source.layout import Layout, find_layout
from loftq_exp.source.locate import Source
from loftq_exp.source.selection import Selection
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors
from loftq_exp.storage.format import Codes, storage_format
from loftq_exp.storage.specs import TensorSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightReport:
    """The result of one weight. `errors[0]` is the relative error of quantization alone, `errors[t]` after step t.

    `output_errors` are the same in the norm of the layer's outputs on the calibration text; empty without calibration. The
    result is that of `kept_step`.
    """

    name: str
    shape: tuple[int, int]
    digest: str
    bits: int
    rank: int
    errors: tuple[float, ...]
    output_errors: tuple[float, ...]
    kept_step: int
    seconds: float
    cache_hit: bool
    steps_computed: int
    phases: dict[str, float]
    """Seconds by phase: `digest` (which also reads the weight from its file), `copy` (to pinned memory, for a GPU), `cache`,
    `metric`, `decompose`, `decode`, `write`. The first two are those of a thread that reads ahead."""
    polished_error: float | None = None
    """The relative error with polished factors; None without a polish."""
    polished_output_error: float | None = None

    @property
    def error(self) -> float:
        """The relative error of the weight as it is written."""
        return self.errors[self.kept_step] if self.polished_error is None else self.polished_error

    @property
    def output_error(self) -> float:
        """The relative error of the layer's outputs as it is written. Only with calibration."""
        found = self.polished_output_error
        return self.output_errors[self.kept_step] if found is None else found

    def record(self) -> dict[str, Any]:
        """The fields by name, without those of a polish that was not done."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def initialise(source: Source, config: RunConfig) -> Initialised:
    """Return the initialised checkpoint of `source`. Create it in `init_dir` if it does not exist.

    Raises UserError if the checkpoint does not fit the settings, or if its folder holds another initialisation or cannot be
    written.
    """
    wanted = made_from(source, config)
    final = init_dir(config, digest_of(wanted))
    with exclusive(final):
        remove_damaged(final, config, SMALL)
        if found := done_before(final, wanted, config):
            log.info("quantize: done before, %s exists: %d weights, 0 computed", final, len(found.report["weights"]))
            return found
        with open_values(source.folder) as tensors:
            check_types(tensors, source.folder)
            if tensors.dequantized is not None:
                log.warning("quantize: model.path=%s: %s", source.requested, tensors.dequantized)
            layout = find_layout(source.folder, config.model.kind, tensors.shapes(), config.model.trust_remote_code,
                             Selection.of(config.quant))  # fmt: skip
            check_fit(layout, config)
            names = written_names(tensors, layout)
            check_finite(tensors, names)
            watch = StageWatch()
            worker = _Worker(config)
            samples = polish_samples(source, config)
            plan = worker.plan(source, wanted, tensors, layout)
            dtype = worker.loads_in(names, tensors, layout)
            with written_whole(final) as folder:
                write_surroundings(folder, final, source, layout, plan, config, dtype)
                head = head_tensors(source.folder, tensors, layout, config)
                factors = {name: spec.shape for name, spec in _adapter_specs(layout, plan, {}).items()}
                check_surroundings(source.folder, folder, factors, config.model)
                weights = _write_weights(folder, tensors, names, layout, plan, worker, head)
                forms = _forms(tensors, layout, plan, worker)
                report = _report(wanted, source, config, tensors, layout, plan, weights)
                if samples:
                    init = Initialised(folder, report)
                    done = polish(init, source, samples, config)
                    weights = _measured_again(init, tensors, layout, weights, worker) if done.kept else weights
                    report = _report(wanted, source, config, tensors, layout, plan, weights)
                    report["polish"] = dataclasses.asdict(done)
                check_written(folder, tensors, layout, forms, config)
                check_unchanged(source, config, wanted)
                if calibration := worker.decomposer.calibration:
                    report["calibration"] = {"tokens": calibration.tokens, "seconds": calibration.seconds}
                    if experts := calibration.experts(layout):
                        report["calibration"]["experts"] = experts
                report["quant"]["load_dtype"] = dtype
                report["totals"] |= watch.costs()
                write_report(folder, report)
    report = json.loads(json.dumps(report))  # the same containers that a later run reads: lists, no tuples
    totals = report["totals"]
    log.info("quantize: %s: %d weights, %d computed, %d from the cache, mean relative error %.4f (quantization alone %.4f)",
             final, len(weights), totals["computed"], totals["cache_hits"], totals["mean_error"],
             totals["mean_error_quantized"])  # fmt: skip
    return Initialised(final, report)


def _write_weights(
    folder: Path,
    tensors: CheckpointTensors,
    names: list[str],
    layout: Layout,
    plan: Plan,
    worker: _Worker,
    head: dict[str, torch.Tensor],
) -> list[WeightReport]:
    backbone = _backbone_specs(names, tensors, layout, plan, worker)
    reports: list[WeightReport] = []
    with (
        SafetensorsWriter(folder, backbone) as out,
        SafetensorsWriter(folder / ADAPTER, _adapter_specs(layout, plan, head), "adapter_model") as adapter,
        progress("quantize") as advance,
    ):
        for name, value in head.items():
            adapter.write(name, value)
        factors = _FactorWriter(adapter)

        def read(item: str | Target) -> str | _Read:
            return item if isinstance(item, str) else worker.read(item, plan[item.module], tensors)

        def one(item: str | _Read) -> WeightReport | None:
            if isinstance(item, str):
                out.write(item, tensors.read(item))
                return None
            stored, lora_A, lora_B, report = worker.initialise(item, plan[item.target.module])
            with item.phases.timed("write"):
                write_target(out, item.target, stored)
                factors.write(item.target, lora_A, lora_B)
            return dataclasses.replace(report, seconds=item.phases.total, phases=item.phases.seconds)

        with contextlib.closing(read_ahead(read, _items(names, layout))) as weights:
            for report in side_by_side(one, weights, worker.device):
                if report is not None:
                    reports.append(report)
                    _show(advance, reports, len(layout.targets))
    order = {target.module: position for position, target in enumerate(layout.targets)}
    return sorted(reports, key=lambda report: order[report.name])


def _items(names: Iterable[str], layout: Layout) -> list[str | Target]:
    """The targets, each where its first tensor is in the files, and the names of all other tensors."""
    owners = _owners(layout)
    items = dict.fromkeys(item for name in names for item in owners.get(name, [name]))
    return list(items)


def _owners(layout: Layout) -> dict[str, list[str | Target]]:
    """The targets that each tensor of the files holds rows of."""
    owners: dict[str, list[str | Target]] = {}
    for target in layout.targets:
        for name in target.tensors:
            owners.setdefault(name, []).append(target)
    return owners


def write_target(out: SafetensorsWriter, target: Target, stored: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors that represent a target: dense values where its pieces lie, others under their own names."""
    if set(stored) != {target.tensor}:
        for part, tensor in stored.items():
            out.write(part, tensor)
        return
    for piece, values in target.stored(stored[target.tensor]):
        out.write(piece.tensor, values, piece.index)


class _FactorWriter:
    """Writes factors to an adapter file. PEFT interleaves B of all experts, so these are held until all are there."""

    def __init__(self, out: SafetensorsWriter) -> None:
        self._out, self._lock = out, threading.Lock()
        self._held: dict[tuple[str, str], tuple[torch.Tensor, set[int]]] = {}

    def write(self, target: Target, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        """Write A (r, in) and B (out, r) of a target."""
        for factor, values in (("A", lora_A), ("B", lora_B)):
            name = _adapter_name(target, factor)
            if target.expert is None:
                self._out.write(name, values)
                continue
            shape, key = target.factor_shape(factor, len(lora_A)), (name, factor)
            with self._lock:
                whole, there = self._held.setdefault(key, (torch.empty(shape), set()))
            target.factor(factor, whole).copy_(values)
            with self._lock:
                there.add(target.expert)
                done = len(there) == target.experts and self._held.pop(key, None) is not None
            if done:
                self._out.write(name, whole)


@dataclass(frozen=True)
class _Read:
    """A weight that was read ahead."""

    target: Target
    weight: Copied
    """(out, in), on its way to the device; on the CPU if nothing is computed there."""
    digest: str
    phases: Phases


class _Worker:
    """Converts weights to backbone values and factors, through the cache."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.dtype = getattr(torch, config.save_dtype)
        self.format = storage_format(config.save_format)
        self.decomposer = Decomposer(config)
        self.device = self.decomposer.device

    def plan(self, source: Source, wanted: MadeFrom, tensors: CheckpointTensors, layout: Layout) -> Plan:
        """The bits and rank of each weight, logged if they differ. Weights are calibrated first, or with quant.order=sequential
        again afterwards.
        """
        quant, decomposer = self.config.quant, self.decomposer
        calibrated = quant.calibration != "none"
        if calibrated and (quant.order == "parallel" or is_measured(quant)):
            decomposer.calibration = calibrate(source, wanted["source"], self.config, tensors, layout)
        plan = make_plan(layout, quant, decomposer.measure(tensors, layout) if is_measured(quant) else None)
        log_plan(describe_plan(layout, plan, quant))
        if calibrated and quant.order == "sequential":
            decomposer.calibration = self._calibrate_in_order(source, wanted, tensors, layout, plan)
        return plan

    def _calibrate_in_order(
        self, source: Source, wanted: MadeFrom, tensors: CheckpointTensors, layout: Layout, plan: Plan
    ) -> Calibration:
        """Calibrate each block on the outputs of the initialised blocks before it."""

        def initialised(block: str, calibration: Calibration) -> dict[str, torch.Tensor]:
            self.decomposer.calibration = calibration
            targets = [target for target in layout.targets if target.block == block]

            def one(target: Target) -> tuple[str, torch.Tensor]:
                weight = target.read(tensors.read)
                return target.module, self.decomposer.initialised(target, weight, plan[target.module])

            return dict(side_by_side(one, targets, self.device))

        bits = {module: dataclasses.astuple(precision) for module, precision in plan.items()}
        prefix = {"settings": wanted["settings"], "versions": wanted["versions"], "plan": bits}
        return calibrate(source, wanted["source"], self.config, tensors, layout, initialised, prefix)

    def read(self, target: Target, precision: Precision, tensors: CheckpointTensors) -> _Read:
        """Read and digest a weight. Unless its result is in the cache, it is on its way to the device."""
        phases = Phases()
        with phases.timed("digest"):
            weight = target.read(tensors.read)
            digest = weight_digest(weight)
        here = self.device.type == "cpu" or self.config.quant.type == "none"
        if here or self.decomposer.is_cached(target, digest, precision):
            return _Read(target, Copied(weight), digest, phases)
        with phases.timed("copy"):
            return _Read(target, to_device(weight, self.device), digest, phases)

    def initialise(
        self, read: _Read, precision: Precision
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, WeightReport]:
        """Return the backbone's tensors by name, A (r x in) and B (out x r) as PEFT stores them, and the report."""
        target, weight, digest, phases = read.target, read.weight.take(), read.digest, read.phases
        quant, rank, (rows, columns) = self.config.quant, precision.rank, target.shape
        hit, computed = False, 0
        lora_A, lora_B = random_A(rank, columns, self.config.seed, target.module), torch.zeros(rows, rank)
        if quant.type == "none":
            values = weight.to(self.dtype)
            if not is_finite(values):
                raise UserError(f"save_dtype={self.config.save_dtype}: {target.tensor} has values that are too large for this type; "
                                "give a checkpoint of smaller values")  # fmt: skip
            stored = {target.tensor: values.cpu()}
            wide = weight.double()
            errors: tuple[float, ...] = (float((wide - values.double()).norm() / wide.norm().clamp(min=1e-300)),)
            output_errors: tuple[float, ...] = ()
            kept_step = 0
        else:
            found = self.decomposer.decomposed(target, weight, digest, precision, phases)
            result, hit, computed = found.result, found.cache_hit, found.steps_computed
            with phases.timed("decode"):
                stored = self._stored(target, result, precision.bits)
            errors, output_errors, kept_step = result.errors, result.output_errors, result.kept_step
            if quant.iter:
                share = math.sqrt(
                    quant.scaling
                )  # absorb s equally into both factors, so that s B A is the fitted product for any alpha
                lora_A, lora_B = result.lora_A / share, result.lora_B / share
        report = WeightReport(target.module, target.shape, digest, precision.bits, rank, errors, output_errors, kept_step,
                              0.0, hit, computed, {})  # fmt: skip
        return stored, lora_A.cpu(), lora_B.cpu(), report

    def _stored(self, target: Target, kept: Kept, bits: int) -> dict[str, torch.Tensor]:
        """The tensors that represent one target in the file."""
        codes = Codes(kept.packed, kept.scales, kept.shape, self.decomposer.quantizers[bits])
        return self.format.encode(self._name(target), codes, self.dtype)

    def _name(self, target: Target) -> str:
        """The name from which the format derives the names of a target's tensors."""
        return target.tensor if self.format.plain else target.own_tensor

    def loads_in(self, names: Iterable[str], tensors: CheckpointTensors, layout: Layout) -> str:
        """The torch name of the type in which the checkpoint is loaded: save_dtype, or that of all tensors but targets if the
        format keeps it. Their layer norms cannot compute otherwise.
        """
        owners = _owners(layout)
        kept = {tensors.dtype(name) for name in names if name not in owners and tensors.dtype(name).is_floating_point}
        only = kept.pop() if len(kept) == 1 and self.format.keeps_types else self.dtype
        return str(only).removeprefix("torch.")

    def stored_specs(self, target: Target, bits: int, tensors: CheckpointTensors) -> dict[str, TensorSpec]:
        """The types and shapes of the backbone tensors that hold a target at these bits."""
        if self.format.plain:
            return {name: TensorSpec(self.dtype, tensors.shape(name)) for name in target.tensors}
        return self.format.specs(self._name(target), target.shape, self.decomposer.quantizers.get(bits), self.dtype)


def _measured_again(
    init: Initialised, tensors: CheckpointTensors, layout: Layout, weights: list[WeightReport], worker: _Worker
) -> list[WeightReport]:
    """The reports of the weights of `init` with the errors of the factors in its file."""
    with measuring(init, tensors, worker.decomposer.calibration, worker.device) as errors:
        found = [(weight, *errors(target)) for weight, target in zip(weights, layout.targets, strict=True)]
    return [dataclasses.replace(weight, polished_error=error, polished_output_error=output_error)
            for weight, error, output_error in found]  # fmt: skip


def random_A(rank: int, columns: int, seed: int, module: str) -> torch.Tensor:
    """A as LoRA draws it, from the run's seed and the module's name alone, independent of the order of the weights."""
    stream = hashlib.blake2b(f"{seed} {module}".encode(), digest_size=8).digest()
    return kaiming_uniform_A((rank, columns), int.from_bytes(stream, "little") >> 1)


def _backbone_specs(
    names: list[str], tensors: CheckpointTensors, layout: Layout, plan: Plan, worker: _Worker
) -> dict[str, TensorSpec]:
    owners = _owners(layout)
    specs: dict[str, TensorSpec] = {}
    for name in names:
        if name in owners:
            for target in owners[name]:
                assert isinstance(target, Target)
                specs |= worker.stored_specs(target, plan[target.module].bits, tensors)
        else:
            specs[name] = TensorSpec(tensors.dtype(name), tensors.shape(name))
    return specs


def _forms(tensors: CheckpointTensors, layout: Layout, plan: Plan, worker: _Worker) -> Forms:
    """The dense shape of each tensor of a target, and the names under which it is written."""
    forms: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    for target in layout.targets:
        parts = list(worker.stored_specs(target, plan[target.module].bits, tensors))
        for name in target.tensors:
            shape, names = forms.get(name, (tensors.shape(name), []))
            forms[name] = shape, [name] if worker.format.plain else [*names, *parts]
    return forms


def _adapter_name(target: Target, factor: str) -> str:
    return f"{PREFIX}{target.layer}.lora_{factor}.weight"


def _adapter_specs(layout: Layout, plan: Plan, head: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    specs = {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in head.items()}
    for target in layout.targets:
        for factor in "AB":
            shape = target.factor_shape(factor, plan[target.module].rank)
            specs[_adapter_name(target, factor)] = TensorSpec(torch.float32, shape)
    return specs


def _show(advance: Advance, reports: list[WeightReport], total: int) -> None:
    mean = sum(report.error for report in reports) / len(reports)
    hits = sum(report.cache_hit for report in reports)
    advance(len(reports), total, f"mean relative error {mean:.4f}, {hits} from the cache")


def _report(
    wanted: MadeFrom,
    source: Source,
    config: RunConfig,
    tensors: CheckpointTensors,
    layout: Layout,
    plan: Plan,
    weights: list[WeightReport],
) -> dict[str, Any]:
    quant = config.quant
    totals, not_quantized = coverage(tensors, layout, bits_per_weight(config, code_bits(layout, plan)), quant.type)
    values = sum(math.prod(weight.shape) for weight in weights)
    dequantized = {} if tensors.dequantized is None else {"dequantized": tensors.dequantized.record()}
    return {
        "format": REPORT_FORMAT,
        "key": digest_of(wanted),
        "made_from": wanted,
        "model": {"requested": source.requested, "commit": source.commit, "kind": config.model.kind,
                  **dequantized},
        "quant": dataclasses.asdict(quant) | {"scaling": quant.scaling, "save_dtype": config.save_dtype,
                                              "save_format": config.save_format},
        "target_modules": list(layout.target_modules),
        "target_parameters": list(layout.target_parameters),
        "other_linears": list(layout.other_linears),
        "head": list(layout.head),
        "left_out": list(layout.foreign),
        "excluded": list(layout.excluded),
        "not_quantized": not_quantized,
        "totals": {
            "weights": len(weights),
            "values": values,
            "computed": sum(not weight.cache_hit for weight in weights) if quant.type != "none" else 0,
            "cache_hits": sum(weight.cache_hit for weight in weights),
            "mean_error_quantized": sum(weight.errors[0] for weight in weights) / len(weights),
            "mean_error": sum(weight.error for weight in weights) / len(weights),
            **_output_errors(weights),
            **totals,
            "phases": _summed([weight.phases for weight in weights]),
        },
        "bits_plan": describe_plan(layout, plan, quant),
        "weights": [weight.record() for weight in weights],
        "provenance": provenance(),
    }  # fmt: skip


def _output_errors(weights: list[WeightReport]) -> dict[str, float]:
    """The mean relative errors of the layers' outputs; nothing without calibration."""
    if not all(weight.output_errors for weight in weights):
        return {}
    return {
        "mean_output_error_quantized": sum(weight.output_errors[0] for weight in weights) / len(weights),
        "mean_output_error": sum(weight.output_error for weight in weights) / len(weights),
    }


def _summed(phases: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for phase in phases for name in phase)
    return {name: sum(phase.get(name, 0.0) for phase in phases) for name in names}
