"""Which weights of a checkpoint are quantized and adapted: every linear layer of every block.

Taken from the model class itself, built without memory on the meta device, so that no family needs a list of names.
Embeddings, heads and poolers lie outside the blocks and pass through unchanged. A head that a task trains (see
`loftq_exp.source.head`) is named here too.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from loftq_exp.errors import UserError
from loftq_exp.source.blocks import LeftOut, block_lists, block_of, left_out
from loftq_exp.source.loading import LoadReport, load_report, name_in_files
from loftq_exp.source.tensors import some

AUTO_CLASSES: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}
TASK_TYPES = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
}
"""PEFT's name for each kind of model."""
HEAD_KINDS = ("classification", "question-answering")
"""The kinds whose head is trained beside the adapter; a language model's head is as pre-trained as its blocks."""


@dataclass(frozen=True)
class Target:
    """One weight to quantize: its module in the model, its tensor in the checkpoint, its shape (out, in), its block."""

    module: str
    tensor: str
    shape: tuple[int, int]
    block: str
    """The module of the block that it lies in, such as `model.layers.3`."""

    @property
    def kind(self) -> str:
        """What it is in its block, such as `self_attn.q_proj`: the same in every one."""
        return self.module.removeprefix(self.block + ".")


@dataclass(frozen=True)
class Layout:
    """The targets of a checkpoint, and what PEFT and bitsandbytes need to find exactly these."""

    targets: tuple[Target, ...]
    target_modules: tuple[str, ...]
    """The shortest module name endings that match the targets and nothing else."""
    other_linears: tuple[str, ...]
    """Linear layers outside the blocks, which stay dense."""
    left_dense: tuple[str, ...]
    """Targets that transformers leaves dense when it loads 4-bit layers: those that are not exactly `nn.Linear`
    (falcon's), and those that the model class keeps in float32 (t5's `wo`)."""
    foreign: tuple[str, ...]
    """Tensors that the model class has no place for, such as the head of pre-training: it would ignore them."""
    not_quantized: tuple[LeftOut, ...]
    """Matrices in the blocks that are no linear layer's, and stay as they are."""
    head: tuple[str, ...]
    """Modules that are trained whole and saved with the adapter: the model's own head (deberta's pooler is part of it),
    and a pooler of its base that the checkpoint lacks. Empty for language models."""
    ties_embeddings: bool
    """Whether the model uses one tensor for its input and output embeddings."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks of the targets as they follow on each other, an encoder's before a decoder's."""
        return tuple(dict.fromkeys(target.block for target in self.targets))


def load_config(
    folder: Path, trust_remote_code: bool = False, kind: str | None = None
) -> transformers.PretrainedConfig:
    """The checkpoint's transformers config, as for a model of that `kind`; UserError where transformers does not know it."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if kind == "question-answering":
            config.num_labels = 2  # start and end, whatever number of classes the checkpoint told apart before
        return config
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise UserError(
            f"model.path: transformers cannot read the config in {folder} ({error}); check the folder"
        ) from None


def find_layout(
    folder: Path, kind: str, shapes: Mapping[str, tuple[int, ...]], trust_remote_code: bool = False
) -> Layout:
    """The layout of the checkpoint in `folder`, loaded as `kind`, whose tensors have the given `shapes` by name.

    Raises UserError where the model class has no blocks of linear layers, or much else in them, and where a plain load of the
    tensors would lack a weight, find one of another shape, or lose one.
    """
    model = skeleton(folder, kind, trust_remote_code)
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    stacks = block_lists(model)
    left_out(model, stacks, {}, folder)  # refuses what cannot be, before its tensors are asked for
    inside = {name: block for name in linears if (block := block_of(name, stacks))}
    if not inside:
        raise UserError(
            f"model.path={folder}: {type(model).__name__} has no linear layer in a block; nothing to quantize"
        )
    prefix = model.base_model_prefix
    outside = tuple(name for name in linears if name not in inside)
    head = _head(model, outside, shapes) if kind in HEAD_KINDS else ()
    targets = tuple(_target(name, block, linears[name], shapes, prefix, folder) for name, block in inside.items())
    report = load_report(model, shapes)
    check_complete(model, head, report, folder)
    if kind in HEAD_KINDS:
        _check_new_head(model, head, report, folder)
    else:
        _check_own_head(model, report, folder)
    return Layout(
        targets=targets,
        target_modules=_shortest_endings(inside, modules),
        other_linears=outside,
        left_dense=left_dense(model, inside),
        foreign=_foreign(model, stacks, kind, shapes, report, folder),
        not_quantized=left_out(model, stacks, report.tensors, folder),
        head=head,
        ties_embeddings=bool(getattr(model.config, "tie_word_embeddings", False)),
    )


def left_dense(model: transformers.PreTrainedModel, linears: Iterable[str]) -> tuple[str, ...]:
    """Those of these linear layers that transformers leaves dense when it loads 4-bit layers, see `Layout.left_dense`."""
    in_float32 = list(model._keep_in_fp32_modules or ())
    return tuple(
        name
        for name in linears
        if type(model.get_submodule(name)) is not nn.Linear or not should_convert_module(name, in_float32)
    )


def skeleton(
    folder: Path, kind: str, trust_remote_code: bool = False, num_labels: int | None = None
) -> transformers.PreTrainedModel:
    """The model without memory, on the meta device, with a head of `num_labels` outputs (None: as many as its config says).

    Raises UserError where config.json makes no model of that kind.
    """
    config = load_config(folder, trust_remote_code, kind)
    if num_labels is not None:
        config.num_labels = num_labels
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    if kind == "question-answering" and not encoder:
        raise UserError(f"model.kind={kind}: a {config.model_type} checkpoint ({folder}) is no encoder; choose model=bert, "
                        "roberta or deberta, or leave model.kind as its model group has it")  # fmt: skip
    try:
        with torch.device("meta"):
            return AUTO_CLASSES[kind].from_config(config, trust_remote_code=trust_remote_code)
    except (KeyError, StrictDataclassError) as error:
        raise UserError(f"model.path={folder}: config.json makes no model ({error}); check the folder") from None
    except ValueError:
        raise UserError(
            f"model.kind={kind}: a {config.model_type} checkpoint ({folder}) cannot be loaded as that; choose the model "
            "group of its family, or set model.kind"
        ) from None


def _target(
    module: str, block: str, linear: nn.Linear, shapes: Mapping[str, tuple[int, ...]], prefix: str, folder: Path
) -> Target:
    name = f"{module}.weight"
    tensor = stored_name(name, prefix, shapes)
    if tensor is None:
        raise UserError(
            f"model.path={folder}: no weight named {name}; the weights are of another architecture than config.json"
        )
    expected = (linear.out_features, linear.in_features)
    if tuple(shapes[tensor]) != expected:
        raise UserError(
            f"model.path={folder}: {tensor} has shape {tuple(shapes[tensor])}, config.json means {expected}; "
            "the weights are of another architecture than config.json"
        )
    return Target(module, tensor, expected, block)


def stored_name(name: str, prefix: str, tensors: Container[str]) -> str | None:
    """The name under which a checkpoint with these `tensors` holds the parameter `name` of the model; None: it does not.

    A base checkpoint lacks the `prefix` that the class with a head puts before its names, and the other way round.
    """
    return next((n for n in (name, name.removeprefix(prefix + "."), f"{prefix}.{name}") if n in tensors), None)


def _head(model: transformers.PreTrainedModel, outside: Iterable[str], tensors: Container[str]) -> tuple[str, ...]:
    prefix = model.base_model_prefix
    head: dict[str, None] = {}
    for name in outside:
        own = not name.startswith(prefix + ".")
        if own or ("pooler" in name and stored_name(f"{name}.weight", prefix, tensors) is None):
            parent, _, last = name.rpartition(".")
            head[name.split(".")[0] if own else name if "pooler" in last else parent] = None
    return tuple(head)


def check_complete(model: transformers.PreTrainedModel, head: Iterable[str], report: LoadReport, folder: Path) -> None:
    """UserError where the load of `report` would draw a parameter at random, or not take one because of its shape.

    But not for one of the modules of a `head`, which are trained: those of them that are missing are drawn from the seed.
    """
    own = tuple(f"{module}." for module in head)
    missing = [name for name in report.missing if not name.startswith(own)]
    if missing:
        names = [name_in_files(model, missing[0]), *missing[1:]]
        raise UserError(f"model.path={folder}: {some(names)} is missing from the weights, so that {type(model).__name__} would "
                        "draw it at random at each load; give a checkpoint that has all weights of its model")  # fmt: skip
    for name, found, expected in report.mismatched:
        if not name.startswith(own):
            raise UserError(f"model.path={folder}: {name} has shape {found}, config.json means {expected}; "
                            "correct config.json, or give the weights that belong to it")  # fmt: skip


def _check_own_head(model: transformers.PreTrainedModel, report: LoadReport, folder: Path) -> None:
    """UserError for a language model whose head config.json keeps apart from the embeddings, and which the weights lack.

    transformers reports no such head of t5's families: it ties their embeddings whatever config.json says.
    """
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
    output = model.get_output_embeddings()
    name = next((f"{name}.weight" for name, module in model.named_modules() if module is output), None)
    if stated is False and output is not None and name not in report.tensors:
        raise UserError(f"model.path={folder}: {name} is missing from the weights, and config.json has tie_word_embeddings=false: "
                        "transformers would take the embeddings for it; give a checkpoint that has all weights of its model")  # fmt: skip


def _check_new_head(model: transformers.PreTrainedModel, head: Iterable[str], report: LoadReport, folder: Path) -> None:
    """UserError where the weights hold a part of a module of the `head` only: a new one is new as a whole."""
    for module in head:
        own = [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]
        lost = [name for name in own if name in report.missing]
        if 0 < len(lost) < len(own):
            raise UserError(f"model.path={folder}: {some(lost)} is missing from the weights, which have the rest of {module}; "
                            "give a checkpoint that has the whole head, or none")  # fmt: skip


_LEFTOVERS = ("_weight", "weights", "_float_tensor", "inv_freq", "position_ids", "version")
"""Last parts of names under which older libraries stored what is no weight: copies, and tables that follow from the config."""


def _foreign(
    model: transformers.PreTrainedModel,
    stacks: Iterable[str],
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    report: LoadReport,
    folder: Path,
) -> tuple[str, ...]:
    """The tensors to leave out; UserError for one that is a weight of the model's body, which would be lost."""
    lost = [name for name in report.unexpected
            if _is_weight(name, shapes[name]) and _is_body(model, stacks, kind, report.parameters[name])]  # fmt: skip
    if lost:
        raise UserError(f"model.path={folder}: {type(model).__name__} of config.json has no place for {some(lost)}, which would be "
                        "lost; correct config.json (such as its number of layers), or give the weights that belong to it")  # fmt: skip
    return report.unexpected


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    # A mask of older libraries has four dimensions, its fill value has one value.
    return 1 <= len(shape) <= 3 and shape != (1,) and name.rpartition(".")[2] not in _LEFTOVERS


def _is_body(model: transformers.PreTrainedModel, stacks: Iterable[str], kind: str, name: str) -> bool:
    """Whether a parameter that the class lacks belongs to its base, to a block, or to a head that is the class's own."""
    prefix = model.base_model_prefix
    if any(name.startswith((f"{stack}.", f"{stack.removeprefix(prefix + '.')}.")) for stack in stacks):
        return True
    if "pooler" in name:
        return False
    if name.startswith(f"{prefix}.") and hasattr(model, prefix):
        return True
    own = {module for module, _ in model.named_modules()}
    return kind not in HEAD_KINDS and name.rpartition(".")[0] in own - {""}


def _shortest_endings(inside: Iterable[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The shortest dotted endings that match every name in `inside` and no other module, as PEFT matches them."""
    inside = set(inside)
    others = [name for name in modules if name not in inside]
    endings: dict[str, None] = {}
    for name in sorted(inside):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not any(other == ending or other.endswith("." + ending) for other in others):
                endings[ending] = None
                break
    return tuple(endings)
