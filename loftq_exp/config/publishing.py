"""The settings `hub`: publishing on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loftq_exp.config.schema import setting
from loftq_exp.errors import UserError

HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""Regular expression for a repository on the Hub, OWNER/NAME."""


@dataclass(frozen=True)
class HubConfig:
    """Whether and where the initialised checkpoint is published. The token is read from the environment (HF_TOKEN)."""

    push: bool = setting(
        "upload the initialised checkpoint to the Hugging Face Hub after the quantize stage", False, shapes=()
    )
    repo_id: str | None = setting(
        "Hub repository to upload to, OWNER/NAME; created if it does not exist", None, shapes=()
    )
    private: bool | None = setting(
        "whether a newly created repository is private; null: the owner's default", None, shapes=()
    )
    revision: str | None = setting(
        "branch to upload to, created if it does not exist; null: the default branch", None, shapes=()
    )

    def __post_init__(self) -> None:
        if self.repo_id is not None and not re.fullmatch(HUB_ID, self.repo_id):
            raise UserError(f"hub.repo_id={self.repo_id}: not a repository's name; give hub.repo_id=OWNER/NAME")
        if self.push and self.repo_id is None:
            raise UserError("hub.push=true: no repository is named; give hub.repo_id=OWNER/NAME")
