"""The checkpoints that the method's authors published, which `quant=off-the-shelf` uses instead of quantizing."""

from __future__ import annotations

from pathlib import Path

from loftq_exp.artifact.folder import ADAPTER
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.source.hub import is_absent
from loftq_exp.source.locate import NotHere, Source, checkpoint_folder, locate

PUBLISHED: dict[str, tuple[tuple[int, int], ...]] = {
    "Llama-2-7b-hf": ((4, 64),),
    "Llama-2-13b-hf": ((4, 64),),
    "Llama-2-70b-hf": ((4, 64),),
    "Meta-Llama-3-8B": ((4, 64),),
    "CodeLlama-7b-hf": ((4, 64),),
    "CodeLlama-13b-hf": ((4, 64),),
    "Mistral-7B-v0.1": ((4, 64), (4, 32)),
    "phi-2": ((4, 64),),
    "bart-large": ((4, 8), (4, 16), (4, 32), (2, 8)),
}
"""(bits, rank) by the last part of the pre-trained model's path. The repository is LoftQ/{model}-{bits}bit-{rank}rank."""
OLDER_NAMES = ("bart-large",)
"""Models with some repositories named in an older form: LoftQ/{model}-bit{bits}-rank{rank}."""
ADAPTER_FOLDERS = (ADAPTER, "loft_init", "")
"""Folders of a published checkpoint that may hold the adapter, in search order."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def published_names(config: RunConfig) -> tuple[str, ...]:
    """The hub ids of the run's model, bits and rank. Raises UserError if that combination is not published."""
    quant, basename = config.quant, config.model.basename
    model = next((name for name in PUBLISHED if name.lower() == basename.lower()), None)
    if model is None or (quant.bits, quant.rank) not in PUBLISHED[model]:
        there = "; ".join(f"{name} {_pairs(PUBLISHED[name])}" for name in ([model] if model else PUBLISHED))
        raise UserError(f"quant=off-the-shelf: {basename} with {quant.bits} bits and rank {quant.rank} is not published; "
                        f"available (bits/rank): {there}; use quant=loftq, or set quant.path to a checkpoint of that layout")  # fmt: skip
    newer, older = f"{model}-{quant.bits}bit-{quant.rank}rank", f"{model}-bit{quant.bits}-rank{quant.rank}"
    return tuple(f"LoftQ/{name}" for name in ((newer, older) if model in OLDER_NAMES else (newer,)))


def check_published(config: RunConfig) -> None:
    """Raise UserError for a combination that is not published. It needs only the settings, not a download."""
    if config.quant.method == "off-the-shelf" and config.quant.path is None:
        published_names(config)


def _pairs(pairs: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{bits}/{rank}" for bits, rank in pairs)


def source_of(config: RunConfig, local_only: bool = False) -> Source:
    """The local files of the pre-trained model, or of the published checkpoint for `quant=off-the-shelf`.

    With `local_only` nothing is downloaded. Raises UserError if nothing usable is found, and NotHere if it is absent.
    """
    if config.quant.method == "off-the-shelf":
        return locate_published(config, local_only)
    return locate(config.model, config.cache_path, local_only)


def locate_published(config: RunConfig, local_only: bool = False) -> Source:
    """The local files of the published checkpoint: of `quant.path`, a folder or hub id, or of the entry in `PUBLISHED`.

    With `local_only` nothing is downloaded. Raises UserError if the combination is not published or nothing usable is found.
    """
    wanted = [
        f"{folder}/{name}".lstrip("/") for folder in ADAPTER_FOLDERS for name in ("adapter_config.json", *ADAPTER_FILES)
    ]
    places = published_names(config) if config.quant.path is None else (config.quant.path,)
    absent: list[UserError] = []
    for place in places:
        try:
            folder, commit = checkpoint_folder("quant", place, config.quant.revision, wanted, local_only)
        except UserError as error:
            if not (is_absent(error) or isinstance(error, NotHere)):
                raise
            absent.append(error)
        else:
            return Source(folder, config.model.basename, place, commit)
    raise absent[0]


def find_adapter(source: Source) -> tuple[str, Path]:
    """The adapter's folder in the published checkpoint ("" for its root) and its weights. Raises UserError if absent."""
    given = f"quant.path={source.requested}"
    for name in ADAPTER_FOLDERS:
        place = source.folder / name
        if (place / "adapter_config.json").is_file():
            for file in ADAPTER_FILES:
                if (place / file).is_file():
                    return name, place / file
            raise UserError(f"{given}: {place} has no {' or '.join(ADAPTER_FILES)}; download it again")
    where = ", ".join(f"{name}/" if name else "its root" for name in ADAPTER_FOLDERS)
    raise UserError(f"{given}: it has no adapter (searched {where}); give a checkpoint that was published with one")
