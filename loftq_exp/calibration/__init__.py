"""Calibration: the second moments of the inputs of a model's linear layers over text, collected and cached.

Imports source, tasks, loftq, artifact, config.
"""

from loftq_exp.calibration.moments import Statistics
from loftq_exp.calibration.statistics import collect_statistics

__all__ = ["Statistics", "collect_statistics"]
