"""One run: its groups of settings, the folders that follow from them, and the checks that need several groups.

The composed configuration becomes one frozen `RunConfig` through `RunConfig.from_mapping`; nothing below `cli` sees
anything else. Checks that need only the settings are made here; checks that need the checkpoint are made where it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp.config.hub import HubConfig
from loftq_exp.config.model import ModelConfig
from loftq_exp.config.paths import local_path
from loftq_exp.config.quant import QuantConfig
from loftq_exp.config.schema import ADAPTER, INITIALISATION, build, setting
from loftq_exp.config.task import TaskConfig
from loftq_exp.config.train import TrainConfig
from loftq_exp.errors import UserError
from loftq_exp.schemes import FORMATS

STAGES = ("quantize", "finetune", "evaluate")


@dataclass(frozen=True)
class RunConfig:
    """One run: a model, a quantization, a task, how to train, and where things go."""

    model: ModelConfig
    quant: QuantConfig
    task: TaskConfig
    train: TrainConfig
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    stages: tuple[str, ...] = setting("what to run, in this order", STAGES, choices=STAGES, shapes=())
    output_dir: str = setting("where runs, sweeps and the defaults below go", "outputs", shapes=())
    save_dir: str | None = setting(
        "where initialised checkpoints go; none: OUTPUT_DIR/inits, which all runs share", None, shapes=()
    )
    cache_dir: str | None = setting(
        "where decompositions and converted wheels are kept; none: OUTPUT_DIR/cache", None, shapes=()
    )
    save_dtype: str = setting(
        "type of the stored backbone and of its scales",
        "bfloat16",
        choices=("bfloat16", "float32"),
        shapes=(INITIALISATION,),
    )
    save_format: str = setting(
        "dense: dequantized values; bnb4: bitsandbytes' packed 4-bit; packed: codes at their own bits, which train packed",
        "dense",
        choices=tuple(FORMATS),
        shapes=(INITIALISATION,),
    )
    seed: int = setting(
        "seed of the data order, dropout and random factors", 11, ge=0, lt=2**32, shapes=(INITIALISATION, ADAPTER)
    )
    device: str = setting("auto, cpu, cuda or cuda:N", "auto", shapes=())
    published: Mapping[str, float] | None = setting(
        "published scores of this row by name, as the results table writes them (percent, points); shown beside the measured",
        None,
        shapes=(),
    )

    def __post_init__(self) -> None:
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise UserError(f"stages={list(self.stages)}: name each stage once; choose from: {', '.join(STAGES)}")
        if self.hub.push and "quantize" not in self.stages:
            raise UserError("hub.push=true: publishes what the quantize stage makes or finds; add quantize to stages")
        self._check_formats()

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
        """A RunConfig from a nested mapping; raises UserError for a key, type or range that is not allowed."""
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain nested containers."""
        return dataclasses.asdict(self)

    def fits(self, form: str) -> bool:
        """Whether the storage format `form` holds the quantized values exactly."""
        return FORMATS[form].holds(self.quant.scheme)

    @property
    def cache_path(self) -> Path:
        """The cache's folder."""
        return local_path(self.cache_dir) if self.cache_dir else local_path(self.output_dir) / "cache"

    @property
    def label(self) -> str:
        """The run in a few words: model, bits, method and task."""
        quant = self.quant
        kind = "" if quant.type in ("nf", "none") else f"{quant.type}-"
        bits = f"{quant.bits_label}bit" + (f"-{quant.allocation}" if quant.allocation else "")
        steps = f"-iter{quant.iter}" if quant.method == "loftq" else ""
        return f"{self.model.basename}-{kind}{bits}-{quant.rank}rank-{quant.method}{steps}-{self.task.label}"

    @property
    def runs_path(self) -> Path:
        """The folder with a folder for each run."""
        return local_path(self.output_dir) / "runs"

    @property
    def inits_path(self) -> Path:
        """The folder with the initialised checkpoints: `save_dir`, or the store that all runs share."""
        return local_path(self.save_dir) if self.save_dir else local_path(self.output_dir) / "inits"

    @property
    def init_name(self) -> str:
        """The initialised checkpoint's name: {basename}-{bits}bit-{rank}rank. In the store its key follows."""
        return f"{self.model.basename}-{self.quant.bits_label}bit-{self.quant.rank}rank"
