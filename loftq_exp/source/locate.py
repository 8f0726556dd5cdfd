"""Locate a model's files in a folder, a wheel from the package index, or the model hub.

`locate` is the first stage of a run. It returns a local folder that holds a config and weights.
`loftq_exp.source.tensors` checks that the weights are complete when it opens them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_exp.config import ModelConfig, local_path
from loftq_exp.errors import UserError
from loftq_exp.foreign import reason_of
from loftq_exp.source.files import named_in_code
from loftq_exp.source.hub import fetch_checkpoint, fetch_config, is_absent
from loftq_exp.source.tensors import SAFETENSORS_FILES, TORCH_FILES, find_weights
from loftq_exp.source.wheel import SCHEME, is_whole, packaged, packaged_folder

_OTHER_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pth", ".pt")


class NotHere(UserError):
    """The files of a checkpoint are not on this machine."""


@dataclass(frozen=True)
class Source:
    """The local files of a pre-trained model."""

    folder: Path
    """Holds config.json, the weights and the tokenizer, if the model has one."""
    basename: str
    """The model's name in folder names and tables."""
    requested: str
    """`model.path` as the user gave it."""
    commit: str | None
    """The hub's commit; None for a folder and for a wheel, whose digest `model.sha256` fixes."""


def locate(model: ModelConfig, cache_dir: Path, local_only: bool = False) -> Source:
    """The local files of `model`, downloaded if necessary.

    `pypi:NAME==VERSION` is a wheel. A path that exists, or starts with `/`, `./`, `../` or `~`, is a folder. Anything else
    is a hub id. Converted wheels are kept in `cache_dir`, and hub models in the hub's own cache, which other tools share.
    With `local_only` nothing is downloaded or converted. Raises UserError if nothing usable is found. Raises NotHere if a
    folder or, with `local_only`, a download is absent.
    """
    if model.path.startswith(SCHEME):
        if local_only and not is_whole(packaged_folder(model, cache_dir)):
            raise NotHere(f"model.path={model.path}: is not downloaded yet")
        folder, commit = packaged(model, cache_dir), None
        _check_folder("model", model.path, folder)
    else:
        code = ["*.py"] if model.trust_remote_code else []
        folder, commit = checkpoint_folder("model", model.path, model.revision, code, local_only)
        if commit and model.trust_remote_code and not local_only:  # by commit: the branch may have moved since
            checkpoint_folder("model", model.path, commit, [*code, *sorted(named_in_code(folder))])
    return Source(folder, model.basename, model.path, commit)


def config_folder(model: ModelConfig, cache_dir: Path) -> Path:
    """A folder with the config.json of `model`. Of a hub model nothing else is downloaded.

    Raises UserError if it is unusable, and NotHere if there is none.
    """
    if model.path.startswith(SCHEME) or _is_local(model.path):
        return locate(model, cache_dir).folder
    try:
        folder = fetch_config(model.path, model.revision)
    except UserError as error:
        raise (NotHere(str(error)) if is_absent(error) else error) from error.__cause__
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path={model.path}: the repository has no config.json; give one in the format of transformers"
        )
    return folder


def checkpoint_folder(
    group: str, path: str, revision: str | None, extra: Sequence[str] = (), local_only: bool = False
) -> tuple[Path, str | None]:
    """The folder of the checkpoint `path`, which is a local folder or a hub id, and its commit on the hub.

    Files that match `extra` are fetched besides config, tokenizer and weights. With `local_only` nothing is fetched. Raises
    UserError, which names the settings GROUP.path and GROUP.revision, if nothing usable is found. Raises NotHere if a folder
    or, with `local_only`, a download is absent.
    """
    if _is_local(path):
        folder, commit = local_path(path).absolute(), None
    else:
        try:
            folder = fetch_checkpoint(group, path, revision, extra, local_only)
        except UserError as error:
            raise (NotHere(str(error)) if local_only and is_absent(error) else error) from error.__cause__
        if local_only and find_weights(folder) is None:
            raise NotHere(f"{group}.path={path}: its weights are not downloaded yet")
        commit = folder.name  # snapshots are named after their commit
    _check_folder(group, path, folder)
    return folder, commit


def _is_local(path: str) -> bool:
    starts = ("~", os.sep, f".{os.sep}", f"..{os.sep}")
    return path.startswith(starts) or path in ("", ".", "..") or Path(path).exists()


def _check_folder(group: str, requested: str, folder: Path) -> None:
    """Raise UserError unless `folder` has a readable config and weights."""
    given = f"{group}.path={requested}"
    if not requested.strip():
        raise UserError(f"{given}: no value is set; give a hub id, a folder or {SCHEME}NAME==VERSION")
    if folder.is_file():
        raise UserError(f"{given}: this is a file; give the folder that holds it together with config.json")
    try:
        found = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        raise NotHere(f"{given}: there is no folder {folder}; give an existing folder or a hub id") from None
    except OSError as error:
        advice = "change its permissions or give another folder"
        raise UserError(f"{given}: {folder} cannot be read ({error.strerror}); {advice}") from error
    if not found:
        raise UserError(f"{given}: the folder {folder} is empty; put the model's files into it, or give another")
    if "config.json" not in found and "adapter_config.json" in found:
        raise UserError(f"{given}: {folder} is an adapter without its model; give the pre-trained model, usually the one that "
                        "base_model_name_or_path in adapter_config.json names")  # fmt: skip
    if "config.json" not in found:
        raise UserError(f"{given}: {folder} has no config.json; give the folder that holds config.json and the weights")
    config = folder / "config.json"
    try:
        stated = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{given}: {config} is not readable JSON ({reason_of(error)}); download it again") from error
    if not isinstance(stated, dict) or not isinstance(stated.get("model_type"), (str, type(None))):
        raise UserError(f"{given}: {config} is not an object of settings with a model_type; download it again")
    if find_weights(folder) is None:
        others = [name for name in found if name.endswith(_OTHER_WEIGHTS)]
        instead = f" (only {', '.join(others[:3])})" if others else ""
        known = " or ".join(SAFETENSORS_FILES + TORCH_FILES)
        raise UserError(f"{given}: {folder} has a config but no weights{instead}; put {known} into it")
