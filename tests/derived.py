"""Layers with given scales, what they are differentiated as, and images of all shapes."""

import pytest
import torch
from torch import nn

from axmoe_lite import layers, multiplier

evidence = pytest.mark.trust("law", "gradients: against autograd, and loops over the table")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(exact, name, scale_x, **options):
    """An approximate layer with a given activation scale."""
    kind = {nn.Conv2d: layers.ApproxConv2d, nn.Linear: layers.ApproxLinear, layers.Matmul: layers.ApproxMatmul}
    layer = kind[type(exact)](exact, multiplier(name), **options)
    for scale, value in zip(layer.SCALES, scale_x, strict=True):
        getattr(layer, scale).fill_(value)
    return layer


def backward(call, grad, *leaves):
    """The gradients that reach the leaves."""
    leaves = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(call(), leaves, grad)


def assert_close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() <= tolerance * expected.norm().clamp_min(1e-6)


CONVOLUTIONS = [
    # shape of x, outputs, kernel, options
    ((2, 3, 9, 7), 4, 3, {"padding": 1}),
    ((1, 1, 1, 1), 1, 1, {}),
    ((2, 6, 8, 5), 9, (3, 2), {"stride": (2, 1), "padding": (0, 2), "groups": 3, "bias": False}),
    ((3, 23, 5, 5), 23, 3, {"groups": 23, "padding": 2, "dilation": 2}),
    ((1, 115, 2, 3), 2, 1, {"stride": 2}),
    ((2, 4, 6, 6), 3, 3, {"padding": 1, "padding_mode": "circular"}),
    ((2, 4, 6, 6), 3, (3, 5), {"padding": "same"}),
]
