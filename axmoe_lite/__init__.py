"""axmoe_lite: what happens to a neural network when its multiplications become approximate.

    >>> from axmoe_lite import multiplier, factorise
    >>> factorise(multiplier("mul8s_1L2J"))  # a circuit at 71 % of the power, and all it does
    Factors(rank 1: (a & 0b11111110)(b & 0b11111110))

Letters used for shapes everywhere: N images, C channels, H x W pixels, O outputs; B batch, T tokens,
D features, E experts; M x K x N a matrix product of fan-in K; Q = 256 operand values, R rank.
Accuracy lies in [0, 1]; units are suffixes (power_mw, delay_ns).

The modules, each importing only those before it:

    paths multipliers factors kernels quant layers pipeline moe models datasets train cost study runs claims
    search explore verify bench plots widgets doctor book __main__
"""

__version__ = "0.1.0"

from axmoe_lite.factors import Factors, exact_arithmetic, factorise
from axmoe_lite.kernels import conv2d, matmul
from axmoe_lite.layers import (
    ApproxConv2d,
    ApproxLinear,
    ApproxMatmul,
    approximate,
    assignment_of,
    restore,
)
from axmoe_lite.multipliers import EVOAPPROX, EXACT, PAPER_EIGHT, Multiplier, errors, multiplier
from axmoe_lite.pipeline import freeze

__all__ = [
    "EVOAPPROX",
    "EXACT",
    "PAPER_EIGHT",
    "ApproxConv2d",
    "ApproxLinear",
    "ApproxMatmul",
    "Factors",
    "Multiplier",
    "approximate",
    "assignment_of",
    "conv2d",
    "errors",
    "exact_arithmetic",
    "factorise",
    "freeze",
    "matmul",
    "multiplier",
    "restore",
]
