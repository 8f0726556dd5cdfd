"""Names of the files in a sweep's folder."""

from __future__ import annotations

PLAN = "sweep.json"
"""What the sweep was asked for."""
JOB = "job-*.json"
"""The records of its jobs, one file per job, see `job_file`."""


def job_file(number: int) -> str:
    """Return the name of the file with the outcome of the job of this number."""
    return f"job-{number:04d}.json"
