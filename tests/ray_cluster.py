"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@contextlib.contextmanager
def two_nodes() -> Iterator[str]:
    """Start two nodes of one CPU each; yield their address. Their working directory is not that of a command."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="the extra ray is not installed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")  # workers inherit it
        patched.chdir("/")
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**_NODE, "include_dashboard": False})
        cluster.add_node(**_NODE)
        cluster.wait_for_nodes()
    try:
        assert len(cluster.list_all_nodes()) == 2
        yield str(cluster.address)
    finally:
        cluster.shutdown()
