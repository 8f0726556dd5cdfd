"""A checkpoint that reads text one block at a time: in memory are one block's weights, and activations up to a bound.

The model's own forward runs for every block, so masks, positions and cross-attention are its own. Blocks before the current
one replay what the last of them returned; the forward ends after the current one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq_exp.calibration.experts import expert_matrix
from loftq_exp.calibration.moments import Statistics
from loftq_exp.calibration.spill import Spill
from loftq_exp.calibration.statistics import Collector
from loftq_exp.errors import UserError
from loftq_exp.source.blocks import block_lists
from loftq_exp.source.experts import expert_targets, read_experts
from loftq_exp.source.layout import AUTO_CLASSES, Layout, load_config
from loftq_exp.source.loading import load_report
from loftq_exp.source.locate import Source
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors

Batch = Mapping[str, torch.Tensor]
"""The arguments of a forward, each (batch, length)."""

_Replay = dict[str, Any]
"""What the last finished block of each stack returned for one batch."""


class _Ended(Exception):
    """The forward has passed the current block."""


class BlockRunner:
    """Runs the blocks of a checkpoint in order, each on all batches.

    Use it as `for block in runner.blocks: with runner.loaded(block): ...`, and within it `collect`, `set_weights` and
    `advance`. Values are float32.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        kind: str,
        trust_remote_code: bool,
        tensors: CheckpointTensors,
        batches: Sequence[Batch],
        device: torch.device,
        spill: Spill,
    ) -> None:
        """Build the model and load what its blocks read that is outside of them, such as embeddings.

        `spill` keeps these values and the activations between blocks.
        """
        config = load_config(source.folder, trust_remote_code, kind)
        with init_empty_weights(include_buffers=False):
            self._model = AUTO_CLASSES[kind].from_config(
                config, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
        self._model.eval().requires_grad_(False)
        self._model.config.use_cache = False
        self._tensors, self._device, self._layout = tensors, device, layout
        report = load_report(self._model, tensors.shapes())
        self._names = report.tensors
        self._experts: dict[str, list[Target]] = {}
        for target in expert_targets(self._model, block_lists(self._model), report.parameters, source.folder):
            self._experts.setdefault(target.parameter, []).append(target)
        self._batches, self._spill = batches, spill
        self.blocks = layout.blocks
        """The names of the blocks, in the order in which they run."""
        self._outputs: list[_Replay] = [{} for _ in batches]
        self._replayed: _Replay = {}
        for buffer_owner in self._model.modules():
            for name, buffer in list(buffer_owner._buffers.items()):
                buffer_owner._buffers[name] = None if buffer is None else buffer.to(device)
        self._load_outside()

    def targets(self, block: str) -> list[str]:
        """The names of the layers of a block that are quantized."""
        return [target.module for target in self._layout.targets if target.block == block]

    @contextmanager
    def loaded(self, block: str) -> Iterator[None]:
        """Hold the weights of `block` inside the context. Afterwards the block replays its outputs."""
        module = self._model.get_submodule(block)
        self._load(module, block)
        try:
            yield
        finally:
            for owner in module.modules():
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module.forward = lambda *args, **kwargs: self._replayed[_stack(block)]

    def collect(
        self, block: str, kind: str, advance: bool = True, names: Sequence[str] | None = None
    ) -> dict[str, Statistics]:
        """Return the statistics of the block's targets, or of those in `names`.

        `advance`: also pass the block's outputs on.
        """
        collector = Collector(self._model, self.targets(block) if names is None else names, kind)
        with collector.collecting():
            self._run(block, advance, collector.next_batch)
        return collector.statistics()

    def advance(self, block: str) -> None:
        """Pass the outputs of the block on, with the weights that it holds now."""
        self._run(block, True)

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the weights of targets of the loaded block, each (out, in), by name."""
        for name, weight in weights.items():
            if matrix := expert_matrix(self._model, name):
                owner: Any = self._model.get_submodule(matrix.module)
                held = owner.get_parameter(matrix.parameter)
                held[matrix.expert].copy_(weight.T if owner.is_transposed else weight)
                continue
            module = self._model.get_submodule(name)
            weight = weight.T if isinstance(module, Conv1D) else weight
            module._parameters["weight"] = nn.Parameter(weight.to(self._device, torch.float32), requires_grad=False)

    def _run(self, block: str, advance: bool, begin: Callable[[], None] = lambda: None) -> None:
        for number, batch in enumerate(self._batches):
            begin()
            output = self._forward(block, batch, self._outputs[number])
            if advance:
                stack = _stack(block)
                self._outputs[number][stack] = self._spill.kept(output, number, stack)  # frees that of the block before

    @torch.no_grad()
    def _forward(self, block: str, batch: Batch, replayed: _Replay) -> Any:
        """Return what the block returns for a batch."""
        self._replayed, returned = replayed, []

        def end(module: nn.Module, args: Any, output: Any) -> None:
            returned.append(output)
            raise _Ended

        hook = self._model.get_submodule(block).register_forward_hook(end)
        try:
            with contextlib.suppress(_Ended):
                self._model(**{name: value.to(self._device) for name, value in batch.items()})
        finally:
            hook.remove()
            self._replayed = {}
        if not returned:
            raise UserError(
                f"{block}: {type(self._model).__name__} does not run it on calibration text; use quant.calibration=none"
            )
        return returned[0]

    def _load_outside(self) -> None:
        """Load every parameter outside the blocks but those of the heads, which run after the blocks."""
        output = self._model.get_output_embeddings()
        last = {id(parameter) for parameter in output.parameters()} if output is not None else set()
        first = {id(parameter) for parameter in self._model.get_input_embeddings().parameters()}
        inside = tuple(f"{block}." for block in self.blocks)
        for name, parameter in list(self._model.named_parameters(remove_duplicate=False)):
            if name.startswith(inside) or name.split(".")[0] in self._layout.head or (id(parameter) in last - first):
                continue
            self._put(name, required=False, keep=True)

    def _load(self, module: nn.Module, block: str) -> None:
        for name, _ in list(module.named_parameters()):
            self._put(f"{block}.{name}", required=True)

    def _put(self, name: str, required: bool, keep: bool = False) -> None:
        """Give the model the value of the parameter `name`, in float32; `keep` it for as long as the runner lives."""
        owner, _, last = name.rpartition(".")
        tensor = self._names.get(name) or self._tied(name)
        if tensor is None:
            if required:
                raise UserError(f"model.path: {name} is not stored under a name of its own, and cannot be loaded alone; "
                                "use quant.calibration=none")  # fmt: skip
            return
        experts = self._experts.get(name)
        stored = read_experts(experts, self._tensors.read) if experts else self._tensors.read(tensor)
        value = stored.to(self._device, torch.float32)
        value = self._spill.kept(value.contiguous(), name) if keep else value.contiguous()
        self._model.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=False)

    def _tied(self, name: str) -> str | None:
        """The tensor of another parameter that is the same as the parameter `name`."""
        tied: Mapping[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        other = tied.get(name) or next((one for one, two in tied.items() if two == name), None)
        return None if other is None else self._names.get(other)


def _stack(block: str) -> str:
    """The list of blocks that holds this block: an encoder's or a decoder's."""
    return block.rpartition(".")[0]
