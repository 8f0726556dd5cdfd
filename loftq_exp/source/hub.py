"""Access to the model hub: the token, the files to fetch, and error messages for the user.

The token is read from the environment and used in requests only. Server responses are never quoted, as they may contain it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download

# HTTPError is httpx's. It is imported from here because huggingface_hub 1 uses httpx and huggingface_hub 2 uses httpx2.
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

from loftq_exp.errors import UserError
from loftq_exp.source.tensors import SAFETENSORS_FILES, TORCH_FILES, absent_shards
from loftq_exp.source.wheel import UNWRITABLE

# Listed by name: many repositories hold their weights several times (onnx/, consolidated.safetensors, tf_model.h5).
_SMALL = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "chat_template*", "vocab*", "merges.txt", "*.model",
          # Other files that transformers' tokenizers read: bertweet, marian, prophetnet, luke, xlm, tiktoken ...
          "bpe.codes", "*.spm", "*.tiktoken", "dict.txt", "prophetnet.tokenizer", "*_vocab.json", "emoji.json", "normalizer.json",
          "byte_maps.json", "word_shape.json", "word_pronunciation.json", "tekken.json"]  # fmt: skip
_SAFETENSORS = [*SAFETENSORS_FILES, "model-*-of-*.safetensors"]
_TORCH = [*TORCH_FILES, "pytorch_model-*-of-*.bin"]


def token() -> str | Literal[False]:
    """The hub token from the environment. False if none is set, which stops the client from looking elsewhere."""
    return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or False


def fetch_checkpoint(
    group: str, path: str, revision: str | None, extra: Sequence[str] = (), local_only: bool = False
) -> Path:
    """The snapshot of the checkpoint `path` in the hub's local cache: config, tokenizer, weights and files matching `extra`.

    Weights are safetensors if the repository has them, else .bin. The snapshot's folder is named after its commit.
    With `local_only` no request is sent. Raises UserError, which names the settings GROUP.path and GROUP.revision.
    """
    small = [*_SMALL, *extra]

    def fetch(revision: str | None, weights: list[str]) -> Path:
        return Path(snapshot_download(path, revision=revision, token=token(), local_files_only=local_only,
                                      allow_patterns=small + weights))  # fmt: skip

    try:
        folder = fetch(revision, _SAFETENSORS)
        if not any((folder / name).exists() for name in SAFETENSORS_FILES) and not local_only:
            fetch(folder.name, _TORCH)  # by commit: the branch may have moved since
        if not local_only and (named := absent_shards(folder)):  # such as model.safetensors-00001-of-00002.safetensors
            fetch(folder.name, named)
    except (OSError, HFValidationError, HTTPError) as error:
        raise _error(group, path, revision, error) from error
    return folder


def fetch_config(path: str, revision: str | None) -> Path:
    """A folder of the hub's local cache with the config.json of the model `path`; its weights may be absent.

    Raises UserError, which names the settings model.path and model.revision.
    """
    try:
        return Path(snapshot_download(path, revision=revision, token=token(), allow_patterns=["config.json"]))
    except (OSError, HFValidationError, HTTPError) as error:
        raise _error("model", path, revision, error) from error


def is_absent(error: UserError) -> bool:
    """Whether `fetch_checkpoint` failed because the hub, or the local cache when offline, has no such repository."""
    cause = error.__cause__
    if isinstance(cause, GatedRepoError):
        return False
    return isinstance(cause, (RepositoryNotFoundError, LocalEntryNotFoundError))


def _error(group: str, path: str, revision: str | None, error: Exception) -> UserError:
    """The UserError for a hub error, with what the user can do."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, RevisionNotFoundError):
        return UserError(f"{group}.revision={revision}: {path} has no such branch, tag or commit; "
                         f"choose one from its page on the hub, or leave {group}.revision out")  # fmt: skip
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
        fault = f"the hub answered with status {status}; try again later, or give {group}.path= a local folder"
    elif isinstance(cause, OfflineModeIsEnabled):
        fault = (
            "not a folder, not complete in the local cache, and offline mode is on; unset HF_HUB_OFFLINE, "
            f"or give {group}.path= a local folder"
        )
    elif isinstance(cause, OSError) and cause.errno in UNWRITABLE:
        fault = f"the download cannot be stored ({cause.strerror}); set HF_HOME in the environment to a folder with free space"
    else:
        fault = (
            "not a folder, not complete in the local cache, and the hub cannot be reached; connect to the network, "
            f"or give {group}.path= a local folder"
        )
    return UserError(f"{group}.path={path}: {fault}")
