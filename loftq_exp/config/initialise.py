"""The settings `initialise`: how several processes share one initialisation."""

from __future__ import annotations

from dataclasses import dataclass

from loftq_exp.config.schema import setting
from loftq_exp.errors import UserError


@dataclass(frozen=True)
class InitialiseConfig:
    """How many processes compute the weights, on any machines that share cache_dir. No result depends on it."""

    shards: int = setting(
        "number of processes that share out the weights of one initialisation", 1, ge=1, lt=65_537, shapes=()
    )
    shard: int = setting(
        "number of this process, from 0; it starts with the weights of its share, and goes on with those that are left",
        0,
        ge=0,
        shapes=(),
    )

    engine: str = setting(
        "local: this process computes its shard; ray: it computes all shards as tasks of the Ray cluster in $RAY_ADDRESS, by default "
        "one on this machine, with one CPU or GPU each",
        "local",
        choices=("local", "ray"),
        shapes=(),
    )

    def __post_init__(self) -> None:
        if self.shard >= self.shards:
            raise UserError(f"initialise.shard={self.shard}: there are {self.shards} shards, numbered from 0; "
                            f"give at most {self.shards - 1}, or set initialise.shards")  # fmt: skip
        if self.engine == "ray" and self.shards == 1:
            raise UserError("initialise.engine=ray: there is one task; set initialise.shards to the number of tasks")
        if self.engine == "ray" and self.shard:
            raise UserError(f"initialise.shard={self.shard}: initialise.engine=ray computes every shard; leave it out")
