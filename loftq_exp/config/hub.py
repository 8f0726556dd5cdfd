"""Publishing on the model hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loftq_exp.config.schema import setting
from loftq_exp.errors import UserError

HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""OWNER/NAME of a repository on the model hub, as a regular expression."""


@dataclass(frozen=True)
class HubConfig:
    """Whether and where the initialised checkpoint is published. The token comes from the environment (HF_TOKEN)."""

    push: bool = setting(
        "publish the initialised checkpoint on the model hub after the quantize stage", False, shapes=()
    )
    repo_id: str | None = setting(
        "repository to publish it in, OWNER/NAME; made where it is not there", None, shapes=()
    )
    private: bool | None = setting(
        "whether a new repository is private; none: as its owner's default says", None, shapes=()
    )
    revision: str | None = setting(
        "branch to publish on, made where it is not there; none: the default branch", None, shapes=()
    )

    def __post_init__(self) -> None:
        if self.repo_id is not None and not re.fullmatch(HUB_ID, self.repo_id):
            raise UserError(f"hub.repo_id={self.repo_id}: not a repository's name; give hub.repo_id=OWNER/NAME")
        if self.push and self.repo_id is None:
            raise UserError("hub.push=true: no repository is named; give hub.repo_id=OWNER/NAME")
