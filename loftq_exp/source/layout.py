"""Determine the weights of a checkpoint to quantize and adapt: every linear layer of every block.

The layout comes from the model class itself, built on the meta device without memory. No family needs a list of names.
Embeddings, heads and poolers lie outside the blocks and are copied unchanged. The layout also names the head that a task
trains (see `loftq_exp.source.head`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from loftq_exp.errors import UserError
from loftq_exp.foreign import explained
from loftq_exp.source.adapted import adapted, as_wrapped
from loftq_exp.source.blocks import LeftOut, block_lists, block_of, is_gate, left_out, linear_shape
from loftq_exp.source.experts import expert_targets
from loftq_exp.source.loading import LoadReport, load_report, name_in_files
from loftq_exp.source.selection import ALL, Selection
from loftq_exp.source.sizes import check_sizes, few_modules
from loftq_exp.source.target import Piece, Target
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
"""The kinds whose head is trained with the adapter. A language model's head is already pre-trained."""


@dataclass(frozen=True)
class Layout:
    """The targets of a checkpoint and the names with which PEFT and bitsandbytes find exactly these."""

    targets: tuple[Target, ...]
    target_modules: tuple[str, ...]
    """The shortest module name endings that match the targets adapted as modules and nothing else."""
    other_linears: tuple[str, ...]
    """Linear layers that stay dense: those outside the blocks, gates, and those `excluded`."""
    left_dense: tuple[str, ...]
    """Targets that transformers keeps dense when it loads 4-bit layers: subclasses of `nn.Linear` (falcon), and layers
    that the model class keeps in float32 (t5's `wo`)."""
    foreign: tuple[str, ...]
    """Tensors that the model class ignores, such as the pre-training head."""
    not_quantized: tuple[LeftOut, ...]
    """Matrices in the blocks that are not quantized: those that belong to no linear layer, gates, and those `excluded`."""
    head: tuple[str, ...]
    """Modules that are fully trained and saved with the adapter: the model's head (for deberta with the pooler), and a
    pooler of its base that the checkpoint lacks. Empty for language models."""
    ties_embeddings: bool
    """Whether the model uses one tensor for its input and output embeddings."""
    excluded: tuple[str, ...] = ()
    """Linear layers and parameters of experts in the blocks that the settings leave dense, without an adapter."""
    target_parameters: tuple[str, ...] = ()
    """The shortest parameter name endings that match the targets that PEFT adapts as parameters, and nothing else: experts, and
    linear layers that PEFT does not find as modules. 4-bit layers do not hold them, and PEFT has no dropout for them."""
    transposed: bool = False
    """Whether the model's linear layers are `Conv1D`, with weights (in, out)."""

    def as_parameter(self, target: Target) -> bool:
        """Whether PEFT adapts the target as a parameter rather than as a module."""
        return any(f".{target.parameter}".endswith(f".{ending}") for ending in self.target_parameters)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks of the targets in the model's order, encoder before decoder."""
        return tuple(dict.fromkeys(target.block for target in self.targets))


def load_config(
    folder: Path, trust_remote_code: bool = False, kind: str | None = None
) -> transformers.PretrainedConfig:
    """The checkpoint's transformers config for a model of that `kind`. Raises UserError if transformers cannot read it."""
    check_sizes(folder)
    with explained(f"model.path: transformers cannot read the config in {folder}", "check the folder"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if kind == "question-answering":
        config.num_labels = 2  # start and end, regardless of the checkpoint's own number of classes
    return config


def find_layout(
    folder: Path,
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    trust_remote_code: bool = False,
    selection: Selection = ALL,
) -> Layout:
    """The layout of the checkpoint in `folder`, loaded as `kind`. `shapes` maps its tensors' names to their shapes.

    Raises UserError if the model class has no blocks of linear layers, or blocks with too many other weights, or if a
    pattern of the `selection` matches none. Also raises it if a plain load would miss a weight, find one with another shape,
    or ignore one.
    """
    model = skeleton(folder, kind, trust_remote_code)
    stacks = block_lists(model)
    left_out(model, stacks, {}, folder)  # refuse unsupported models before looking for their tensors
    prefix = model.base_model_prefix
    targets = linear_targets(
        model, stacks, lambda name, block, module: _target(name, block, module, shapes, prefix, folder)
    )
    with explained(
        f"model.path={folder}: transformers cannot load the weights as config.json says", "check the folder"
    ):
        report = load_report(model, shapes)
    experts = expert_targets(model, stacks, report.parameters, folder)
    if not targets and not experts:
        raise UserError(
            f"model.path={folder}: {type(model).__name__} has no linear layer in a block; nothing to quantize"
        )
    head = head_of(model, targets, kind, shapes)
    check_complete(model, head, report, folder)
    if kind in HEAD_KINDS:
        _check_new_head(model, head, report, folder)
    else:
        _check_own_head(model, report, folder)
    foreign = _foreign(model, stacks, kind, shapes, report, folder)
    return layout_of(
        model, in_order(targets + experts), selection, left_out(model, stacks, report.tensors, folder), head, foreign
    )


def head_of(
    model: transformers.PreTrainedModel, targets: Iterable[Target], kind: str, tensors: Container[str]
) -> tuple[str, ...]:
    """The modules to train and save with the adapter, see `Layout.head`."""
    if kind not in HEAD_KINDS:
        return ()
    inside = {target.module for target in targets}
    return head_modules(model, [name for name, module in model.named_modules()
                                if isinstance(module, nn.Linear) and name not in inside], tensors)  # fmt: skip


def in_order(targets: Iterable[Target]) -> tuple[Target, ...]:
    """The targets block by block."""
    targets = tuple(targets)
    blocks = {block: place for place, block in enumerate(dict.fromkeys(target.block for target in targets))}
    return tuple(sorted(targets, key=lambda target: blocks[target.block]))


def linear_targets(
    model: nn.Module, stacks: Iterable[str], target: Callable[[str, str, nn.Module], Target]
) -> tuple[Target, ...]:
    """The linear layers of blocks, without gates. `target` makes one of its name, block and module."""
    stacks = list(stacks)
    return tuple(
        target(name, block, module)
        for name, module in model.named_modules()
        if (shape := linear_shape(module)) and not is_gate(shape) and (block := block_of(name, stacks))
    )


def layout_of(
    model: transformers.PreTrainedModel,
    targets: tuple[Target, ...],
    selection: Selection,
    not_quantized: tuple[LeftOut, ...],
    head: tuple[str, ...],
    foreign: tuple[str, ...] = (),
) -> Layout:
    """The layout of all `targets` of a model, of which the selection chooses."""
    names = selection.chosen(list(dict.fromkeys(target.chosen_by for target in targets)))
    chosen = as_wrapped(target for target in targets if target.chosen_by in names)
    excluded = [target for target in targets if target.chosen_by not in names]
    found, modules = adapted(model, chosen), {target.module for target in chosen}
    linears = [name for name, module in model.named_modules() if linear_shape(module)]
    return Layout(
        targets=chosen,
        target_modules=found.modules,
        other_linears=tuple(name for name in linears if name not in modules),
        left_dense=left_dense(model, (target.module for target in chosen if target.expert is None)),
        foreign=foreign,
        not_quantized=(*not_quantized, *_as_left_out(model, excluded)),
        head=head,
        ties_embeddings=bool(getattr(model.config, "tie_word_embeddings", False)),
        excluded=tuple(dict.fromkeys(target.chosen_by for target in excluded)),
        target_parameters=found.parameters,
        transposed=any(isinstance(model.get_submodule(t.module), Conv1D) for t in chosen if t.expert is None),
    )


def _as_left_out(model: nn.Module, excluded: Iterable[Target]) -> Iterator[LeftOut]:
    """The targets that are not quantized; experts by their parameter."""
    parameters: dict[str, Target] = {}
    for target in excluded:
        parameters.setdefault(target.chosen_by, target)
    for name, target in parameters.items():
        shape = tuple(model.get_parameter(target.parameter).shape) if target.expert is not None else target.shape
        yield LeftOut(name, target.tensors[0], shape)


def left_dense(model: transformers.PreTrainedModel, linears: Iterable[str]) -> tuple[str, ...]:
    """The layers among `linears` that transformers keeps dense when it loads 4-bit layers, see `Layout.left_dense`."""
    in_float32 = list(model._keep_in_fp32_modules or ())
    return tuple(
        name
        for name in linears
        if type(model.get_submodule(name)) not in (nn.Linear, Conv1D) or not should_convert_module(name, in_float32)
    )


def skeleton(
    folder: Path, kind: str, trust_remote_code: bool = False, num_labels: int | None = None
) -> transformers.PreTrainedModel:
    """The model on the meta device, without memory, with a head of `num_labels` outputs (None: as in its config).

    Raises UserError if config.json does not describe a model of that kind.
    """
    config = load_config(folder, trust_remote_code, kind)
    if num_labels is not None:
        config.num_labels = num_labels
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    if kind == "question-answering" and not encoder:
        raise UserError(f"model.kind={kind}: a {config.model_type} checkpoint ({folder}) is no encoder; choose model=bert, "
                        "roberta or deberta, or omit model.kind to use the model group's value")  # fmt: skip
    auto = AUTO_CLASSES[kind]
    if type(config) not in auto._model_mapping and not _has_own_class(config, auto):
        raise UserError(
            f"model.kind={kind}: a {config.model_type} checkpoint ({folder}) cannot be loaded as that; choose the model "
            "group of its family, or set model.kind"
        )
    fault = f"model.path={folder}: no model can be built from config.json"
    with explained(fault, "check the folder"), few_modules(folder), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=trust_remote_code)


def _has_own_class(config: transformers.PretrainedConfig, auto: Any) -> bool:
    """Whether config.json names a class of the checkpoint's own code for this kind of model."""
    return auto.__name__ in (getattr(config, "auto_map", None) or {})


def _target(
    module: str, block: str, linear: nn.Module, shapes: Mapping[str, tuple[int, ...]], prefix: str, folder: Path
) -> Target:
    name = f"{module}.weight"
    tensor = stored_name(name, prefix, shapes)
    if tensor is None:
        raise UserError(
            f"model.path={folder}: no weight named {name}; the weights have another architecture than config.json"
        )
    target = linear_target(module, tensor, block, linear)
    expected = target.shape if not target.pieces else target.shape[::-1]
    if tuple(shapes[tensor]) != expected:
        raise UserError(
            f"model.path={folder}: {tensor} has shape {tuple(shapes[tensor])}, config.json expects {expected}; "
            "the weights have another architecture than config.json"
        )
    return target


def linear_target(module: str, tensor: str, block: str, linear: nn.Module) -> Target:
    """The target of a linear layer whose weight is stored as `tensor`."""
    shape = linear_shape(linear)
    assert shape is not None
    pieces = (Piece(tensor, shape[0], transposed=True),) if isinstance(linear, Conv1D) else ()
    return Target(module, tensor, shape, block, pieces)


def stored_name(name: str, prefix: str, tensors: Container[str]) -> str | None:
    """The name of the model's parameter `name` in a checkpoint with these `tensors`; None if it is absent.

    A base checkpoint lacks the `prefix` that a class with a head adds to its names, and vice versa.
    """
    return next((n for n in (name, name.removeprefix(prefix + "."), f"{prefix}.{name}") if n in tensors), None)


def head_modules(
    model: transformers.PreTrainedModel, outside: Iterable[str], tensors: Container[str]
) -> tuple[str, ...]:
    """The modules to train and save with the adapter, see `Layout.head`. `outside` names the linear layers outside the blocks."""
    prefix = model.base_model_prefix
    head: dict[str, None] = {}
    for name in outside:
        own = not name.startswith(prefix + ".")
        if own or ("pooler" in name and stored_name(f"{name}.weight", prefix, tensors) is None):
            parent, _, last = name.rpartition(".")
            head[name.split(".")[0] if own else name if "pooler" in last else parent] = None
    return tuple(head)


def check_complete(model: transformers.PreTrainedModel, head: Iterable[str], report: LoadReport, folder: Path) -> None:
    """Raise UserError if the load of `report` would initialise a parameter at random or reject one because of its shape.

    Modules of a `head` are exempt: they are trained, and missing ones are drawn from the seed.
    """
    own = tuple(f"{module}." for module in head)
    missing = [name for name in report.missing if not name.startswith(own)]
    if missing:
        names = [name_in_files(model, missing[0]), *missing[1:]]
        raise UserError(f"model.path={folder}: {some(names)} is missing from the weights, so that {type(model).__name__} would "
                        "draw it at random at each load; give a checkpoint that has all weights of its model")  # fmt: skip
    for name, found, expected in report.mismatched:
        if not name.startswith(own):
            raise UserError(f"model.path={folder}: {name} has shape {found}, config.json expects {expected}; "
                            "correct config.json, or give the weights that belong to it")  # fmt: skip


def _check_own_head(model: transformers.PreTrainedModel, report: LoadReport, folder: Path) -> None:
    """Raise UserError if the weights lack a language model head that config.json does not tie to the embeddings.

    transformers does not report it for the t5 families: it ties their embeddings regardless of config.json.
    """
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
    output = model.get_output_embeddings()
    name = next((f"{name}.weight" for name, module in model.named_modules() if module is output), None)
    if stated is False and output is not None and name not in report.tensors:
        raise UserError(f"model.path={folder}: {name} is missing from the weights, and config.json has tie_word_embeddings=false: "
                        "transformers would use the embeddings instead; give a checkpoint that has all weights of its model")  # fmt: skip


def _check_new_head(model: transformers.PreTrainedModel, head: Iterable[str], report: LoadReport, folder: Path) -> None:
    """Raise UserError if the weights hold only part of a `head` module: a new head must be entirely new."""
    for module in head:
        own = [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]
        lost = [name for name in own if name in report.missing]
        if 0 < len(lost) < len(own):
            raise UserError(f"model.path={folder}: {some(lost)} is missing from the weights, which have the rest of {module}; "
                            "give a checkpoint that has the whole head, or none")  # fmt: skip


_LEFTOVERS = ("_weight", "weights", "_float_tensor", "inv_freq", "position_ids", "version")
"""Last parts of names under which older libraries stored non-weights: copies, and tables derived from the config."""


def _foreign(
    model: transformers.PreTrainedModel,
    stacks: Iterable[str],
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    report: LoadReport,
    folder: Path,
) -> tuple[str, ...]:
    """The tensors to omit. Raises UserError if one is a weight of the model's body, which would be lost."""
    lost = [name for name in report.unexpected
            if _is_weight(name, shapes[name]) and _is_body(model, stacks, kind, report.parameters[name])]  # fmt: skip
    if lost:
        raise UserError(f"model.path={folder}: {type(model).__name__} of config.json has no place for {some(lost)}, which would be "
                        "lost; correct config.json (such as its number of layers), or give the weights that belong to it")  # fmt: skip
    return report.unexpected


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    # Older libraries stored masks, with four dimensions, and their fill values, with a single value.
    return 1 <= len(shape) <= 3 and shape != (1,) and name.rpartition(".")[2] not in _LEFTOVERS


def _is_body(model: transformers.PreTrainedModel, stacks: Iterable[str], kind: str, name: str) -> bool:
    """Whether a parameter that the class lacks belongs to its base, to a block, or to the class's own head."""
    prefix = model.base_model_prefix
    if any(name.startswith((f"{stack}.", f"{stack.removeprefix(prefix + '.')}.")) for stack in stacks):
        return True
    if "pooler" in name:
        return False
    if name.startswith(f"{prefix}.") and hasattr(model, prefix):
        return True
    own = {module for module, _ in model.named_modules()}
    return kind not in HEAD_KINDS and name.rpartition(".")[0] in own - {""}
