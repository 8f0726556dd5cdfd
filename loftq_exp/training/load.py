"""Loading an initialised checkpoint as a trainable model: the backbone in 4-bit, packed or dense layers, with the adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn

from loftq_exp import manifest
from loftq_exp.artifact.folder import ADAPTER, Initialised, check_artifact, check_place
from loftq_exp.config import RunConfig
from loftq_exp.device import compute_device
from loftq_exp.errors import UserError
from loftq_exp.foreign import explained
from loftq_exp.integrations.loads import check_report, collected_log, failed_conversion, without_bars
from loftq_exp.schemes import FORMATS
from loftq_exp.source.files import read_tokenizer
from loftq_exp.source.head import PREFIX, draw_head
from loftq_exp.source.layout import AUTO_CLASSES, load_config, skeleton
from loftq_exp.source.locate import Source
from loftq_exp.storage.format import storage_format
from loftq_exp.training.loaded_adapter import put_adapter, read_adapter
from loftq_exp.training.placement import Placement
from loftq_exp.training.sharding import is_sharded

log = logging.getLogger(__name__)


def load_model(
    init: Initialised,
    adapter: Path | None,
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_labels: int | None = None,
    written: bool = True,
    placement: Placement | None = None,
) -> PeftModel:
    """Return the backbone of `init` with the adapter in the folder `adapter`, or with the initial factors if it is None.

    The adapter's parameters and the head of a classifier are trainable and in float32. Everything else is frozen.
    Activations are computed in `dtype`. `num_labels` is the number of outputs that a classification task needs (1:
    regression; None: the checkpoint's own number). If the initial head has another number, its parameters whose shape
    depends on it are drawn from `config.seed`. A saved adapter holds its own head. Nothing else is drawn.

    Raises UserError if `init` was made for another `model.kind`, if a file is not as it was written, or if backbone or
    adapter have a missing tensor, an unexpected tensor or a tensor of the wrong shape. Not `written` is a checkpoint that
    this process is still writing. A `placement` spreads the layers over devices (see `placed`); such a model only scores.
    """
    made_for = init.report["model"]["kind"]
    if made_for != config.model.kind:
        raise UserError(f"model.kind={config.model.kind}: the checkpoint at {init.folder} was made for {made_for}; "
                        "add quantize to stages, or set another save_dir")  # fmt: skip
    again = (
        f"delete {init.folder} and quantize again"
        if adapter is None
        else f"delete {adapter.parent} and fine-tune again"
    )
    folder = adapter or init.folder / ADAPTER
    if written:
        check_artifact(init, f"delete {init.folder} and quantize again")
        manifest.check(folder, again)
    options: dict[str, Any] = {}
    resized = False
    if num_labels is not None and config.model.kind == "classification":
        resized = num_labels != load_config(init.folder, config.model.trust_remote_code).num_labels
        # problem_type is reset, because a checkpoint may name that of an earlier task.
        options = {"num_labels": num_labels, "problem_type": None, "ignore_mismatched_sizes": resized}
    form = storage_format(backbone_form(init, config, device))
    if form is not storage_format(config.save_format):
        # The config of a checkpoint stored in this form names it; passing even None here would hide that from transformers.
        # A dense checkpoint is quantized to the same values while it loads. (In a wider dtype than the stored one, 4-bit
        # layers omit its rounding.)
        bits = {weight["name"]: weight["bits"] for weight in init.report["weights"]}
        options["quantization_config"] = form.quantization_config(
            config.quant.scheme, bits, init.report["other_linears"], dtype
        )
        if is_sharded(config) and hasattr(options["quantization_config"], "bnb_4bit_quant_storage"):
            # FSDP spreads parameters of one floating type only. The bytes of the codes are the same.
            options["quantization_config"].bnb_4bit_quant_storage = dtype
    with without_bars():
        backbone = _load_backbone(init, config, dtype, {**(placement or {"device_map": {"": device}}), **options})
    if written:
        check_place(init)
    form.settle(backbone, [weight["name"] for weight in init.report["weights"]], dtype)
    backbone.config.use_cache = False  # not used in training; the evaluation enables it
    for name in init.report.get("head", ()):
        # PEFT trains a copy of the head. In bfloat16 small updates would be lost.
        backbone.get_submodule(name).float().register_forward_pre_hook(_widen)
    values = read_adapter(folder, again)
    if resized and adapter is None:
        values |= _resized_head(values, init, config, num_labels)
    return put_adapter(backbone, values, folder, again)


def _widen(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the head's inputs to float32, the dtype of its parameters."""
    return tuple(value.float() if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)


def _resized_head(
    initial: Mapping[str, torch.Tensor], init: Initialised, config: RunConfig, num_labels: int | None
) -> dict[str, torch.Tensor]:
    """New values for the head's parameters whose shape differs from the initial adapter's, by their names in it."""
    model = skeleton(init.folder, config.model.kind, config.model.trust_remote_code, num_labels)
    drawn = {PREFIX + name: value for name, value in draw_head(model, init.report["head"], config.seed).items()}
    head = {name: value for name, value in drawn.items() if name in initial and initial[name].shape != value.shape}
    log.info("head of %s outputs, drawn from seed %d: %s", num_labels, config.seed,
             ", ".join(name.removeprefix(PREFIX) for name in head))  # fmt: skip
    return head


def load_tokenizer(init: Initialised | Source, config: RunConfig) -> transformers.PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer. Raises UserError if the checkpoint has none."""
    try:
        return read_tokenizer(init.folder, config.model.trust_remote_code)
    except UserError as error:
        raise UserError(f"model.path={config.model.path}: {error}") from error.__cause__


def backbone_form(init: Initialised, config: RunConfig, device: torch.device) -> str:
    """Return the format of the backbone in memory.

    It is `train.backbone` or, for `auto`, the smallest format that the checkpoint can load as and that holds its values.
    Raises UserError if the layers of every such format cannot compute with rows of this checkpoint's length.
    """
    stored, chosen = FORMATS[config.save_format], config.train.backbone
    forms = stored.forms if chosen == "auto" else (chosen,)
    faults = []
    for form in filter(config.fits, forms):
        fault = _misfit(init, form, device)
        if fault is None:
            return form
        faults.append(f"train.backbone={form}: {fault}")
    raise UserError(f"{faults[0]}; use train.backbone=dense and save_format=dense")


def check_offload(init: Initialised, config: RunConfig) -> None:
    """Raise UserError if scoring would surely offload bitsandbytes' layers, which they do not survive."""
    device = compute_device(config.device)
    if config.evaluate.max_memory and device.type == "cpu" and backbone_form(init, config, device) == "bnb4":
        raise UserError("evaluate.max_memory: without a GPU it keeps layers on the disk, and bitsandbytes' cannot be offloaded; "
                        "leave it out, or use train.backbone=dense, or save_format=packed")  # fmt: skip


def _misfit(init: Initialised, form: str, device: torch.device) -> str | None:
    """Describe the first weight that layers of this form cannot compute with. None if there is none."""
    parameters = init.report.get("target_parameters")
    if parameters and not storage_format(form).holds_parameters:
        return f"{parameters[0]} is adapted as a parameter, which only a dense or packed backbone holds"
    for weight in init.report["weights"]:
        columns = weight["shape"][1]
        if why := storage_format(form).cannot_hold(columns, device):
            return f"{weight['name']} has rows of {columns} values, and {why}"
    return None


def _load_backbone(init: Initialised, config: RunConfig, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    again = f"the checkpoint is damaged: delete {init.folder} and quantize again"
    with explained(f"{init.folder}: the weights cannot be read", again):
        try:
            with collected_log() as lines:
                model, report = AUTO_CLASSES[config.model.kind].from_pretrained(
                    init.folder, dtype=dtype, trust_remote_code=config.model.trust_remote_code,
                    output_loading_info=True, attn_implementation=config.model.attn_implementation,
                    **options | {"ignore_mismatched_sizes": True},
                )  # fmt: skip
        except UserError as error:  # of packed weights
            raise UserError(f"{init.folder}: {error}") from error
        except ValueError as error:
            if "dispatched on the CPU" not in str(error):
                raise
            raise UserError(f"evaluate.device_map={config.evaluate.device_map}: not all layers fit on the GPUs, and bitsandbytes' "
                            "cannot be offloaded; use train.backbone=dense, or save_format=packed") from error  # fmt: skip
        except RuntimeError as error:
            if name := failed_conversion(lines):
                raise UserError(
                    f"{init.folder}: {name} cannot be made of the weights that are there; {again}"
                ) from error
            raise
    found, wanted = model.config._attn_implementation, config.model.attn_implementation
    if wanted not in (None, found):
        raise UserError(f"model.attn_implementation={wanted}: transformers took {found} instead; leave it out")
    resized = options.get("ignore_mismatched_sizes", False)
    check_report(report, str(init.folder), again, init.report.get("head", ()), resized)
    for name, value in model.named_parameters():
        if name.endswith((".q_bias", ".v_bias")):  # deberta v1: transformers keeps these in float32 whatever the dtype
            value.data = value.data.to(dtype)
    return model
