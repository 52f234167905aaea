"""What the tests of mixtures share: a gateway that obeys the images, networks to send them to, and who looked."""

import torch
from torch import nn

from axmoe_lite import moe


class Planted(nn.Module):
    """A gateway without weights: an image's first number is the number of its expert."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return nn.functional.one_hot(x.flatten(1)[:, 0].long(), self.experts).float()


def planted(choice, *shape):
    """Images [I, *shape] that :class:`Planted` sends to these experts."""
    x = torch.randn(len(choice), *shape, generator=torch.Generator().manual_seed(len(choice)))
    if len(choice):
        x.flatten(1)[:, 0] = torch.tensor(choice).float()
    return x


def rows_seen(network):
    """For each expert of each mixture, by name, the sizes of the batches it is called with from now on."""
    seen = {}
    for name, layer in moe.mixtures(network).items():
        for e, expert in enumerate(layer.experts):
            calls = seen.setdefault(f"{name}.experts.{e}".lstrip("."), [])
            expert.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(len(args[0])))
    return seen


def networks(n):
    torch.manual_seed(n)
    return [nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5)) for _ in range(n)]
