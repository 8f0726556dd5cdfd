"""The quantize stage of `quant=off-the-shelf`: convert a published checkpoint to an initialised one.

Backbone, factors and alpha are kept as published. Errors are unknown, as they require the pre-trained weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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
from loftq_exp.initialise.coverage import bits_per_weight, coverage, written_names
from loftq_exp.initialise.kept import remove_damaged
from loftq_exp.initialise.key import REPORT_FORMAT, MadeFrom, check_unchanged, done_before, init_dir, made_from
from loftq_exp.initialise.prequantized import check_types
from loftq_exp.initialise.proof import check_surroundings
from loftq_exp.initialise.published import find_adapter
from loftq_exp.initialise.verify import check_written
from loftq_exp.manifest import SMALL
from loftq_exp.provenance import provenance
from loftq_exp.source.finite import check_finite, is_finite
from loftq_exp.source.layout import Layout, find_layout
from loftq_exp.source.locate import Source
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors, open_tensors
from loftq_exp.storage.specs import TensorSpec

log = logging.getLogger(__name__)

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")
_BEYOND_PLAIN = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
_BLOCKS_LOOKED_AT = 1024
"""Blocks of each weight whose values are counted: enough to distinguish 2 bits, 4 bits and no quantization."""


@dataclass(frozen=True)
class _Adapter:
    """A published adapter: adapter_config.json, the factors by their PEFT names, and the weights that have factors."""

    folder: str
    settings: dict[str, Any]
    factors: dict[str, torch.Tensor]
    targets: tuple[Target, ...]

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return float(self.settings["lora_alpha"]) / int(self.settings["r"])


def take(source: Source, config: RunConfig) -> Initialised:
    """Return the initialised checkpoint of the published one in `source`. Create it in `init_dir` if it does not exist.

    Raises UserError if the checkpoint does not fit the settings, or if its folder holds another initialisation or cannot be
    written.
    """
    watch = StageWatch()
    wanted = made_from(source, config)
    final = init_dir(config, digest_of(wanted))
    with exclusive(final), _about_quant_path():
        remove_damaged(final, config, SMALL)
        if found := done_before(final, wanted, config):
            log.info("quantize: done before, %s exists: taken from a published checkpoint", final)
            return found
        with open_tensors(source.folder) as tensors:
            layout = _find_layout(tensors, source, config)
            adapter = _read_adapter(source, layout, config)
            names = written_names(tensors, layout)
            check_finite(tensors, names)
            with written_whole(final) as folder:
                report = _report(wanted, source, config, tensors, layout, adapter)
                _write(folder, final, source, config, tensors, names, layout, adapter)
                check_written(folder, tensors, layout, {}, config)
                check_unchanged(source, config, wanted)
                report["totals"] |= watch.costs()
                write_report(folder, report)
    _log_taken(final, report)
    return Initialised(final, report)


@contextmanager
def _about_quant_path() -> Iterator[None]:
    """Replace `model.path` by `quant.path` in errors, as the published checkpoint comes from that setting."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^model\.path", "quant.path", str(error))) from error


def _find_layout(tensors: CheckpointTensors, source: Source, config: RunConfig) -> Layout:
    packed = next((name for name in tensors.names if ".quant_state." in name or name.endswith(".qweight")), None)
    if packed:
        weight = packed.partition(".quant_state.")[0].removesuffix(".qweight")
        raise UserError(
            f"quant.path={source.requested}: {weight} is packed; off-the-shelf needs a checkpoint that was saved dense"
        )
    check_types(tensors, source.folder)
    layout = find_layout(source.folder, config.model.kind, tensors.shapes(), config.model.trust_remote_code)
    if layout.target_parameters:
        raise UserError(f"quant.path={source.requested}: {layout.target_parameters[0]} is adapted as a parameter, which off-the-shelf "
                        "does not read; use quant=loftq with the pre-trained model")  # fmt: skip
    return layout


def _read_adapter(source: Source, layout: Layout, config: RunConfig) -> _Adapter:
    """The adapter of the checkpoint. Raises UserError if there is none, or if it does not fit."""
    folder, weights = find_adapter(source)
    try:
        settings = json.loads((weights.parent / "adapter_config.json").read_text(encoding="utf-8"))
        rank, _ = int(settings["r"]), float(settings["lora_alpha"])
        if weights.suffix == ".safetensors":
            factors = load_file(weights)
        else:
            factors = torch.load(weights, map_location="cpu", weights_only=True)
        factors = {name: tensor.float().contiguous() for name, tensor in factors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, SafetensorError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise UserError(f"quant.path={source.requested}: the adapter in {weights.parent} cannot be read "
                        f"({type(error).__name__}); download it again") from error  # fmt: skip
    if beyond := [name for name in _BEYOND_PLAIN if settings.get(name)]:
        raise UserError(f"quant.path={source.requested}: its adapter uses {beyond[0]}, which changes what its factors mean; "
                        "give a checkpoint with a plain LoRA adapter")  # fmt: skip
    if rank != config.quant.rank:
        raise UserError(f"quant.rank={config.quant.rank}: the adapter of {source.requested} has rank {rank}; "
                        f"set quant.rank={rank}")  # fmt: skip
    _check_factors(factors, layout, rank, f"quant.path={source.requested}")
    adapted = {_FACTOR.sub(r"\g<module>", name) for name in factors}
    return _Adapter(folder, settings, factors, tuple(target for target in layout.targets if target.module in adapted))


def _check_factors(factors: dict[str, torch.Tensor], layout: Layout, rank: int, given: str) -> None:
    """Raise UserError unless `factors` are A (rank x in) and B (out x rank) of linear layers in the model's blocks."""
    expected = {}
    for target in layout.targets:
        expected[f"base_model.model.{target.module}.lora_A.weight"] = (rank, target.shape[1])
        expected[f"base_model.model.{target.module}.lora_B.weight"] = (target.shape[0], rank)
    if not factors:
        raise UserError(f"{given}: its adapter is empty; download it again")
    for name, tensor in factors.items():
        if name not in expected:
            raise UserError(f"{given}: its adapter holds {name}, which belongs to no linear layer of the model's blocks; "
                            "choose the model group of its family, or set model.kind")  # fmt: skip
        if tuple(tensor.shape) != expected[name]:
            raise UserError(f"{given}: {name} has shape {tuple(tensor.shape)}, its layer and rank {rank} need "
                            f"{expected[name]}; backbone and adapter do not belong together")  # fmt: skip
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in factors:
            raise UserError(f"{given}: its adapter lacks {other}; download it again")
        if not is_finite(tensor):
            raise UserError(f"{given}: {name} of its adapter holds NaN or Inf; download it again")


def _write(
    folder: Path,
    final: Path,
    source: Source,
    config: RunConfig,
    tensors: CheckpointTensors,
    names: list[str],
    layout: Layout,
    adapter: _Adapter,
) -> None:
    """Write the published checkpoint to `folder` in the layout of an initialised one."""
    specs = {name: TensorSpec(tensors.dtype(name), tensors.shape(name)) for name in names}
    with SafetensorsWriter(folder, specs) as out:
        for name in names:
            out.write(name, tensors.read(name))
    write_surroundings(
        folder, final, source, layout, {}, dataclasses.replace(config, save_dtype=_dtype(tensors, adapter))
    )
    save_file(adapter.factors, folder / ADAPTER / "adapter_model.safetensors", {"format": "pt"})
    place = folder / "config.json"
    model_config = json.loads(place.read_text())
    if model_config.pop(
        "quantization_config", None
    ):  # a leftover of a model that was saved dequantized; loading would quantize it again
        place.write_text(json.dumps(model_config, indent=2) + "\n")
    place = folder / ADAPTER / "adapter_config.json"
    ours = json.loads(place.read_text())
    ours |= {"lora_alpha": adapter.settings["lora_alpha"], "target_modules": _target_modules(layout, adapter)}
    place.write_text(json.dumps(ours, indent=2, sort_keys=True) + "\n")
    check_surroundings(source.folder, folder, {name: tuple(tensor.shape) for name, tensor in adapter.factors.items()},
                       config.model)  # fmt: skip


def _target_modules(layout: Layout, adapter: _Adapter) -> list[str]:
    """The shortest names that match the adapter's modules and no others, to which PEFT would add factors."""
    whole = len(adapter.targets) == len(layout.targets)
    return list(layout.target_modules) if whole else [target.module for target in adapter.targets]


def _dtype(tensors: CheckpointTensors, adapter: _Adapter) -> str:
    """The torch name of the type in which the published backbone is stored."""
    return str(tensors.dtype(adapter.targets[0].tensor)).removeprefix("torch.")


def _values_in_a_block(tensors: CheckpointTensors, adapter: _Adapter, block_size: int) -> int:
    """The largest number of distinct values in one block of a weight: at most 2^bits if it is quantized."""
    most = 0
    for target in adapter.targets:
        values = target.read(tensors.read).reshape(-1)[: block_size * _BLOCKS_LOOKED_AT].float()
        blocks, _ = values[: values.numel() // block_size * block_size].reshape(-1, block_size).sort(dim=1)
        if blocks.numel():
            most = max(most, int((blocks.diff(dim=1) != 0).sum(dim=1).max()) + 1)
    return most


def _report(
    wanted: MadeFrom, source: Source, config: RunConfig, tensors: CheckpointTensors, layout: Layout, adapter: _Adapter
) -> dict[str, Any]:
    """The content of init_report.json: as for a quantized checkpoint, with unknown values empty, plus the origin."""
    quant, dtype = config.quant, _dtype(tensors, adapter)
    adapted = {target.module for target in adapter.targets}
    kept = [target for target in layout.targets if target.module not in adapted]
    bits = bits_per_weight(dataclasses.replace(config, save_dtype=dtype), quant.bits)
    totals, not_quantized = coverage(tensors, layout, bits, quant.type, kept)
    weights = [{"name": target.module, "shape": list(target.shape), "bits": quant.bits, "rank": quant.rank, "errors": []}
               for target in adapter.targets]  # fmt: skip
    return {
        "format": REPORT_FORMAT,
        "key": digest_of(wanted),
        "made_from": wanted,
        "model": {"requested": source.requested, "commit": source.commit, "kind": config.model.kind},
        "quant": dataclasses.asdict(quant) | {"scaling": adapter.scaling, "save_dtype": config.save_dtype,
                                              "save_format": config.save_format},
        "off_the_shelf": {
            "taken_from": source.requested,
            "commit": source.commit,
            "adapter_folder": adapter.folder or ".",
            "lora_alpha": adapter.settings["lora_alpha"],
            "alpha_matches_rank": adapter.scaling == 1,
            "stored_dtype": dtype,
            "values_in_a_block": _values_in_a_block(tensors, adapter, quant.block_size),
        },
        "target_modules": _target_modules(layout, adapter),
        "other_linears": [*layout.other_linears, *(target.module for target in kept)],
        "left_out": list(layout.foreign),
        "not_quantized": not_quantized,
        "totals": {
            "weights": len(weights),
            "values": sum(math.prod(target.shape) for target in adapter.targets),
            "computed": 0,
            "cache_hits": 0,
            "mean_error_quantized": None,
            "mean_error": None,
            **totals,
        },
        "weights": weights,
        "provenance": provenance(),
    }  # fmt: skip


def _log_taken(final: Path, report: dict[str, Any]) -> None:
    taken, quant = report["off_the_shelf"], report["quant"]
    commit = f" at commit {taken['commit'][:12]}" if taken["commit"] else ""
    log.info("quantize: %s: %d weights taken off the shelf from %s%s; their errors are unknown without the pre-trained weights",
             final, report["totals"]["weights"], taken["taken_from"], commit)  # fmt: skip
    if not taken["alpha_matches_rank"]:
        log.warning("quantize: the published alpha %g does not match rank %d and is kept: training starts from Q + %g B A, not "
                    "from the fitted Q + B A", taken["lora_alpha"], quant["rank"], quant["scaling"])  # fmt: skip
    if taken["values_in_a_block"] > 2 ** quant["bits"]:
        log.warning("quantize: blocks of %d values hold up to %d distinct ones, too many for %d bits: loading in 4 bits will "
                    "change them; use train.backbone=dense", quant["block_size"], taken["values_in_a_block"], quant["bits"])  # fmt: skip
