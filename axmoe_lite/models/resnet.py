"""The CIFAR ResNets of He et al. (2016), section 4.2, with the public CIFAR model zoo's layer names.

Letters: N images, C channels, H x W pixels.

Chapter: 05, "What happens to a network?"
"""

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way around them; [N, C_in, H, W] to [N, C, H / stride, W / stride].

    Args:
        shortcut: what carries the input around when the shape changes. ``"projection"`` is a 1x1
            convolution with BatchNorm; ``"pad"`` drops pixels and appends zero channels, and has no
            weights to approximate.
    """

    def __init__(self, c_in: int, c: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU()
        if stride == 1 and c_in == c:
            self.downsample = nn.Identity()
        elif shortcut == "projection":
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c))
        else:
            self.downsample = PadShortcut(stride, c - c_in)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class PadShortcut(nn.Module):
    """He et al.'s option A: every ``stride``-th pixel, and ``extra`` zero channels at the end."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra))


class ResNet(nn.Module):
    """A CIFAR ResNet of 6 n + 2 layers: [N, 3, H, W] to class scores [N, classes].

    Args:
        blocks: n, the residual blocks in each of the three stages (16, 32 and 64 channels).
        classes: number of classes.
        shortcut: ``"projection"`` or ``"pad"``, see :class:`BasicBlock`.
        channels: of the three stages.
    """

    def __init__(self, blocks: int, classes: int, shortcut: str, channels: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(first, first, 1, blocks, shortcut)
        self.layer2 = self._stage(first, second, 2, blocks, shortcut)
        self.layer3 = self._stage(second, third, 2, blocks, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(c_in: int, c: int, stride: int, blocks: int, shortcut: str) -> nn.Sequential:
        first = BasicBlock(c_in, c, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(c, c, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))
