"""Layers that multiply approximately, and the two calls that put them into a network and take them out.

    approximate(network, "mul8s_1L2J", calibration=images)     one multiplier everywhere
    approximate(network, {"layer1.0.conv1": "mul8s_1L2L"})     an assignment: layer name -> multiplier
    approximate(network, {"conv1": ["mul8s_1KV6", ...]})       or one for each of the layer's filters
    restore(network)                                           the very layers that were there before

The law of a layer, each step rounded to float32 (s_x the activation scale, s_w the weight scale of output
channel c):

    y = float32(accumulator) * s[c] + bias[c],    s[c] = s_x * s_w[c]                            (1)

Weights stay floats that can be trained: what is computed from them is kept until they change. A network in another
type than float32 goes on in its own: y is rounded to it at the end.

Chapter: 04, "What happens inside one layer?"
"""

from axmoe_lite.layers.modules import ApproxConv2d, ApproxLinear, ApproxMatmul, Matmul
from axmoe_lite.layers.network import (
    Assignment,
    Choice,
    approximable,
    approximate,
    assignment_of,
    chosen_multiplier,
    default_layers,
    evaluating,
    restore,
)

__all__ = [
    "ApproxConv2d",
    "ApproxLinear",
    "ApproxMatmul",
    "Assignment",
    "Choice",
    "Matmul",
    "approximable",
    "approximate",
    "assignment_of",
    "chosen_multiplier",
    "default_layers",
    "evaluating",
    "restore",
]
