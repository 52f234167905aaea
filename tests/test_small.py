"""Convolutions as matrix products: the same sums, rounded once, in training and in backward passes."""

import pytest
import torch
from torch import nn

from axmoe_lite.layers import approximate, small


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever test ran before."""
    torch.manual_seed(0)


@pytest.fixture
def library(monkeypatch):
    """The library's own convolution, to compare with."""
    monkeypatch.setattr(small, "FEWEST_WEIGHTS", 1)
    return lambda x, w: nn.functional.conv2d(x, w, padding=1)


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (700, 2, 1, 1), (2, 8, 2, 7), (33, 4, 5, 5)])
def test_a_convolution_and_its_gradients_are_the_librarys(shape, library):
    x = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    w = torch.randn(6, shape[1], 3, 3, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(shape[0], 6, *shape[2:], dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    want = torch.autograd.grad(y := library(*exact), exact, grad.double())
    got = small.gradients(grad, x.detach(), w.detach(), (True, True))
    for found, wanted in zip((small.convolution(x.detach(), w.detach()), *got), (y, *want), strict=True):
        assert found.shape == wanted.shape and found.dtype == torch.bfloat16
        assert (found - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    assert small.gradients(grad, x.detach(), w.detach(), (False, False)) == (None, None)


def test_only_few_positions_of_plain_3x3_kernels_suit(library):
    plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    x, w = torch.zeros(4, 8, 4, 4, dtype=torch.bfloat16), torch.zeros(8, 8, 3, 3, dtype=torch.bfloat16)
    assert small.suits(x, w, **plain)
    assert not small.suits(x.float(), w, **plain) and not small.suits(x, w[..., :1], **plain)
    assert not small.suits(x.expand(4, 8, 4, 4).repeat(64, 1, 1, 1), w, **plain)
    for name, value in (("stride", (2, 2)), ("padding", (0, 0)), ("dilation", (2, 2)), ("groups", 2)):
        assert not small.suits(x, w, **plain | {name: value})


def test_within_the_block_a_network_trains_alike_and_after_it_is_as_before(library, monkeypatch):
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding="same"))
    x, calls, whole = torch.randn(3, 4, 4, 4), [], small.convolution
    monkeypatch.setattr(small, "convolution", lambda *a: calls.append(1) or whole(*a))

    def gradients():
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        y.float().square().mean().backward()
        return [p.grad.clone() for p in network.parameters()]

    usual = gradients()
    with small.small_convolutions(network):
        assert not calls
        own = gradients()
        assert len(calls) == 1  # the images need no gradient, and the second convolution has its padding in words
        network(x)
        assert len(calls) == 1  # not in float32
    assert "_conv_forward" not in vars(network[0])
    for a, b in zip(usual, own, strict=True):
        assert (a - b).abs().max() <= 0.02 * a.abs().max()


def test_an_approximate_layers_backward_pass_takes_it_and_gets_the_same(monkeypatch):
    layer = nn.Conv2d(4, 8, 3, padding=1)
    x, calls, whole = torch.randn(3, 4, 4, 4), [], small.gradients
    approximate(network := nn.Sequential(layer, nn.Flatten()), "mul8s_1L2L", calibration=x)
    monkeypatch.setattr(small, "gradients", lambda *a: calls.append(1) or whole(*a))

    def gradients(fewest):
        monkeypatch.setattr(small, "FEWEST_WEIGHTS", fewest)
        network.zero_grad()
        images = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = network(images)
        y.float().square().mean().backward()
        return [images.grad, *(p.grad.clone() for p in network.parameters())]

    library, own = gradients(10**9), gradients(1)
    assert len(calls) == 1
    for a, b in zip(library, own, strict=True):
        assert a.abs().max() > 0 and (a - b).abs().max() <= 0.02 * a.abs().max()
