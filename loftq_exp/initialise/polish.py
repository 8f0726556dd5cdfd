"""The polish of an initialised checkpoint: its factors are tuned until the model's last hidden state is the pre-trained one's.

Each weight's decomposition sees its own layer alone. The polish sees how their errors add up: it minimises
||h - h*||^2 / ||h*||^2 over the calibration text by gradient steps on A and B, for the last hidden states h of the initialised and
h* of the pre-trained model (the objective of RILQ, arXiv:2412.01129). The backbone stays as it is.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from loftq_exp import manifest, ranks
from loftq_exp.artifact.folder import ADAPTER, Initialised
from loftq_exp.calibration.samples import IGNORED, calibration_samples, padded_batches
from loftq_exp.config import RunConfig
from loftq_exp.device import compute_device, compute_dtype
from loftq_exp.errors import UserError
from loftq_exp.integrations.loads import collected_log, without_bars
from loftq_exp.progress import Advance, progress
from loftq_exp.schemes import FORMATS
from loftq_exp.source.dequantized import method_of
from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.source.locate import Source
from loftq_exp.tasks.encode import Features
from loftq_exp.training.divergence import FiniteTrainer
from loftq_exp.training.load import load_model
from loftq_exp.training.loaded_adapter import WEIGHTS, read_adapter

log = logging.getLogger(__name__)

VERSION = 1
"""Part of the key of a polished checkpoint: increment it when the objective, the batches or the optimizer change."""

BATCH_TOKENS = 2048
"""Maximum number of tokens per step, padding included, unless one sample has more."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Polish:
    """What a polish did."""

    steps: int
    learning_rate: float
    tokens: int
    error_before: float
    """Relative squared error of the last hidden state over the batches of the polish, before it."""
    error_after: float
    kept: bool
    """Whether the polished factors are written; they are not if the error did not fall."""
    seconds: float


def polish_samples(source: Source, config: RunConfig) -> list[Features]:
    """Return the samples to polish on; none if quant.polish_steps is 0. Raises UserError with several ranks."""
    if not config.quant.polish_steps:
        return []
    if ranks.count() > 1:
        raise UserError(f"quant.polish_steps={config.quant.polish_steps}: a polish runs in one process; "
                        "run stages=[quantize] without torchrun first")  # fmt: skip
    if method := method_of(source.folder):
        raise UserError(f"quant.polish_steps={config.quant.polish_steps}: the aims come from the pre-trained model as transformers loads "
                        f"it, and model.path={source.requested} is already quantized by {method}; leave it at 0")  # fmt: skip
    return calibration_samples(source, config)


def polish(init: Initialised, source: Source, samples: Sequence[Features], config: RunConfig) -> Polish:
    """Tune the factors in the adapter file of `init` on `samples`, and return what it did. The head is not changed.

    In memory are first the pre-trained model, then the initialised one, and the hidden states of the text: tokens x width
    values in float32. Raises UserError if the tuning diverges.
    """
    began = time.perf_counter()
    device = compute_device(config.device)
    dtype = compute_dtype(device, None if device.type == "cuda" else False)
    batches = padded_batches(samples, BATCH_TOKENS)
    order = _order(len(batches), config.quant.polish_steps, config.calibration.seed)
    used = sorted(set(order))
    aims = dict(zip(used, _aims([batches[place] for place in used], source, config, device, dtype), strict=True))
    rows = {place: {"inputs": batches[place], "aim": aims[place]} for place in used}

    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, backbone=_form(config)))
    adapted = load_model(init, None, plain, device, dtype, written=False)
    factors = {name: value for name, value in adapted.named_parameters() if ".lora_" in name}
    for name, value in adapted.named_parameters():
        value.requires_grad_(name in factors)
    student = _Student(adapted.get_base_model())
    before = _error(student, list(rows.values()), device)
    _train(student, [rows[place] for place in order], config, device)
    after = _error(student, list(rows.values()), device)
    if after < before:
        _write({name.replace(".default", ""): value for name, value in factors.items()}, init.folder / ADAPTER)
    else:
        log.warning("polish: the relative error of the last hidden state went from %.4f to %.4f, so the factors are left as they "
                    "were; lower quant.polish_learning_rate=%g", before, after, config.quant.polish_learning_rate)  # fmt: skip
    log.info("polish: %d steps: relative error of the last hidden state %.4f -> %.4f", len(order), before, after)
    tokens = sum(int(batches[place]["attention_mask"].sum()) for place in used)
    return Polish(len(order), config.quant.polish_learning_rate, tokens, before, after, after < before,
                  time.perf_counter() - began)  # fmt: skip


def _form(config: RunConfig) -> str:
    """The format of the backbone in memory: dense where the checkpoint can be, so that train.backbone does not matter."""
    return "dense" if "dense" in FORMATS[config.save_format].forms else "auto"


def _order(count: int, steps: int, seed: int) -> list[int]:
    """The batch of each step: all of them in a random order, and again."""
    draw = random.Random(seed)
    order: list[int] = []
    while len(order) < steps:
        order += draw.sample(range(count), count)
    return order[:steps]


@torch.no_grad()
def _aims(
    batches: Sequence[Batch], source: Source, config: RunConfig, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The pre-trained model's last hidden states: (rows, length, width) of each batch, float32 on the CPU."""
    with without_bars(), collected_log():  # the file was checked, and a classifier's head is drawn but not used here
        model = AUTO_CLASSES[config.model.kind].from_pretrained(
            source.folder, dtype=dtype, device_map={"": device}, trust_remote_code=config.model.trust_remote_code
        )
    model.eval()
    return [_last_hidden(model, _moved(batch, device)).float().cpu() for batch in batches]


def _last_hidden(model: Any, inputs: Batch) -> torch.Tensor:
    """The last hidden state: of the decoder, if the model has an encoder too."""
    if "labels" in inputs:
        return model(**inputs, output_hidden_states=True).decoder_hidden_states[-1]
    return model.base_model(**inputs).last_hidden_state


def _counted(inputs: Batch) -> torch.Tensor:
    """Whether a position is a token of the text: bool (rows, length)."""
    return inputs["labels"] != IGNORED if "labels" in inputs else inputs["attention_mask"].bool()


class _Student(nn.Module):
    """The initialised model. Its loss is the relative squared error of the last hidden state. Dropout stays off."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _Student:
        """Stay in evaluation mode: the pre-trained model's states were computed without dropout."""
        return super().train(False)

    def forward(self, inputs: Batch, aim: torch.Tensor) -> dict[str, torch.Tensor]:
        """The sums of squares of the error and of the aim over the tokens, and their quotient `loss`."""
        counted = _counted(inputs)
        error = (_last_hidden(self.model, inputs).float() - aim)[counted].square().sum()
        size = aim[counted].square().sum()
        return {"loss": error / size, "error": error.detach(), "size": size}


@torch.no_grad()
def _error(student: _Student, rows: Sequence[Mapping[str, Any]], device: torch.device) -> float:
    """The relative squared error over all rows together."""
    error = size = 0.0
    for row in rows:
        found = student.eval()(_moved(row["inputs"], device), row["aim"].to(device))
        error, size = error + float(found["error"]), size + float(found["size"])
    return error / size


def _train(student: _Student, rows: Sequence[Mapping[str, Any]], config: RunConfig, device: torch.device) -> None:
    """Take one step of AdamW per row, in their order."""
    with tempfile.TemporaryDirectory() as unused, progress("polish") as advance:
        arguments = TrainingArguments(
            output_dir=unused,
            max_steps=len(rows),
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            learning_rate=config.quant.polish_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=config.calibration.seed,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="steps",
            logging_steps=1,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = FiniteTrainer(
            model=student,
            args=arguments,
            train_dataset=list(rows),
            data_collator=lambda chosen: dict(chosen[0]),
            callbacks=[_Show(advance)],
            setting="quant.polish_learning_rate",
            advice="lower it",
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = False
        trainer.train()


class _Show(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show the loss of each step."""
        if logs and "loss" in logs:
            self._advance(state.global_step, state.max_steps, f"relative error {logs['loss']:.4f}")


def _write(factors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Replace the `factors` in the adapter file in `folder`. Everything else in it stays."""
    values = {name: value.clone() for name, value in read_adapter(folder, "quantize again").items()}
    assert set(factors) == {name for name in values if ".lora_" in name}
    values |= {name: value.detach().cpu().float().contiguous() for name, value in factors.items()}
    beside = folder / f"{WEIGHTS}.new"
    save_file(values, beside, metadata={"format": "pt"})
    beside.replace(folder / WEIGHTS)
    manifest.forget(folder, WEIGHTS)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}
