"""Networks of the papers, written plainly.

    resnet    resnet8, resnet20: He et al. for CIFAR
    vgg       vgg11_bn, vgg19_bn: Simonyan & Zisserman for CIFAR
    vit       vit_small: Dosovitskiy et al., for Tiny ImageNet

Layer names are those of the public checkpoints (the CIFAR model zoo's ``layer2.0.conv1`` and
``features.4``, timm's ``blocks.0.attn.qkv``), because an assignment speaks of layers by name.
The same seed gives the same weights, and leaves torch's own random numbers alone.

Chapter: 05, "What happens to a network?"
"""

from axmoe_lite.models.resnet import BasicBlock, PadShortcut, ResNet, resnet8, resnet20
from axmoe_lite.models.vgg import VGG, vgg11_bn, vgg19_bn
from axmoe_lite.models.vit import Matmul, ViT, vit_small

__all__ = [
    "VGG",
    "BasicBlock",
    "Matmul",
    "PadShortcut",
    "ResNet",
    "ViT",
    "resnet8",
    "resnet20",
    "vgg11_bn",
    "vgg19_bn",
    "vit_small",
]
