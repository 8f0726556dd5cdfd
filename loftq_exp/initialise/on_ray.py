"""The weights of one initialisation on the workers of a Ray cluster, which share this process's file system and its cache."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from loftq_exp.config import RunConfig
from loftq_exp.device import compute_device
from loftq_exp.errors import UserError
from loftq_exp.initialise.share import share
from loftq_exp.progress import progress
from loftq_exp.source.locate import Source

log = logging.getLogger(__name__)


def share_on_ray(source: Source, config: RunConfig) -> None:
    """Compute the decompositions of `source` in `initialise.shards` Ray tasks, until the cache has all of them.

    The cluster is that of $RAY_ADDRESS, else one on this machine. Ray starts the task of a worker that died again.

    Raises UserError if Ray is not installed or not reached, or for what `share` refuses.
    """
    ray = _connected()
    shards = config.initialise.shards
    task = ray.remote(num_cpus=1, num_gpus=int(compute_device(config.device).type == "cuda"))(_one)
    try:
        waiting = [task.remote(source, _shard(config, shard), Path.cwd()) for shard in range(shards)]
        with progress("tasks on Ray") as advance:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
                advance(shards - len(waiting), shards)
    except ray.exceptions.RayTaskError as error:
        raise _cause(error) from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"initialise.engine=ray: {' '.join(str(error).split())[:300]}; finished weights are kept"
        ) from error


def _shard(config: RunConfig, shard: int) -> RunConfig:
    """Return the settings of one task, which computes weights and does no more."""
    own = dataclasses.replace(config.initialise, engine="local", shard=shard)
    return dataclasses.replace(
        config, initialise=own, stages=("quantize",), hub=dataclasses.replace(config.hub, push=False)
    )


def _one(source: Source, config: RunConfig, place: Path) -> None:
    """Compute one shard, in the working directory of the process that asked for it."""
    os.chdir(place)
    share(source, config)


def _connected() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("initialise.engine=ray: not installed; run: pip install 'loftq_exp[ray]'") from None
    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "")
        raise UserError(f"initialise.engine=ray: no cluster at RAY_ADDRESS={address} ({' '.join(str(error).split())[:200]}); "
                        "start one, or unset RAY_ADDRESS") from error  # fmt: skip
    return ray


def _cause(error: Any) -> Exception:
    """Return the exception of a task, as it would be raised here."""
    cause = error.cause
    return cause if isinstance(cause, Exception) else RuntimeError(str(error))
