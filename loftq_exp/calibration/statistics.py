"""The second moments H = E[x x'] of the inputs x of linear layers, collected by hooks while a model reads text."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from loftq_exp.errors import UserError
from loftq_exp.source.blocks import block_lists, block_of, linear_shape

KINDS = ("full", "diagonal")
"""All of H, or its diagonal."""

CHUNK = 2048
"""Tokens per float32 product. The products are summed in float64."""

PANEL = 2048
"""Rows of H at a time."""

BOUND = 8 * math.sqrt(CHUNK) * torch.finfo(torch.float32).eps
"""Bound on the difference of two collections of the same inputs, in other batches or on other threads, as a multiple of
sqrt(h_ii h_jj). A product of at most CHUNK tokens rounds each sum like a random walk; the sums of products round in float64."""


@dataclass(frozen=True)
class Statistics:
    """The second moment of one layer's inputs."""

    hessian: torch.Tensor
    """H = E[x x'], the mean over tokens: float32 (in, in), or its diagonal (in,)."""
    tokens: int
    """Number of tokens in the mean."""

    @functools.cached_property
    def digest(self) -> str:
        """A hex digest (128-bit XXH3) of H and the number of tokens."""
        digest = xxhash.xxh3_128(f"{tuple(self.hessian.shape)} {self.tokens} ".encode())
        digest.update(self.hessian.contiguous().cpu().numpy().data)
        return digest.hexdigest()


class Moment:
    """The running sum of x x' over tokens, in float64: panels of its upper triangle; what is below them is zero."""

    def __init__(self, kind: str, width: int, device: torch.device) -> None:
        self.kind, self.tokens = kind, 0
        shape = (width, width) if kind == "full" else (width,)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add x x' of every row x of `inputs`, (tokens, in)."""
        for some in inputs.split(CHUNK):
            x = some.to(torch.float32)
            if self.kind == "diagonal":
                self.sum += x.square().sum(dim=0)
                continue
            for first in range(0, x.shape[1], PANEL):
                self.sum[first : first + PANEL, first:] += x[:, first : first + PANEL].T @ x[:, first:]
        self.tokens += len(inputs)


def mean_of(moments: Sequence[Moment]) -> Statistics:
    """Return the mean over the tokens of all these, float32, exactly symmetric."""
    tokens = sum(moment.tokens for moment in moments)
    total = functools.reduce(torch.add, (moment.sum for moment in moments))
    mean = torch.empty_like(total, dtype=torch.float32)
    for first in range(0, len(mean), PANEL):  # a quotient in float64 is as large as the sum
        mean[first : first + PANEL] = total[first : first + PANEL] / tokens
    if mean.ndim == 2:
        for row in range(len(mean)):
            mean[row + 1 :, row] = mean[row, row + 1 :]
    return Statistics(mean, tokens)


_Read = tuple[str, int]
"""An input by the first layer that reads it, and how many that layer has read before in the same batch."""


class Collector:
    """Accumulates the inputs of some linear layers while their model runs. Layers that read one tensor share one sum."""

    def __init__(self, modules: Mapping[str, nn.Module], kind: str) -> None:
        """Prepare to collect from these linear layers, by name."""
        if kind not in KINDS:
            raise UserError(f"kind={kind}: unknown; choose {' or '.join(KINDS)}")
        self.kind, self._modules = kind, modules
        self._reads: dict[str, list[_Read]] = {}
        self._moments: dict[_Read, Moment] = {}
        self._seen: dict[int, tuple[torch.Tensor, _Read]] = {}
        self._calls: Counter[str] = Counter()
        self._mask: torch.Tensor | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from every forward inside the block."""
        hooks = [module.register_forward_pre_hook(functools.partial(self._read, name), with_kwargs=True)
                 for name, module in self._modules.items()]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()

    def next_batch(self, mask: torch.Tensor | None = None) -> None:
        """Begin a batch. `mask` (batch, length) is 0 for padding, which is not counted; None: there is none."""
        self._seen.clear()
        self._calls.clear()
        self._mask = mask if mask is not None and not bool(mask.all()) else None

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        # The reference keeps the tensor alive, so that no later one has its id.
        _, read = self._seen.setdefault(id(inputs), (inputs, (name, self._calls[name])))
        reads, call = self._reads.setdefault(name, []), self._calls[name]
        self._calls[name] += 1
        if call == len(reads):
            reads.append(read)
        elif reads[call] != read:
            raise UserError(f"{name}: shares its input with different layers in different batches; "
                            "collect from it alone")  # fmt: skip
        if read != (name, call):
            return
        rows = self._counted(name, inputs.detach())
        if not bool(torch.isfinite(rows).all()):
            raise UserError(
                f"{name}: its inputs are NaN or infinite on the calibration text; use float32, or other text"
            )
        moment = self._moments.get(read)
        if moment is None:
            moment = self._moments[read] = Moment(self.kind, rows.shape[1], rows.device)
        moment.add(rows)

    def _counted(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the tokens that count, (tokens, in)."""
        if self._mask is None:
            return inputs.reshape(-1, inputs.shape[-1])
        if inputs.shape[:-1] != self._mask.shape:
            raise UserError(f"{name}: inputs of shape {tuple(inputs.shape)} and a mask of {tuple(self._mask.shape)} with padding: "
                            "which inputs are padding is not known; give batches of rows of one length")  # fmt: skip
        return inputs[self._mask.bool().to(inputs.device)]

    def statistics(self) -> dict[str, Statistics]:
        """Return the statistics of every layer; layers that share their input share the tensor.

        Raises UserError if a layer has read nothing.
        """
        if unread := [name for name in self._modules if name not in self._reads]:
            raise UserError(f"{unread[0]}: has read no calibration text ({len(unread)} such layers); "
                            "give text that reaches it, or name the other layers in `modules`")  # fmt: skip
        found: dict[tuple[_Read, ...], Statistics] = {}
        for name in self._modules:
            reads = tuple(self._reads[name])
            if reads in found:
                continue
            found[reads] = mean_of([self._moments[read] for read in reads])
            if not all(map(math.isfinite, found[reads].hessian.aminmax())):  # isfinite would copy H
                raise UserError(f"{name}: the squares of its inputs are too large for float32, or it has read no token that "
                                "counts; give other text")  # fmt: skip
        return {name: found[tuple(self._reads[name])] for name in self._modules}


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    data: Iterable[Mapping[str, torch.Tensor]],
    kind: str = "full",
    modules: Sequence[str] | None = None,
) -> dict[str, Statistics]:
    """Return the second moment H = E[x x'] of the inputs of linear layers over text, for `loftq_init(..., hessian=H)`.

    All H are in memory at once: 8 n^2 bytes while collecting, 4 n^2 afterwards, for each distinct input of width n. So are the
    inputs of all layers over one batch.

    Args:
        model: in memory, on any device. It is set to evaluation while it reads; its parameters are not changed.
        data: batches of keyword arguments of the model's forward, such as input_ids and attention_mask, each (batch, length).
            Tokens with attention_mask 0 are not counted. Encoder-decoders need batches without padding.
        kind: `full`, or `diagonal`: E[x_j^2] of each input alone.
        modules: names of linear layers; None: all in the model's blocks.

    Returns:
        By module name: `hessian`, float32 (in, in) or (in,), and `tokens`. Two collections of the same text, in other
        batches or on other threads, differ by at most `BOUND` sqrt(h_ii h_jj).

    Raises:
        UserError: if there is no text, a module is no linear layer or reads nothing, or inputs are not finite.
    """
    collector = Collector(_linears(model, modules), kind)
    batches, training = 0, {name for name, module in model.named_modules() if module.training}
    model.eval()
    try:
        with collector.collecting():
            for batch in data:
                collector.next_batch(_mask(model, batch))
                model(**batch)
                batches += 1
    finally:
        for name, module in model.named_modules():
            module.training = name in training
    if not batches:
        raise UserError("data: there is no batch; give at least one")
    return collector.statistics()


def _linears(model: nn.Module, modules: Sequence[str] | None) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    if modules is None:
        stacks = block_lists(model)
        modules = [name for name, module in named.items() if linear_shape(module) and block_of(name, stacks)]
        if not modules:
            raise UserError(f"{type(model).__name__}: has no linear layer in a block; name them in `modules`")
    for name in modules:
        if name not in named or linear_shape(named[name]) is None:
            raise UserError(
                f"modules: {name} is no linear layer of {type(model).__name__}; give names of nn.Linear layers"
            )
    return {name: named[name] for name in modules}


def _mask(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the mask of a batch; None without padding. Raise UserError for padding in an encoder-decoder."""
    mask = batch.get("attention_mask")
    padded = mask is not None and not bool(mask.all())
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return mask if padded else None
    decoder_mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    padded |= decoder_mask is not None and not bool(decoder_mask.all())
    padded |= labels is not None and bool((labels < 0).any())
    if padded:
        raise UserError("data: a batch has padding, and an encoder-decoder's layers read two texts; "
                        "give batches of rows of one length")  # fmt: skip
    return None
