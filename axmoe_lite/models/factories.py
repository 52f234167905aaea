"""The networks of the papers by name: seeded, laid out for speed, and in their topology.

    resnet20(classes=100)                                    dense
    vgg11_bn(classes=100, topology="hard", experts=4)        the same as a mixture, see :func:`upcycle`

Chapter: 05, "What happens to a network?"
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from axmoe_lite.models.mobilenet import STRIDES, MobileNetV2
from axmoe_lite.models.resnet import ResNet
from axmoe_lite.models.topology import seeded, upcycle
from axmoe_lite.models.vgg import VGG, WIDTHS
from axmoe_lite.models.vit import ViT

NARROWEST = 16  # channels: see _resnet()


def resnet20(
    *,
    classes: int,
    seed: int = 0,
    shortcut: str = "projection",
    width: float = 1.0,
    topology: str = "dense",
    **mixture: Any,
) -> nn.Module:
    """ResNet-20 for 32x32 images: 40.82 M MACs and 0.28 M parameters at 100 classes.

    AxMoE's dense reference has the size of the public model zoo's network, whose shortcuts are 1x1
    projections; He et al. pad instead (``shortcut="pad"``).

    >>> sum(p.numel() for p in resnet20(classes=100).parameters())
    278324
    """
    return _resnet(3, classes, seed, shortcut, width, topology, mixture)


def resnet56(
    *,
    classes: int,
    seed: int = 0,
    shortcut: str = "projection",
    width: float = 1.0,
    topology: str = "dense",
    **mixture: Any,
) -> nn.Module:
    """ResNet-56 for 32x32 images: 125.75 M MACs and 0.86 M parameters at 100 classes.

    AxMoE's gateway in front of the CNNs costs 125.8 M MACs, which is this network's size (deduced, not from
    the paper).

    >>> sum(p.numel() for p in resnet56(classes=100).parameters())
    861620
    """
    return _resnet(9, classes, seed, shortcut, width, topology, mixture)


def resnet8(
    *,
    classes: int,
    seed: int = 0,
    shortcut: str = "pad",
    width: float = 1.0,
    topology: str = "dense",
    **mixture: Any,
) -> nn.Module:
    """ResNet-8, the network of ALWANN and MAx-DNN: 7 convolutions (16-16-32-64) and a classifier.

    Seven convolutions leave no room for projections, hence the padded shortcuts by default.

    >>> sum(isinstance(m, nn.Conv2d) for m in resnet8(classes=10).modules())
    7
    """
    return _resnet(1, classes, seed, shortcut, width, topology, mixture)


def _resnet(
    blocks: int, classes: int, seed: int, shortcut: str, width: float, topology: str, mixture: dict
) -> nn.Module:
    if shortcut not in ("projection", "pad"):
        raise ValueError(f"shortcut is {shortcut!r}; it can be 'projection' or 'pad'.")
    if type(classes) is not int or classes < 1:
        raise ValueError(f"classes is {classes!r}; a classifier needs a whole number of them, at least 1.")
    channels = scaled((16, 32, 64), width)
    if shortcut == "projection" and channels[0] < NARROWEST:
        raise ValueError(
            f"width = {width} leaves {channels[0]} channels before a 1x1 shortcut of stride 2. Below {NARROWEST}, torch"
            " 2.13 writes outside its memory when it trains one on several threads; use shortcut='pad'."
        )
    return finish(lambda: ResNet(blocks, classes, shortcut, channels), seed=seed, topology=topology, options=mixture)


def vgg11_bn(*, classes: int, seed: int = 0, width: float = 1.0, topology: str = "dense", **mixture: Any) -> nn.Module:
    """VGG-11 with BatchNorm for 32x32 images: 8 convolutions, 153.34 M MACs, 9.80 M parameters at 100 classes.

    The MACs are those of the convolutions and the three linear layers (512, 512, classes); at 10 classes
    they are 153.29 M.

    >>> network = vgg11_bn(classes=100)
    >>> sum(p.numel() for p in network.parameters())
    9802596
    >>> network.classifier[6]
    Linear(in_features=512, out_features=100, bias=True)
    """
    return _vgg((1, 1, 2, 2, 2), classes, seed, width, topology, mixture)


def vgg19_bn(*, classes: int, seed: int = 0, width: float = 1.0, topology: str = "dense", **mixture: Any) -> nn.Module:
    """VGG-19 with BatchNorm for 32x32 images: 16 convolutions, 398.71 M MACs, 20.61 M parameters at 100 classes.

    The MACs are counted as for :func:`vgg11_bn`; at 10 classes they are 398.66 M.

    >>> sum(p.numel() for p in vgg19_bn(classes=100).parameters())
    20612004
    """
    return _vgg((2, 2, 4, 4, 4), classes, seed, width, topology, mixture)


def _vgg(
    convolutions: tuple[int, int, int, int, int], classes: int, seed: int, width: float, topology: str, mixture: dict
) -> nn.Module:
    if classes < 1:
        raise ValueError(f"classes is {classes}; a classifier needs at least 1.")
    widths = scaled(WIDTHS, width)
    return finish(lambda: VGG(convolutions, classes, widths), seed=seed, topology=topology, options=mixture)


def mobilenet_v2(
    *, classes: int, seed: int = 0, strides: str = "small", topology: str = "dense", **mixture: Any
) -> nn.Module:
    """MobileNetV2 of width 1: 52 convolutions, 2.35 M parameters and 88.09 M MACs at 100 classes of 32x32 pixels.

    Weights start as torchvision's do. Of the 2,480,072 parameters at 200 classes 34,112 are BatchNorm's gammas
    and betas; QoS-Nets keeps two further sets of those, which is its 2.75 % overhead.

    Args:
        classes: number of classes.
        seed: decides the weights.
        strides: ``"small"`` for 32 and 64 pixels, where the first convolution and the second stage keep the
            resolution (a stride of 1 for 2), as in the CIFAR model zoo; ``"imagenet"`` for 224, as in the paper:
            300.77 M MACs there at 1,000 classes. The weights are of the same shapes.

    Raises:
        ValueError: for unknown strides, or no classes.

    >>> import torch
    >>> network = mobilenet_v2(classes=200)
    >>> sum(p.numel() for p in network.parameters())
    2480072
    >>> sum(p.numel() for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    34112
    >>> network.features[:18](torch.zeros(1, 3, 64, 64)).shape  # an eighth; "imagenet" leaves a 32nd
    torch.Size([1, 320, 8, 8])
    """
    if strides not in STRIDES:
        raise ValueError(f"strides is {strides!r}; it can be 'small' (32 and 64 pixels) or 'imagenet' (224).")
    if classes < 1:
        raise ValueError(f"classes is {classes}; a classifier needs at least 1.")
    return finish(lambda: MobileNetV2(classes, STRIDES[strides]), seed=seed, topology=topology, options=mixture)


def vit_small(
    *,
    classes: int,
    image_size: int = 224,
    patch: int = 16,
    seed: int = 0,
    width: float = 1.0,
    topology: str = "dense",
    **mixture: Any,
) -> nn.Module:
    """ViT-Small/16: D = 384, 12 blocks of 6 heads, MLP ratio 4; a state dict of timm's vit_small_patch16_224 fits.

    How the published 4.25 G MACs at 224x224 arise: 4.241 G in the convolution and the linear layers (of it
    4.183 G in the blocks), and 0.009 G because a profiler (fvcore) counts 5 for each number that enters a
    LayerNorm. The products of attention are not in it; with their 0.358 G it is 4.61 G, timm's own figure.

    >>> sum(p.numel() for p in vit_small(classes=1000).parameters())  # 22.05 M, as timm says
    22050664
    """
    heads = 6
    (per_head,) = scaled((64,), width)
    options = {"dim": heads * per_head, "depth": 12, "heads": heads, "classes": classes}
    options |= {"image_size": image_size, "patch": patch}
    return finish(lambda: ViT(**options), seed=seed, topology=topology, options=mixture)


# ---------------------------------------------------------------------------------- pieces


def scaled(channels: tuple[int, ...], width: float) -> tuple[int, ...]:
    """Each number times ``width``, at least 1: narrow networks for tests and quick runs, not from the papers."""
    if not width > 0:
        raise ValueError(f"width is {width}; it is the share of the published channels, above 0.")
    return tuple(max(1, round(c * width)) for c in channels)


def finish(make: Callable[[], nn.Module], *, seed: int, topology: str, options: dict[str, Any]) -> nn.Module:
    """What every factory does with a network: seed it, lay it out for speed, and put it into its topology."""
    return upcycle(seeded(make, seed).to(memory_format=torch.channels_last), topology=topology, seed=seed, **options)
