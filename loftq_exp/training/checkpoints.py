"""The trainer's checkpoints: the one that a killed training resumes from, when they are written, and their manifests."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from loftq_exp import manifest, ranks
from loftq_exp.artifact.origin import Origin, read_origin
from loftq_exp.whole import remove_folder

log = logging.getLogger(__name__)

_STATE = "trainer_state.json"


def checkpoint(folder: Path, step: int) -> Path:
    """Return the folder of the trainer's checkpoint of a step."""
    return folder / f"checkpoint-{step}"


@dataclass(frozen=True)
class Reached:
    """How far a training came: its step, whether no step is left, and the trainer's log."""

    step: int
    is_last: bool
    history: list[dict[str, Any]]


def read_state(place: Path) -> Reached:
    """Return how far the training of the trainer's checkpoint in `place` came."""
    state = _state(place)
    return Reached(int(state["global_step"]), state["global_step"] >= state["max_steps"], list(state["log_history"]))


def resume_from(checkpoints: Path, origin: Origin, keeps_best: bool) -> Path | None:
    """Return the checkpoint of this `origin` to resume from. Checkpoints of another origin are removed."""
    _start_over_from_another(checkpoints, origin)
    return last_whole_checkpoint(checkpoints, origin, keeps_best)


def last_whole_checkpoint(folder: Path, origin: Origin | None = None, keeps_best: bool = False) -> Path | None:
    """Return the complete checkpoint of this `origin` with the most steps. Later ones, such as damaged ones, are removed.

    If the training `keeps_best`, the best step's checkpoint must be whole too: its adapter may be the one that is saved.
    The trainer writes trainer_state.json last, and the manifest is written after it.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        fault = _fault(path, origin)
        if fault is None and keeps_best and (best := _best_of(path)) not in (None, path):
            fault = _fault(best, origin) and f"the best step's {best.name} is missing or damaged"
        if fault is None:
            return path
        log.warning("finetune: %s is passed over: %s", path, fault)
        shutil.rmtree(path)
    return None


class KeepCheckpoints(TrainerCallback):
    """Saves a checkpoint every `save_steps` steps, and finds the best one again if the run's folder was moved."""

    def __init__(self, save_steps: int, folder: Path) -> None:
        self._steps, self._folder = save_steps, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the path of the best checkpoint."""
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint(self._folder, state.best_global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save if the step is a multiple of `save_steps`."""
        control.should_save = control.should_save or state.global_step % self._steps == 0


class ListCheckpoints(TrainerCallback):
    """Writes the origin and the manifest of each checkpoint, once all ranks have written their part."""

    def __init__(self, checkpoints: Path, origin: Origin) -> None:
        self.checkpoints, self.origin = checkpoints, origin

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """List the files of the checkpoint that was just written."""
        ranks.gather(None)
        ranks.from_main(lambda: self._list(checkpoint(self.checkpoints, state.global_step)))

    def _list(self, place: Path) -> None:
        self.origin.write(place)
        manifest.complete(place)


def _state(place: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((place / _STATE).read_text())
    return state


def _fault(place: Path, origin: Origin | None) -> str | None:
    """Return why training cannot resume from a checkpoint. One without a manifest, of an older version, is loaded to know."""
    try:
        _state(place)
    except (OSError, ValueError):
        return "it is incomplete"
    if (place / manifest.FILE).exists():
        if origin not in (None, read_origin(place)):
            return "it has other rows, weights or settings"
        return next(manifest.faults(place), None)
    try:
        for path in sorted(place.glob("*.safetensors")):
            load_file(path)
        for name in ("optimizer.pt", "scheduler.pt"):
            if (place / name).exists():
                torch.load(place / name, map_location="cpu", weights_only=True)
    except Exception as error:  # any type: a damaged pickle raises whatever its bytes say
        return f"it does not load ({type(error).__name__})"
    return None


def _best_of(place: Path) -> Path | None:
    """Return the checkpoint of the best step when this one was written; None if nothing was validated before."""
    best = _state(place).get("best_global_step")
    return checkpoint(place.parent, best) if best else None


def _start_over_from_another(checkpoints: Path, origin: Origin) -> None:
    """Remove checkpoints that were not made from `origin`, and write the keys of `origin` for those to come."""
    if any(checkpoints.glob("checkpoint-*")) and read_origin(checkpoints) != origin:
        log.info(
            "finetune: starts over, because the checkpoints in %s have other rows, weights or settings", checkpoints
        )
        remove_folder(checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    origin.write(checkpoints)
