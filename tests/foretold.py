"""What the tests of AGN share: four circuits, a network of unequal layers, and operands that can be counted by hand."""

import torch
from torch import nn

from axmoe_lite import models
from axmoe_lite.search.predict import Operands
from axmoe_lite.train import fit

FOUR = ["mul8s_1KV6", "mul8s_1KVM", "mul8s_1L2J", "mul8s_1L2L"]


def learned(textures):
    """A ResNet-8 that was trained a little: quick to approximate, and better than chance."""
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    fit(network, textures, epochs=3, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


class Two(nn.Module):
    """Two layers on the same images, one with a hundred times the multiplications; noise costs next to nothing."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.few, self.many = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 100, 1)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(101, 4))

    def forward(self, x):
        return self.head(torch.cat([self.few(x), self.many(x)], dim=1).mul(1e-6))


def shares(*weights):
    """[Q] from pairs of code and share."""
    found = torch.zeros(256, dtype=torch.float64)
    for code, share in weights:
        found[code + 128] = share
    return found


MIXED = Operands(
    patches=torch.stack(
        [shares((0, 0.5), (3, 0.5)), shares((-7, 0.25), (90, 0.75)), shares((5, 1.0)), shares((0, 0.9), (127, 0.1))]
    ),
    weights=shares((-31, 0.2), (1, 0.5), (77, 0.3)),
    fan_in=18,
    signal=1.0,
)
