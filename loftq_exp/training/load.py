"""An initialised checkpoint as a model that trains: the backbone in 4-bit or dense layers, the adapter on top."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from loftq_exp.artifact.folder import ADAPTER, Initialised, bnb4_config
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.integrations.loads import check_report, collected_log, failed_conversion, without_bars
from loftq_exp.source.files import read_tokenizer
from loftq_exp.source.head import PREFIX, draw_head
from loftq_exp.source.layout import AUTO_CLASSES, load_config, skeleton
from loftq_exp.source.locate import Source
from loftq_exp.training.adapter import put_adapter, read_adapter

log = logging.getLogger(__name__)


def load_model(
    init: Initialised,
    adapter: Path | None,
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_labels: int | None = None,
) -> PeftModel:
    """The backbone of `init` with an adapter: the one in the folder `adapter`, or where it is None the initial factors.

    The adapter's parameters, and with them the head of a classifier, are trainable, in float32; everything else is frozen.
    Activations are computed in `dtype`. `num_labels` is the number of outputs that a classification task needs (1: a
    regression; None: the checkpoint's own). Where the initial head has another number, those of its parameters whose shape
    depends on it are drawn anew from `config.seed`; an adapter that was saved brings its own. Nothing else is ever drawn.

    Raises UserError where `init` was made for another `model.kind`, and where backbone or adapter lack a tensor, have one
    too many or one of another shape.
    """
    made_for = init.report["model"]["kind"]
    if made_for != config.model.kind:
        raise UserError(f"model.kind={config.model.kind}: the checkpoint at {init.folder} was made for {made_for}; "
                        "add quantize to stages, or set another save_dir")  # fmt: skip
    options: dict[str, Any] = {}
    resized = False
    if num_labels is not None and config.model.kind == "classification":
        resized = num_labels != load_config(init.folder, config.model.trust_remote_code).num_labels
        # No problem_type: a checkpoint may name that of the task it was trained on before.
        options = {"num_labels": num_labels, "problem_type": None, "ignore_mismatched_sizes": resized}
    # A packed checkpoint says so itself, and transformers loads it as the packed layers that it is.
    load = _load_four_bit if backbone_form(init, config, device) == "bnb4" else _load_dense
    with without_bars():
        backbone = load(init, config, device, dtype, options)
    backbone.config.use_cache = False  # of no use while training; the evaluation turns it on for itself
    for name in init.report.get("head", ()):
        # PEFT trains a copy of it. In bfloat16 small steps would be lost.
        backbone.get_submodule(name).float().register_forward_pre_hook(_widen)
    again = (
        f"delete {init.folder} and quantize again"
        if adapter is None
        else f"delete {adapter.parent} and fine-tune again"
    )
    folder = adapter or init.folder / ADAPTER
    values = read_adapter(folder, again)
    if resized and adapter is None:
        values |= _resized_head(values, init, config, num_labels)
    return put_adapter(backbone, values, folder, again)


def _widen(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The head's inputs in float32, as its parameters are."""
    return tuple(value.float() if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)


def _resized_head(
    initial: Mapping[str, torch.Tensor], init: Initialised, config: RunConfig, num_labels: int | None
) -> dict[str, torch.Tensor]:
    """New values for those parameters of the head whose shape in the initial adapter is another, by their names in it."""
    model = skeleton(init.folder, config.model.kind, config.model.trust_remote_code, num_labels)
    drawn = {PREFIX + name: value for name, value in draw_head(model, init.report["head"], config.seed).items()}
    head = {name: value for name, value in drawn.items() if name in initial and initial[name].shape != value.shape}
    log.info("head of %s outputs, drawn from seed %d: %s", num_labels, config.seed,
             ", ".join(name.removeprefix(PREFIX) for name in head))  # fmt: skip
    return head


def load_tokenizer(init: Initialised | Source, config: RunConfig) -> transformers.PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises UserError where the checkpoint has none."""
    try:
        return read_tokenizer(init.folder, config.model.trust_remote_code)
    except UserError as error:
        raise UserError(f"model.path={config.model.path}: {error}; add its files") from None


def backbone_form(init: Initialised, config: RunConfig, device: torch.device) -> str:
    """How the run's backbone is held: `packed`, in bitsandbytes' layers (`bnb4`) or `dense`.

    Raises UserError where it must be bnb4 and cannot: bitsandbytes 0.50 reads rows that are not whole blocks wrongly on a
    processor with AVX-512, so that no processor is trusted with them.
    """
    if config.save_format == "packed":
        return "packed"
    broken = [weight for weight in init.report["weights"] if weight["shape"][1] % 64] if device.type == "cpu" else []
    forced = config.train.backbone == "bnb4" or config.save_format == "bnb4"
    if forced and broken:
        name, shape = broken[0]["name"], broken[0]["shape"]
        raise UserError(f"train.backbone=bnb4: {name} has rows of {shape[1]} values, and on a processor bitsandbytes reads only "
                        "whole blocks of 64 right; use train.backbone=dense and save_format=dense")  # fmt: skip
    fits = config.train.backbone == "auto" and config.fits_bnb4 and not broken
    return "bnb4" if forced or fits else "dense"


def _load_dense(
    init: Initialised, config: RunConfig, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    again = f"the checkpoint is damaged: delete {init.folder} and quantize again"
    try:
        with collected_log() as lines:
            model, report = AUTO_CLASSES[config.model.kind].from_pretrained(
                init.folder, dtype=dtype, device_map={"": device}, trust_remote_code=config.model.trust_remote_code,
                output_loading_info=True, **options | {"ignore_mismatched_sizes": True},
            )  # fmt: skip
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{init.folder}: the weights cannot be read ({error}); {again}") from error
    except UserError as error:  # of packed weights
        raise UserError(f"{init.folder}: {error}") from error
    except RuntimeError as error:
        name = failed_conversion(lines)
        if name is None:
            raise
        raise UserError(f"{init.folder}: {name} cannot be made of the weights that are there; {again}") from error
    resized = options.get("ignore_mismatched_sizes", False)
    check_report(report, str(init.folder), again, init.report.get("head", ()), resized)
    for name, value in model.named_parameters():
        if name.endswith((".q_bias", ".v_bias")):  # deberta v1: float32 to transformers, whatever type it is told
            value.data = value.data.to(dtype)
    return model


def _load_four_bit(
    init: Initialised, config: RunConfig, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    # A packed checkpoint brings its own, which even a None here would hide from transformers; a dense one is quantized to
    # the very same values while it loads. (In a wider type than the stored one, 4-bit layers leave out its rounding.)
    packed = config.save_format == "bnb4"
    quantization = {} if packed else {"quantization_config": bnb4_config(init.report["other_linears"], dtype)}
    model = _load_dense(init, config, device, dtype, options | quantization)
    for weight in init.report["weights"]:
        module = model.get_submodule(weight["name"])
        if type(module) is nn.Linear:  # kept in float32 by its model class, which reads its type: t5's wo
            continue
        if not isinstance(module, Linear4bit):  # transformers leaves subclasses of nn.Linear dense (falcon's)
            module = _packed(module, dtype)
            model.set_submodule(weight["name"], module)
        module.compute_dtype = dtype
        if dtype != torch.bfloat16:
            # On a processor with AVX512_BF16 the layer would compute in bfloat16 while scoring, whatever it was told.
            module.support_avx512bf16_for_cpu = False
    return model


def _packed(linear: nn.Linear, dtype: torch.dtype) -> Linear4bit:
    """A dense linear layer as a 4-bit one of the same values."""
    has_bias = linear.bias is not None
    layer = Linear4bit(
        linear.in_features, linear.out_features, has_bias, dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4")
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.to(linear.weight.device)
