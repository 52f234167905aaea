"""Networks to freeze, and what a frozen one must be equal to."""

import pytest
import torch
from torch import nn

from axmoe_lite import Multiplier, approximate
from axmoe_lite.kernels import int8
from axmoe_lite.pipeline import freeze

needs_units = pytest.mark.skipif(not int8.available(), reason="this processor's int8 units are not used")
evidence = pytest.mark.trust("law", "frozen networks: chosen networks, and ways to write them")

ROUGH = "mul8s_1L2J"  # rank 1: clears the lowest bit of both operands
MANY = "mul8s_1KVA"  # more than one term


class Net(nn.Module):
    """A forward written next to the test that it belongs to: ``Net(forward, name=module, ...)``."""

    def __init__(self, steps, **parts):
        super().__init__()
        self.steps = steps
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.steps(self, x)


def conv(c_in=4, out=4, kernel=3, **options):
    return nn.Conv2d(c_in, out, kernel, **{"padding": kernel // 2, **options})


def random_table(seed, rank=2, largest=9):
    """Factors that are no masks but fit bytes; u(a) may be negative where a is not."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-largest, largest + 1, (256, rank), generator=generator)
    return Multiplier("random", u @ torch.randint(-largest, largest + 1, (rank, 256), generator=generator))


def settle(network, seed=0):
    """Statistics as after training: no mean 0, no variance 1, and some gains below 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.running_mean.shape
            module.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            if module.weight is not None:
                module.weight.data.copy_(torch.randn(size, generator=generator) * 0.4 + 0.8)
                module.bias.data.copy_(torch.randn(size, generator=generator) * 0.3)
    return network.eval()


def frozen_of(network, x, assignment=ROUGH, **options):
    return freeze(approximate(settle(network), assignment, calibration=x, **options))


def check(network, x, assignment=ROUGH, *, same=True, **options):
    """Frozen, law and network agree: in every bit, or (same=False: BatchNorm is folded) in nearly all values."""
    frozen = frozen_of(network, x, assignment, **options)
    law = frozen.law(x)
    assert torch.equal(frozen(x), law)
    assert torch.equal(frozen(x), law), "a second call finds the buffers of the first"
    with torch.no_grad():
        y = network(x)
    if same:
        assert torch.equal(law, y)
    else:
        assert (law - y).norm() < 0.02 * y.norm()
    return frozen
