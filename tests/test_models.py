"""The networks are the published ones: sizes, names, shapes."""

import pytest
import torch
from torch import nn

from axmoe_lite.models import PadShortcut, resnet8, resnet20


def macs(network, size=32):
    """Multiply-adds of one image, counted from the shapes that really pass."""
    total = []

    def count(module, inputs, output):
        weights = module.weight[0].numel()
        total.append(weights * output[0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network.eval()(torch.zeros(1, 3, size, size))
    return sum(total)


def test_resnet20_has_the_published_size():
    assert round(macs(resnet20(classes=100)) / 1e6, 2) == 40.82


def test_resnet20_is_named_like_the_model_zoo():
    names = [name for name, m in resnet20(classes=10).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"] and names[-1] == "fc" and len(names) == 22
    assert "layer2.0.downsample.0" in names


def test_resnet8_has_seven_convolutions_and_no_projection():
    convolutions = [m for m in resnet8(classes=10).modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16, 16, 16, 32, 32, 64, 64]
    assert all(c.kernel_size == (3, 3) for c in convolutions)


@pytest.mark.parametrize("make", [resnet8, resnet20])
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_shapes_for_odd_sizes(make, shortcut):
    network = make(classes=7, shortcut=shortcut).eval()
    for n, side in ((1, 32), (2, 23), (3, 9)):
        assert network(torch.zeros(n, 3, side, side)).shape == (n, 7)


def test_the_padded_shortcut_by_hand():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    y = PadShortcut(2, 2)(x)
    assert y.flatten().tolist() == [0, 4, 0, 0]  # the top left pixel of each channel, then two empty channels


def test_seeds_decide_the_weights_and_nothing_else():
    torch.manual_seed(5)
    one, state = resnet8(classes=3, seed=1), torch.random.get_rng_state()
    two, other = resnet8(classes=3, seed=1), resnet8(classes=3, seed=2)
    assert torch.equal(one.conv1.weight, two.conv1.weight) and not torch.equal(one.conv1.weight, other.conv1.weight)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are left alone"


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="'conv'.*'projection' or 'pad'"):
        resnet20(classes=10, shortcut="conv")
    with pytest.raises(ValueError, match="classes is 0"):
        resnet20(classes=0)
