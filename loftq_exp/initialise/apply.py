"""LoftQ in place: backbone values and initialised adapters in a transformers model in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from loftq_exp.artifact.folder import adapter_config
from loftq_exp.calibration import collect_statistics
from loftq_exp.config import QuantConfig
from loftq_exp.config.schema import build
from loftq_exp.errors import UserError
from loftq_exp.initialise.decomposer import quantizers_of, recipe_of, solve
from loftq_exp.initialise.decomposition_cache import Kept, Recipe
from loftq_exp.initialise.fit import check_shapes
from loftq_exp.initialise.plan import Errors, candidates, is_measured, make_plan
from loftq_exp.initialise.stage import random_A
from loftq_exp.initialise.workers import side_by_side
from loftq_exp.integrations.loads import ranks_of_parameters
from loftq_exp.loftq import Metric, Workspace, metric_of
from loftq_exp.loftq.allocation import Precision
from loftq_exp.progress import progress
from loftq_exp.source.in_memory import kind_of, layout_in_memory
from loftq_exp.source.selection import Selection
from loftq_exp.source.target import Target
from loftq_exp.storage.dense import FORMAT as DENSE
from loftq_exp.storage.format import Codes

Batches = Iterable[Mapping[str, torch.Tensor]]


def apply(
    model: transformers.PreTrainedModel,
    config: QuantConfig | Mapping[str, Any] | None = None,
    calibration: Batches | None = None,
    *,
    seed: int = 11,
    **settings: Any,
) -> PeftModel:
    """Quantize the linear layers of `model` in place and return it with initialised adapters, as a PeftModel.

    Each weight W becomes the dense values of Q, in its own dtype and on its own device. Its adapter (float32) starts at A and
    B with Q + s B A close to W. The values are those of `stages=[quantize]` with a save_dtype of the model's dtype.

    Args:
        model: a transformers model with a head, in float32, bfloat16 or float16, on a CPU or GPU. It is changed.
        config: the settings `quant`, as a `QuantConfig` or a mapping. `method` is loftq if a mapping does not name it.
        calibration: with `calibration=full` or `diagonal` in the settings, batches for `collect_statistics`.
        seed: of the adapters that are drawn: those of qlora and lora.
        **settings: settings `quant` by name, such as `bits=4, rank=16`, except `calibration`. They replace those of
            `config`.

    Returns:
        The PeftModel, ready to be trained. Its adapter belongs to Q, not to the pre-trained weights: save the
        backbone too. `base_model_name_or_path` of its config is therefore empty.

    Raises:
        UserError: if settings, model and calibration do not fit. The model is then unchanged, unless a decomposition
            failed.
    """
    if isinstance(calibration, str):
        raise UserError(
            f"calibration={calibration}: not batches; give the setting in config, {{'calibration': '{calibration}'}}"
        )
    quant = _settings(config, settings)
    _check_settings(quant, calibration)
    _check_model(model)
    kind = kind_of(model)
    layout = layout_in_memory(model, kind, Selection.of(quant))
    check_shapes(layout, quant)
    hessians: dict[str, torch.Tensor] = {}
    if calibration is not None:
        statistics = collect_statistics(
            model, calibration, quant.calibration, [target.module for target in layout.targets]
        )
        hessians = {module: found.hessian for module, found in statistics.items()}
    work = _InMemory(model, quant, hessians, seed)
    plan = make_plan(layout, quant, {target.module: work.errors(target) for target in layout.targets} if is_measured(quant) else None)  # fmt: skip
    lora = adapter_config(layout, plan, quant, kind, None)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def one(target: Target) -> None:
        factors[target.module] = work.initialise(target, plan[target.module])

    with progress("apply") as advance:
        for done, _ in enumerate(side_by_side(one, layout.targets, model.device), 1):
            advance(done, len(layout.targets))
    return _adapted(model, lora, [(target, *factors[target.module]) for target in layout.targets])


def _settings(config: QuantConfig | Mapping[str, Any] | None, settings: Mapping[str, Any]) -> QuantConfig:
    given = vars(config) if isinstance(config, QuantConfig) else config or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config: a {type(given).__name__} holds no settings; give a QuantConfig or a mapping, such as "
                        "{'bits': 4, 'rank': 16}")  # fmt: skip
    return build(QuantConfig, {"method": "loftq"} | dict(given) | dict(settings), "quant.")


def _check_settings(quant: QuantConfig, calibration: Batches | None) -> None:
    if quant.method == "off-the-shelf":
        raise UserError(
            "quant.method=off-the-shelf: a published checkpoint is loaded, not applied; use PeftModel.from_pretrained"
        )
    if quant.polish_steps:
        raise UserError(
            f"quant.polish_steps={quant.polish_steps}: apply does not polish; leave it at 0, or use stages=[quantize]"
        )
    if quant.order != "parallel":
        raise UserError(f"quant.order={quant.order}: apply calibrates all layers at once; leave it at parallel, or use stages=[quantize]")  # fmt: skip
    if quant.calibration != "none" and calibration is None:
        raise UserError(f"quant.calibration={quant.calibration}: there is no text; give batches as `calibration`")
    if quant.calibration == "none" and calibration is not None:
        raise UserError("quant.calibration=none: the batches of `calibration` would be ignored; set calibration full or diagonal "
                        "in the settings")  # fmt: skip


def _check_model(model: object) -> None:
    if not isinstance(model, PeftModel | PeftMixedModel | transformers.PreTrainedModel):
        raise UserError(
            f"model: a {type(model).__name__} is no transformers model; load one with AutoModel...from_pretrained"
        )
    # PEFT puts its layers into the model that it is given, which therefore has them too.
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            f"model: {type(model).__name__} has adapters already; load the model again, or take them off with unload() of "
            "the PeftModel"
        )


class _InMemory:
    """Converts the weights of one model."""

    def __init__(
        self, model: transformers.PreTrainedModel, quant: QuantConfig, hessians: dict[str, torch.Tensor], seed: int
    ) -> None:
        self.model, self.quant, self.hessians, self.seed = model, quant, hessians, seed
        self._workspace = Workspace()

    def initialise(self, target: Target, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
        """Write Q to the target's layer. Return A (r x in) and B (out x r), float32, on the CPU."""
        quant, (rows, columns) = self.quant, target.shape
        drawn = random_A(precision.rank, columns, self.seed, target.module), torch.zeros(rows, precision.rank)
        if quant.type == "none":
            return drawn
        kept, recipe = self._decomposed(target, precision)
        codes = Codes(kept.packed, kept.scales, kept.shape, recipe.quantizer)
        parameter = self._parameter(target)
        values = DENSE.encode(target.tensor, codes, parameter.dtype)[target.tensor]
        for piece, stored in target.stored(values):
            (parameter if piece.index is None else parameter[piece.index]).copy_(stored)
        share = math.sqrt(quant.scaling)  # absorb s equally, as the quantize stage does
        return (kept.lora_A / share, kept.lora_B / share) if quant.iter else drawn

    def errors(self, target: Target) -> Errors:
        """The relative error of the target at each candidate precision."""
        return {precision: self._decomposed(target, precision)[0].error for precision in candidates(target, self.quant)}

    def _parameter(self, target: Target) -> torch.Tensor:
        return self.model.get_parameter(target.parameter).detach()

    def _decomposed(self, target: Target, precision: Precision) -> tuple[Kept, Recipe]:
        """The decomposition and its recipe. It is solved as the stage solves it for its cache, so that values are equal."""
        quant, weight = self.quant, target.read(lambda _: self._parameter(target))
        hessian = self.hessians.get(target.module)
        metric: Metric | None = None if hessian is None else metric_of(hessian.to(weight.device))
        quantizer = quantizers_of(quant, weight.dtype)[precision.bits]
        recipe = recipe_of(quant, quantizer, precision.rank, None if hessian is None else target.module)
        solved = recipe.after(recipe.steps, target.shape)
        try:
            result = solve(solved, weight, metric, self._workspace.of_thread())
        except UserError as error:
            raise UserError(f"model: weight {target.parameter}: {error}") from None
        kept = Kept.of(result, precision.bits)
        return (kept.truncated(recipe.rank) if solved.rank > recipe.rank else kept), recipe


def _adapted(
    model: transformers.PreTrainedModel, lora: Any, factors: Iterable[tuple[Target, torch.Tensor, torch.Tensor]]
) -> PeftModel:
    """The model with adapters that hold exactly these factors."""
    with torch.random.fork_rng(devices=[]), ranks_of_parameters(lora):  # PEFT draws factors, which are replaced
        adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = ""  # not the pre-trained weights, which are not Q
    parameters = dict(adapted.named_parameters())
    names = {name for name in parameters if ".lora_" in name}
    for target, lora_A, lora_B in factors:
        for factor, values in (("A", lora_A), ("B", lora_B)):
            name = f"base_model.model.{target.layer}.lora_{factor}.default.weight"
            target.factor(factor, parameters[name].data).copy_(values)
            names.discard(name)
    if names:
        raise RuntimeError(f"PEFT adapted {min(names)}, which was not initialised")
    return adapted
