"""The VGG networks of Simonyan & Zisserman (2015), table 1, columns A and E, as the CIFAR model zoo has them.

Against the paper, the two linear layers of 4096 are of 512, because five poolings leave one pixel of a 32x32
image, and BatchNorm follows every convolution. Letters: N images, C channels, H x W pixels.

Chapter: 05, "What happens to a network?"
"""

from torch import Tensor, fx, nn

WIDTHS = (64, 128, 256, 512, 512)
SMALLEST = 2 ** len(WIDTHS)


@fx.wrap  # one step of a traced network: a tracer could not follow the comparison
def _check_size(x: Tensor) -> None:
    if min(x.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"This VGG was given images of {x.shape[-2]} x {x.shape[-1]} pixels and halves them five times;"
            f" it needs at least {SMALLEST} x {SMALLEST}. Enlarge them, or take a ResNet."
        )


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ending in a pooling; [N, 3, H, W] to class scores [N, classes].

    Layers are numbered as they come (``features.0``, ``classifier.6``), so that checkpoints of the zoo fit.

    Args:
        convolutions: how many in each of the five stages (of 64, 128, 256, 512 and 512 channels).
        classes: number of classes.
        widths: channels of the five stages; the linear layers are as wide as the last.
    """

    def __init__(
        self, convolutions: tuple[int, int, int, int, int], classes: int, widths: tuple[int, ...] = WIDTHS
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for c, repeats in zip(widths, convolutions, strict=True):
            for _ in range(repeats):
                # The bias is idle before BatchNorm; it is there because the zoo's checkpoints have it.
                layers += [nn.Conv2d(c_in, c, 3, 1, 1), nn.BatchNorm2d(c), nn.ReLU()]
                c_in = c
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        # Not in the zoo: at 32x32 one pixel is left and this does nothing; larger images need it.
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(c, c), nn.ReLU(), nn.Dropout(),
            nn.Linear(c, c), nn.ReLU(), nn.Dropout(),
            nn.Linear(c, classes),
        )  # fmt: skip
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
