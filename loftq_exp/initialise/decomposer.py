"""The decomposition of a weight at its bits and rank: read from the cache, continued from there, or computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_exp.config import QuantConfig, RunConfig
from loftq_exp.device import compute_device
from loftq_exp.errors import UserError
from loftq_exp.initialise.calibrate import Calibration
from loftq_exp.initialise.decomposition_cache import DecompositionCache, Kept, Recipe, weight_digest
from loftq_exp.initialise.plan import Errors, candidates
from loftq_exp.initialise.workers import Phases, side_by_side
from loftq_exp.loftq import Decomposition, Metric, Quantizer, Workspace, decompose, make_quantizer
from loftq_exp.loftq.allocation import Precision
from loftq_exp.progress import progress
from loftq_exp.source.layout import Layout
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors


@dataclass(frozen=True)
class Decomposed:
    """A decomposition, and how much of it was computed."""

    result: Kept
    cache_hit: bool
    steps_computed: int


def quantizers_of(quant: QuantConfig, dtype: torch.dtype) -> dict[int, Quantizer]:
    """The quantizer of each width of the settings, with scales stored in `dtype`. None of a method that quantizes nothing."""
    if quant.type == "none":
        return {}
    return {
        bits: make_quantizer(
            quant.type, bits, quant.block_size, dtype, quant.double, levels=quant.levels, scale=quant.scale
        )
        for bits in quant.widths
    }


def recipe_of(quant: QuantConfig, quantizer: Quantizer, rank: int, hessian: str | None) -> Recipe:
    """The recipe of the settings at one precision. `hessian` identifies the norm, see `Recipe`."""
    return Recipe(quantizer, rank, quant.iter, quant.solver, hessian, quant.rounding, quant.method == "pissa")


def solve(
    recipe: Recipe,
    weight: torch.Tensor,
    metric: Metric | None,
    workspace: Workspace,
    start: Decomposition | None = None,
) -> Decomposition:
    """The decomposition of a weight (out, in), on its device, by a recipe. See `decompose`."""
    return decompose(weight, recipe.quantizer, recipe.rank, recipe.steps, recipe.solver, start=start, workspace=workspace,
                     metric=metric, rounding=recipe.rounding, principal=recipe.principal)  # fmt: skip


class Decomposer:
    """Decomposes weights through the cache, each at its own precision."""

    def __init__(self, config: RunConfig) -> None:
        self.quant = config.quant
        self.device = compute_device(config.device)
        self.cache = DecompositionCache(config.cache_path)
        self.calibration: Calibration | None = None
        """The norms of the outputs; None: weights are decomposed in Frobenius' norm."""
        self._workspace = Workspace()
        self.quantizers = quantizers_of(config.quant, getattr(torch, config.save_dtype))

    def decomposed(
        self, target: Target, weight: torch.Tensor, digest: str, precision: Precision, phases: Phases
    ) -> Decomposed:
        """The decomposition of the target's weight with this `digest`. A computed result is stored in the cache."""
        recipe = self._recipe(target, precision)
        with phases.timed("cache"):
            found = self.cache.find(recipe, digest, target.shape)
        if found and found.steps == recipe.steps:
            return Decomposed(found, True, 0)
        solved = recipe.after(recipe.steps, target.shape)
        metric = None
        if self.calibration:
            with phases.timed("metric"):
                metric = self.calibration.metric(target.module, self.device)
        try:
            with phases.timed("decompose"):
                start = found.unpacked() if found else None
                result = solve(solved, weight.to(self.device), metric, self._workspace.of_thread(), start)
        except UserError as error:
            raise UserError(f"model.path: weight {target.tensor}: {error}") from None
        with phases.timed("cache"):
            kept = self.cache.put(solved, digest, result)
        computed = recipe.steps - (found.steps if found else 0)
        return Decomposed(kept.truncated(recipe.rank) if solved.rank > recipe.rank else kept, False, computed)

    def is_cached(self, target: Target, digest: str, precision: Precision) -> bool:
        """Whether the cache has an entry of this weight's result. Only `decomposed` reads and checks it."""
        recipe = self._recipe(target, precision)
        return self.cache.path(recipe.after(recipe.steps, target.shape).key(digest)).is_file()

    def claimed(self, target: Target, weight: torch.Tensor, precision: Precision, wait: bool) -> Decomposed | None:
        """As `decomposed`, in one process at a time. None if another process is at it; with `wait`, wait for it instead."""
        digest = weight_digest(weight)
        recipe = self._recipe(target, precision)
        with self.cache.claim(recipe.after(recipe.steps, target.shape).key(digest), wait) as ours:
            return self.decomposed(target, weight, digest, precision, Phases()) if ours else None

    def _recipe(self, target: Target, precision: Precision) -> Recipe:
        hessian = self.calibration.digest(target.module) if self.calibration else None
        return recipe_of(self.quant, self.quantizers[precision.bits], precision.rank, hessian)

    def initialised(self, target: Target, weight: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Q + s B A of the target's weight: float32 (out, in), on the CPU."""
        result = self.decomposed(target, weight, weight_digest(weight), precision, Phases()).result
        values = self.quantizers[precision.bits].decode_stored(result.quantized)
        return torch.addmm(values, result.lora_B, result.lora_A) if self.quant.iter else values

    def measure(self, tensors: CheckpointTensors, layout: Layout) -> dict[str, Errors]:
        """The error of each target at every candidate precision. The decompositions are stored in the cache."""
        total = sum(len(candidates(target, self.quant)) for target in layout.targets)
        errors: dict[str, Errors] = {}
        hits = 0

        def one(target: Target) -> tuple[str, Errors, int]:
            weight = target.read(tensors.read)
            digest = weight_digest(weight)
            tried = {precision: self.decomposed(target, weight, digest, precision, Phases())
                     for precision in candidates(target, self.quant)}  # fmt: skip
            found = {precision: decomposed.result.error for precision, decomposed in tried.items()}
            return target.module, found, sum(decomposed.cache_hit for decomposed in tried.values())

        with progress("measure") as advance:
            for module, found, known in side_by_side(one, layout.targets, self.device):
                errors[module] = found
                hits += known
                advance(sum(map(len, errors.values())), total, f"{hits} from the cache")
        return errors
