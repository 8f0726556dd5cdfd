"""Export an adapter and its backbone Q: merged, as a checkpoint or a GGUF, packed with the adapter beside it, or apart.

Q is read only from an initialised checkpoint. The pre-trained weights W are never read, so an adapter cannot be merged
into them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from loftq_exp import manifest
from loftq_exp.artifact.adapter import CONFIG, WEIGHTS, Adapter, default_adapter, open_adapter
from loftq_exp.artifact.backbone import Backbone, BackboneWeight, open_backbone
from loftq_exp.artifact.folder import (
    ADAPTER,
    exclusive,
    write_report,
    written_whole,
)
from loftq_exp.artifact.gguf_model import check_config, write_gguf
from loftq_exp.artifact.writer import SafetensorsWriter
from loftq_exp.errors import UserError
from loftq_exp.integrations.loads import check_report
from loftq_exp.progress import progress
from loftq_exp.schemes import FORMATS
from loftq_exp.source.files import LICENCES, carry_files
from loftq_exp.source.layout import AUTO_CLASSES, left_dense, load_config
from loftq_exp.source.loading import load_report
from loftq_exp.storage.format import StorageFormat, storage_format
from loftq_exp.storage.specs import TensorSpec

PAIR, BASE = "adapter", "base"
"""The form of OUT that keeps Q and the adapter apart, and its folders."""
GGUF = "gguf"
"""The form of OUT that llama.cpp reads."""


def export(folder: Path, out: Path, adapter: Path | None = None, to: str = "dense", dtype: str | None = None) -> str:
    """Write the checkpoint in `folder` with `adapter` (None: its initial factors) to `out`. Return a one-line summary.

    Args:
        folder: an initialised checkpoint.
        out: a folder that is absent or empty. It is complete or absent, even if the export fails.
        adapter: a folder with a PEFT LoRA adapter of that checkpoint.
        to: the storage format, `dense`, `bnb4` or `packed`; `adapter`: OUT/base is Q, dense, and OUT/adapter the adapter; or
            `gguf`: one file for llama.cpp.
        dtype: the torch name of the type of dense tensors, or `q8_0` for `gguf`; None for the checkpoint's save_dtype.

    Raises:
        UserError: if checkpoint, adapter, format or `out` do not fit.
    """
    form = storage_format("dense" if to in (PAIR, GGUF) else to)
    if dtype == "q8_0" and to != GGUF:
        raise UserError(
            f"--dtype={dtype}: only --to {GGUF} has blocks of 8-bit codes; use bfloat16, float16 or float32"
        )
    if dtype and not form.takes_values:
        raise UserError(f"--dtype={dtype}: --to {to} keeps every type unchanged; leave --dtype out")
    with open_backbone(folder) as backbone, open_adapter(adapter or default_adapter(folder), backbone) as opened:
        _check_form(backbone, form)
        if to == PAIR and opened.head:
            raise UserError(
                f"--to={to}: the adapter also holds {min(opened.head)}, which vLLM does not take; use --to dense"
            )
        kept: str = dtype or backbone.init.report["quant"]["save_dtype"]
        sources, untied = _sources(backbone, opened)
        config = _config(backbone, opened, form, getattr(torch, kept, torch.float32), untied)
        if to == GGUF:
            check_config(config)
        _check_whole(backbone, opened, config, sources)
        with exclusive(out, "OUT"):
            if out.exists() and not (out.is_dir() and not any(out.iterdir())):
                raise UserError(f"OUT={out}: already exists and is not empty; give a new folder")
            with written_whole(out, "OUT") as partial:
                if to == GGUF:
                    return _write_gguf(partial, out, backbone, opened, sources, config, kept)
                base = partial / BASE if to == PAIR else partial
                base.mkdir(exist_ok=True)
                _write_weights(base, backbone, opened, sources, form, getattr(torch, kept), merge=to != PAIR)
                config.save_pretrained(base)
                carry_files(folder, base)
                manifest.complete(base)
                if to == PAIR:
                    _write_adapter(partial / PAIR, opened, out / BASE)
                if not form.takes_values:
                    _keep_adapter(partial, out, backbone, opened)
    weights, name = len(backbone.weights), AUTO_CLASSES[backbone.init.report["model"]["kind"]].__name__
    if to == PAIR:
        of_parameters = backbone.init.report.get("target_parameters")
        loads = "PEFT loads both, vLLM no target_parameters" if of_parameters else "PEFT and vLLM load both"
        return f"{out}: {weights} weights of Q in {kept} in {BASE}, the adapter in {PAIR}; {loads}"
    if not form.takes_values:
        return f"{out}: {weights} {to} weights unchanged, the adapter in {ADAPTER}"
    types = f"{form.export_note}, all else in {kept}" if form.export_note else f"in {kept}"
    return f"{out}: {weights} weights merged, {types}; {name}.from_pretrained({str(out)!r}) loads it"


def _check_form(backbone: Backbone, form: StorageFormat) -> None:
    """Raise UserError if this checkpoint cannot be exported in that format."""
    stored, to, dense = backbone.format, form.name, _only_dense(backbone)
    if not form.takes_values and stored is not form:
        merged = [name for name in FORMATS if storage_format(name).takes_values]
        others = " or ".join(name for name in merged if not (dense and storage_format(name).needs_plain_linears))
        raise UserError(f"--to={to}: DIR={backbone.init.folder} is stored as {stored.name}, and only save_format={to} has {to} "
                        f"weights; use --to {others}")  # fmt: skip
    if form.needs_plain_linears and dense:
        raise UserError(f"--to={to}: transformers loads {dense} only as a dense layer; use --to dense")


def _only_dense(backbone: Backbone) -> str | None:
    """The first weight that transformers loads only dense: an expert's, or that of a layer in `left_dense`."""
    expert = next((name for name, weight in backbone.weights.items() if weight.target.expert is not None), None)
    return expert or next(iter(left_dense(backbone.model, backbone.weights)), None)


def _sources(backbone: Backbone, adapter: Adapter) -> tuple[dict[str, str], bool]:
    """The stored tensor of each name in OUT that is neither a target nor trained, and whether tied weights are untied.

    If the adapter trained only one of several tied weights, such as a head tied to the embeddings, the others keep the
    stored value under their own names.
    """
    sources = {_full_name(stored, backbone): stored for stored in backbone.others}
    ties: dict[str, str] = backbone.model.all_tied_weights_keys
    untied = False
    for first in dict.fromkeys(ties.values()):
        group = (first, *(name for name, source in ties.items() if source == first))
        stored = next((sources[name] for name in group if name in sources), None)
        if stored is not None and not adapter.head.keys().isdisjoint(group):
            sources |= dict.fromkeys(group, stored)
            untied = True
    return {name: stored for name, stored in sources.items() if name not in adapter.head}, untied


def _check_whole(
    backbone: Backbone, adapter: Adapter, config: transformers.PretrainedConfig, sources: Mapping[str, str]
) -> None:
    """Raise UserError if transformers would report a missing or unexpected tensor in OUT."""
    with torch.device("meta"):
        model = type(backbone.model)(config)
    shapes = {name: backbone.tensors.shape(stored) for name, stored in sources.items()} | adapter.head
    for weight in backbone.weights.values():
        shapes |= {_full_name(name, backbone): shape for name, shape in _dense_shapes(backbone, weight).items()}
    check_report(
        load_report(model, shapes).as_transformers,
        f"DIR={backbone.init.folder}",
        "the checkpoint is damaged: quantize again",
    )


def _write_weights(
    folder: Path,
    backbone: Backbone,
    adapter: Adapter,
    sources: Mapping[str, str],
    form: StorageFormat,
    dtype: torch.dtype,
    merge: bool,
) -> None:
    """Write the weights one at a time: targets (Q + s B A, or Q without `merge`), the trained head, and the others, listed in `sources`."""
    tensors = backbone.tensors
    specs = {
        name: TensorSpec(_written_type(tensors.dtype(stored), form, dtype), tensors.shape(stored))
        for name, stored in sources.items()
    }
    specs |= {name: TensorSpec(dtype, shape) for name, shape in adapter.head.items()}
    for weight in backbone.weights.values():
        specs |= _target_specs(backbone, weight, form, dtype)
    with SafetensorsWriter(folder, specs) as out, progress("export") as advance:
        for name, stored in sources.items():
            out.write(name, _converted(name, tensors.read(stored), specs[name].dtype))
        for name in adapter.head:
            out.write(name, _converted(name, adapter.head_values(name), dtype))
        for done, weight in enumerate(backbone.weights.values(), 1):
            for part, tensor, index in _target_tensors(backbone, adapter if merge else None, weight, form, dtype):
                out.write(part, tensor, index)
            advance(done, len(backbone.weights))


def _dense_shapes(backbone: Backbone, weight: BackboneWeight) -> dict[str, tuple[int, ...]]:
    """The shapes of the dense tensors with rows of a weight, by their names in the files."""
    target, tensors = weight.target, backbone.tensors
    if backbone.format.plain:
        return {name: tensors.shape(name) for name in target.tensors}
    if target.expert is not None:
        return {target.parameter: tuple(backbone.model.get_parameter(target.parameter).shape)}
    return {weight.tensor: target.shape[::-1] if target.pieces else target.shape}  # GPT-2's are (in, out)


def _write_gguf(
    folder: Path,
    out: Path,
    backbone: Backbone,
    adapter: Adapter,
    sources: Mapping[str, str],
    config: transformers.PretrainedConfig,
    kind: str,
) -> str:
    """Write the merged model as a GGUF to `folder`, with the model's licence and a README. Return the summary of the export."""
    tensors, init = backbone.tensors, backbone.init
    targets = {_full_name(weight.tensor, backbone): module for module, weight in backbone.weights.items()}
    shapes = {name: tensors.shape(stored) for name, stored in sources.items()}
    shapes |= {name: backbone.weights[module].shape for name, module in targets.items()}

    def values(name: str) -> torch.Tensor:
        if name in targets:
            return adapter.merged(backbone.weights[targets[name]], backbone.values(targets[name]))
        return tensors.read(sources[name])

    base = init.folder.resolve().name
    place = folder / f"{base}-{kind}.gguf"
    write_gguf(place, config, init.folder, shapes, values, kind, base)
    for path in (path for pattern in LICENCES for path in init.folder.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(f"""# {place.name}

`Q + s B A` of {len(targets)} weights, merged by `loftq_exp.export` from the initialised checkpoint `{init.folder.resolve()}` and
the adapter `{adapter.folder.resolve()}`. Matrices are in {kind}. The pre-trained model is {init.report["model"]["requested"]}, and its
licence applies. For llama.cpp: `llama-cli -m {place.name}`.
""")
    return f"{out / place.name}: {len(targets)} weights merged, in {kind}; llama.cpp loads it"


def _target_specs(
    backbone: Backbone, weight: BackboneWeight, form: StorageFormat, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """The types and shapes of the tensors that `_target_tensors` yields."""
    tensors = backbone.tensors
    if not form.takes_values:
        return {
            _full_name(part, backbone): TensorSpec(tensors.dtype(part), tensors.shape(part)) for part in weight.parts
        }
    if form.plain:
        shapes = _dense_shapes(backbone, weight)
        return {_full_name(name, backbone): TensorSpec(dtype, shape) for name, shape in shapes.items()}
    return form.specs(_full_name(weight.tensor, backbone), weight.shape, None, dtype)


def _target_tensors(
    backbone: Backbone, adapter: Adapter | None, weight: BackboneWeight, form: StorageFormat, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Yield the tensors of one target in OUT, by name: the stored ones, or Q + s B A (Q without an adapter) in the new format.

    With a number, it is that entry of the tensor.
    """
    values = backbone.values(weight.target.module)  # raises UserError for damaged tensors
    if not form.takes_values:
        yield from ((_full_name(part, backbone), backbone.tensors.read(part), None) for part in weight.parts)
        return
    name = _full_name(weight.tensor, backbone)
    values = _converted(name, adapter.merged(weight, values) if adapter else values, dtype)
    if form.plain:
        for piece, rows in weight.target.stored(values):
            yield _full_name(piece.tensor, backbone), rows, piece.index
        return
    for part, tensor in form.encode_values(name, values).items():
        yield part, tensor, None


def _written_type(stored: torch.dtype, form: StorageFormat, dtype: torch.dtype) -> torch.dtype:
    """The written type of a tensor that is not a target. Integers, such as positions, keep their type."""
    return dtype if stored.is_floating_point and form.takes_values else stored


def _converted(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in `dtype`. Raises UserError if they are not finite in it."""
    converted = values.to(dtype)
    if converted.is_floating_point() and not bool(torch.isfinite(converted).all()):
        if bool(torch.isfinite(values).all()):
            raise UserError(f"--dtype={str(dtype).removeprefix('torch.')}: {name} has values up to {float(values.abs().max()):.3g}, "
                            "beyond that type; use bfloat16 or float32")  # fmt: skip
        raise UserError(f"{name}: NaN or infinite values; the adapter's training diverged, or a file is damaged")
    return converted


def _full_name(stored: str, backbone: Backbone) -> str:
    """The model's own name for a stored tensor. It adds the prefix that a base checkpoint lacks, even if a head is stored."""
    model = backbone.model
    prefix = f"{model.base_model_prefix}."
    has_base = isinstance(getattr(model, model.base_model_prefix, None), nn.Module)
    if not has_base or any(name.startswith(prefix) for name in backbone.tensors.names):
        return stored
    return stored if stored.split(".")[0] in dict(model.named_children()) else prefix + stored


def _config(
    backbone: Backbone, adapter: Adapter, form: StorageFormat, dtype: torch.dtype, untied: bool
) -> transformers.PretrainedConfig:
    """The exported config, for the model class and the storage format."""
    report = backbone.init.report
    config = load_config(backbone.init.folder, kind=report["model"]["kind"])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(backbone.model).__name__]
    if adapter.num_labels is not None:
        config.num_labels, config.problem_type = adapter.num_labels, None
    quantization: Any = backbone.settings
    if form.takes_values:  # otherwise weights and quantization_config stay unchanged
        quantization = form.quantization_config(None, {}, report["other_linears"], dtype)
    if quantization is not None:
        config.quantization_config = quantization
    if untied:
        config.tie_word_embeddings = False
    return config


def _keep_adapter(folder: Path, out: Path, backbone: Backbone, adapter: Adapter) -> None:
    """Write the adapter and the report beside the packed backbone, so that OUT can itself be exported."""
    _write_adapter(folder / ADAPTER, adapter, out)
    # Omit the key: the quantize stage must not mistake a fine-tuned adapter for the initial factors of that key.
    report = {name: value for name, value in backbone.init.report.items() if name != "key"}
    report["exported_from"] = str(backbone.init.folder.resolve())
    write_report(folder, report)


def _write_adapter(folder: Path, adapter: Adapter, base: Path) -> None:
    """Write the adapter to the new `folder`, with `base` as its backbone and without LoftQ's own settings."""
    folder.mkdir()
    shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
    settings = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name != "loftq_config"}
    # A trained adapter's values are in its file: PEFT must not initialise anything again.
    settings |= {"base_model_name_or_path": str(base.resolve()), "inference_mode": True, "init_lora_weights": True}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    manifest.complete(folder)
