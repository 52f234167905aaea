"""MobileNetV2 of Sandler et al. (2018), table 2, with torchvision's parameter names.

Seventeen inverted residuals: a 1x1 convolution widens, a 3x3 convolution of one channel each filters, and a
1x1 convolution narrows again with no ReLU after it. Most products are in the 1x1 convolutions.

Letters: N images, C channels, H x W pixels; t, c, n as in the paper's table.

Chapter: 05, "What happens to a network?"
"""

from torch import Tensor, nn

STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""t: how much wider a block is inside; c: its output channels; n: how many blocks follow each other."""

STRIDES = {"imagenet": (2, 1, 2, 2, 2, 1, 2, 1), "small": (1, 1, 1, 2, 2, 1, 2, 1)}
"""Of the first convolution, then of the first block of each stage."""


class InvertedResidual(nn.Module):
    """Widen, filter, narrow; [N, C_in, H, W] to [N, C, H / stride, W / stride]. The paper's table 1.

    What came in is added at the end where the shape has not changed.

    Args:
        expand: t; at 1 there is nothing to widen and the first convolution is left out.
    """

    def __init__(self, c_in: int, c: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = expand * c_in
        widen = [] if expand == 1 else [_conv_bn_relu6(c_in, hidden, 1)]
        filtered = _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*widen, filtered, nn.Conv2d(hidden, c, 1, bias=False), nn.BatchNorm2d(c))
        self.adds = stride == 1 and c_in == c

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """A convolution, seven stages of inverted residuals, a 1x1 convolution; [N, 3, H, W] to scores [N, classes].

    Args:
        classes: number of classes.
        strides: of the first convolution and of the seven stages.
    """

    def __init__(self, classes: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        c_in = 32
        layers: list[nn.Module] = [_conv_bn_relu6(3, c_in, 3, strides[0])]
        for (expand, c, blocks), stride in zip(STAGES, strides[1:], strict=True):
            for block in range(blocks):
                layers.append(InvertedResidual(c_in, c, 1 if block else stride, expand))
                c_in = c
        self.features = nn.Sequential(*layers, _conv_bn_relu6(c_in, 1280, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _conv_bn_relu6(c_in: int, c: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(c_in, c, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c), nn.ReLU6())
