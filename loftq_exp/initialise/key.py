"""The inputs of an initialised checkpoint, the key derived from them, and the checkpoint's location.

Each checkpoint's report records its inputs, so that an error can name what differs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loftq_exp.artifact.folder import Initialised, read_artifact
from loftq_exp.calibration.cache import FORMAT as STATISTICS_FORMAT
from loftq_exp.calibration.samples import calibration_origin
from loftq_exp.config import RunConfig, digest_of
from loftq_exp.config.schema import INITIALISATION, shaping
from loftq_exp.errors import UserError
from loftq_exp.initialise.decomposition_cache import FORMAT as CACHE_FORMAT
from loftq_exp.initialise.plan import VERSION as PLAN_VERSION
from loftq_exp.initialise.plan import is_measured
from loftq_exp.initialise.polish import VERSION as POLISH_VERSION
from loftq_exp.initialise.prequantized import check_files
from loftq_exp.initialise.published import find_adapter
from loftq_exp.initialise.verify import VERSION as CHECK_VERSION
from loftq_exp.loftq import METRIC_VERSION, QUANTIZER_VERSION, SOLVER_VERSION
from loftq_exp.source.content import CONTENT, Content, content_of
from loftq_exp.source.files import FORMAT as FILES_FORMAT
from loftq_exp.source.head import FORMAT as HEAD_FORMAT
from loftq_exp.source.head import draws_head
from loftq_exp.source.layout import HEAD_KINDS
from loftq_exp.source.locate import Source

REPORT_FORMAT = 2
"""The format of init_report.json. Format 1 does not record the checkpoint's inputs."""
TAKEN_VERSION = 1
"""Increment it when the conversion of a published checkpoint changes."""
_KEY_DIGITS = 8

MadeFrom = dict[str, Any]
"""Everything that shapes an initialisation: `source` (see Content), `settings` and `versions`, each by name."""


def made_from(source: Source, config: RunConfig) -> MadeFrom:
    """Everything that shapes the initialisation of `source`.

    Raises UserError if a file cannot be read, or if the files show that `source` is no pre-trained model.
    """
    off_the_shelf = config.quant.method == "off-the-shelf"
    adapter: list[Path] = []
    if not off_the_shelf:
        check_files(source.folder)  # before its gigabytes are read for a digest
    else:
        with contextlib.suppress(UserError):  # a missing adapter is refused when its tensors are read
            weights = find_adapter(source)[1]
            adapter = [weights.parent / "adapter_config.json", weights]
    drawn = not off_the_shelf and (config.quant.iter == 0 or draws_head(source.folder, config))
    given = f"{'quant' if off_the_shelf else 'model'}.path={source.requested}"
    content = content_of(source.folder, given, config.model.trust_remote_code, config.cache_path, adapter)
    text = {"text": calibration_origin(config)} if config.quant.needs_text else {}
    return {"source": content, "settings": _settings(config, drawn) | text, "versions": _versions(config)}


def _settings(config: RunConfig, drawn: bool) -> dict[str, Any]:
    """The settings that shape an initialisation. The seed counts only if a value is `drawn`: LoftQ's factors are not random."""
    unused: tuple[str, ...] = () if drawn else ("seed",)
    if config.quant.method == "off-the-shelf":  # the published backbone is kept unchanged
        unused = ("seed", "save_dtype", "save_format")
    return {name: value for name, value in used(config, shaping(config, INITIALISATION)).items() if name not in unused}


def used(config: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` by dotted name, without those of the calibration text if none is read."""
    return {name: value for name, value in settings.items()
            if config.quant.needs_text or not name.startswith("calibration.")}  # fmt: skip


def _versions(config: RunConfig) -> dict[str, int | str]:
    versions: dict[str, int | str] = {"files": FILES_FORMAT, "check": CHECK_VERSION}
    if config.quant.method == "off-the-shelf":
        return versions | {"taken": TAKEN_VERSION}
    versions |= {"cache": CACHE_FORMAT, "quantizer": QUANTIZER_VERSION, "solver": SOLVER_VERSION}
    versions |= {"head": HEAD_FORMAT} if config.model.kind in HEAD_KINDS else {}
    versions |= (
        {"metric": METRIC_VERSION, "statistics": STATISTICS_FORMAT} if config.quant.calibration != "none" else {}
    )
    versions |= {"polish": POLISH_VERSION} if config.quant.polish_steps else {}
    return versions | ({"plan": PLAN_VERSION} if is_measured(config.quant) else {})


def init_key(source: Source, config: RunConfig) -> str:
    """The key of the initialisation of `source`, independent of the location of its files."""
    return digest_of(made_from(source, config))


def init_dir(config: RunConfig, key: str) -> Path:
    """The folder of the initialised checkpoint of a `key`.

    It is {save_dir}/{name} or, without `save_dir`, {output_dir}/inits/{name}-{key}. In the latter case an existing folder
    of that key is found under any model name.
    """
    if config.save_dir:
        return config.inits_path / config.init_name
    return named_by(config.inits_path, config.init_name, key[:_KEY_DIGITS])


def named_by(parent: Path, name: str, digest: str) -> Path:
    """The folder in `parent` whose name ends in `digest`, whatever precedes it; `name`-`digest` if there is none."""
    place = parent / f"{name}-{digest}"
    return place if place.exists() else next(iter(sorted(parent.glob(f"[!.]*-{digest}"))), place)


def recorded(report: Mapping[str, Any]) -> MadeFrom | None:
    """The inputs of the checkpoint of this report; None for one of version 0.1, which does not record them."""
    found = report.get("made_from")
    return found if isinstance(found, dict) else None


def done_before(place: Path, wanted: MadeFrom, config: RunConfig) -> Initialised | None:
    """The checkpoint in `place`, or None. Raises UserError if it was made from anything other than `wanted`."""
    found = read_artifact(place)
    if found is None:
        return None
    check_same(found, wanted, config)
    if "key" not in found.report:
        raise UserError(f"save_dir={place.parent}: {place.name} in it is an export, whose adapter is no longer the initial one; "
                        "set another save_dir, or move it away")  # fmt: skip
    return found


def check_unchanged(source: Source, config: RunConfig, wanted: MadeFrom) -> None:
    """Raise UserError if the files of `source` changed since the work on them began."""
    if made_from(source, config) != wanted:
        raise UserError(f"model.path={source.requested}: its files changed while they were read; run it again")


def check_same(found: Initialised, wanted: MadeFrom, config: RunConfig) -> None:
    """Raise UserError, which names what differs, unless `found` was made from `wanted`."""
    theirs = recorded(found.report)
    remedy = "it is never replaced: set another save_dir, or move it away"
    place = f"the checkpoint at {found.folder}"
    if theirs is None:
        raise UserError(
            f"save_dir={found.folder.parent}: {place} was made by version 0.1, which did not record its source; {remedy}"
        )
    path = f"model.path={config.model.path}"
    if config.quant.method == "off-the-shelf":
        path = f"quant.path={config.quant.path}" if config.quant.path else "quant=off-the-shelf"
    for name, _, _ in _differences(wanted["source"], theirs.get("source")):
        made = found.report["model"]["requested"]
        raise UserError(
            f"{path}: its {CONTENT[name]} differ from what {place} was made from ({made} at that time); {remedy}"
        )
    for name, value, other in _differences(wanted["settings"], theirs.get("settings")):
        raise UserError(f"{name}={_shown(value)}: {place} was made with {_shown(other)}; {remedy}")
    for name, value, other in _differences(wanted["versions"], theirs.get("versions")):
        age = "an older" if other is None or str(other) < str(value) else "another"
        raise UserError(
            f"save_dir={found.folder.parent}: {place} was made by {age} version ({name} {other}, here {value}); {remedy}"
        )


def of_settings(report: Mapping[str, Any], config: RunConfig) -> MadeFrom | None:
    """The inputs of an initialisation with the settings of `config` and the source of `report`.

    It is used if the source is not on this machine. None for a checkpoint of version 0.1.
    """
    theirs = recorded(report)
    if theirs is None:
        return None
    return theirs | {"settings": _settings(config, "seed" in theirs["settings"]), "versions": _versions(config)}


def content_in(report: Mapping[str, Any]) -> Content:
    """The source content recorded in this report; empty for a checkpoint of version 0.1."""
    found: Content = (recorded(report) or {}).get("source", {})
    return found


def _differences(ours: Mapping[str, Any], theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """The differences as (name, our value, their value); None for a missing value."""
    theirs = theirs if isinstance(theirs, dict) else {}
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        value, other = ours.get(name), theirs.get(name)
        if json.dumps(value) != json.dumps(other):
            yield name, value, other


def _shown(value: Any) -> Any:
    """A setting's value as users write it: pairs of patterns and widths become a dict."""
    pairs = isinstance(value, list) and all(isinstance(item, list) for item in value)
    return dict(value) if pairs else value
