"""Find the initialised checkpoint of an earlier run, for a run without the quantize stage."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from loftq_exp import manifest
from loftq_exp.artifact.folder import ADAPTER, Initialised, exclusive, faults_of, read_artifact
from loftq_exp.config import RunConfig, digest_of
from loftq_exp.errors import UserError
from loftq_exp.initialise.key import check_same, init_dir, made_from, of_settings
from loftq_exp.initialise.published import source_of
from loftq_exp.source.locate import NotHere
from loftq_exp.whole import remove_folder

log = logging.getLogger(__name__)


def find_kept(config: RunConfig) -> Initialised:
    """The checkpoint that the quantize stage would write or find. Nothing is downloaded for the comparison.

    Raises UserError if there is none, or if the one in `save_dir` was made from anything else.
    """
    try:
        source = source_of(config, local_only=True)
    except NotHere:
        return _without_source(config)
    wanted = made_from(source, config)
    place = init_dir(config, digest_of(wanted))
    _check_small(place)
    found = read_artifact(place)
    if found is None:
        raise _absent(config, str(place))
    check_same(found, wanted, config)
    return found


def discard_damaged(folder: Path, config: RunConfig) -> bool:
    """Remove the checkpoint in `folder` if a file of it is not as it was written, and return whether it was removed.

    Only of our own store: it is named by its key, so the quantize stage makes it again. In a `save_dir` it is left to the
    user, to whom the load names the file.
    """
    if config.save_dir or not faults_of(folder):
        return False
    with exclusive(folder):
        remove_damaged(folder, config)  # unless another process has made it again
    return True


def remove_damaged(folder: Path, config: RunConfig, most: float = math.inf) -> None:
    """Remove a checkpoint of our own store with a damaged file of at most `most` bytes. Only under its lock.

    Raises UserError for one in a `save_dir`.
    """
    found = faults_of(folder, most)
    if found and config.save_dir:
        raise UserError(f"{found[0]}; delete {folder} to make it again")
    if found:
        log.warning("quantize: %s; the checkpoint is made again", found[0])
        remove_folder(folder)


def _without_source(config: RunConfig) -> Initialised:
    """The only checkpoint with these settings and the same source name. The source's content cannot be compared."""
    places = [config.inits_path / config.init_name] if config.save_dir else sorted(config.inits_path.glob("[!.]*"))
    found = [init for place in places if place.is_dir() and (init := read_artifact(place))]
    given = f"model.path={config.model.path}: is not on this machine"
    if config.save_dir and found:
        wanted = of_settings(found[0].report, config)
        _check_small(found[0].folder)
        check_same(found[0], wanted or {}, config)
        if not _same_name(found[0], config):
            made = found[0].report["model"]["requested"]
            raise UserError(f"{given}, and the checkpoint at {found[0].folder} was made from {made}; "
                            f"give that as model.path, or set another save_dir")  # fmt: skip
        return found[0]
    fitting = [init for init in found if _same_name(init, config) and _fits(init, config)]
    if len(fitting) > 1:
        raise UserError(f"{given}, and {len(fitting)} initialisations were made from different versions of its files; "
                        "restore the model's files")  # fmt: skip
    if not fitting:
        raise _absent(config, f"{config.inits_path}/{config.init_name}-*")
    _check_small(fitting[0].folder)
    return fitting[0]


def _check_small(folder: Path) -> None:
    """Raise UserError if a small file of the checkpoint is not as it was written. The weights are checked when they are loaded."""
    for place in (folder, folder / ADAPTER):
        manifest.check(place, f"delete {folder} and add quantize to stages to make it again", manifest.SMALL)


def _fits(init: Initialised, config: RunConfig) -> bool:
    wanted = of_settings(init.report, config)
    try:
        if wanted is not None:
            check_same(init, wanted, config)
    except UserError:
        return False
    return wanted is not None


def _same_name(init: Initialised, config: RunConfig) -> bool:
    off_the_shelf = config.quant.method == "off-the-shelf"
    given = config.quant.path or init.report["model"]["requested"] if off_the_shelf else config.model.path
    return str(init.report["model"]["requested"]).rstrip("/") == given.rstrip("/")


def _absent(config: RunConfig, place: str) -> UserError:
    return UserError(f"stages=[{','.join(config.stages)}]: there is no initialised checkpoint at {place}; "
                     "add quantize to stages")  # fmt: skip
