"""LoftQ on one weight: W in, (Q, A, B) out. Independent of models, files and settings.

Has one module per family of quantizers, the alternation with its solver, and the allocation of bits. Imports kernels,
schemes, device, errors.
"""

from loftq_exp.loftq.alternation import Decomposition, Factors
from loftq_exp.loftq.decompose import decompose, first_rank, kaiming_uniform_A, loftq_init
from loftq_exp.loftq.lowrank import SOLVER_VERSION, truncated_svd
from loftq_exp.loftq.memory import Workspace
from loftq_exp.loftq.metric import METRIC_VERSION, Metric, metric_of
from loftq_exp.loftq.quantizer import QUANTIZER_VERSION, Quantized, Quantizer
from loftq_exp.loftq.quantizers import make_quantizer

__all__ = [
    "METRIC_VERSION",
    "QUANTIZER_VERSION",
    "SOLVER_VERSION",
    "Decomposition",
    "Factors",
    "Metric",
    "Quantized",
    "Quantizer",
    "Workspace",
    "decompose",
    "first_rank",
    "kaiming_uniform_A",
    "loftq_init",
    "make_quantizer",
    "metric_of",
    "truncated_svd",
]
