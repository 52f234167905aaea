"""Networks of the papers, written plainly, and the weights that others have trained for them.

    factories   resnet8, resnet20, resnet56, vgg11_bn, vgg19_bn, mobilenet_v2, vit_small
    resnet      He et al. for CIFAR
    vgg         Simonyan & Zisserman for CIFAR
    mobilenet   Sandler et al., for 32, 64 and 224 pixels
    vit         Dosovitskiy et al., for Tiny ImageNet
    topology    upcycle: the same networks as Hard, Soft and Cluster mixtures of experts
    foreign     load_weights: timm's, torchvision's and the CIFAR zoo's files
    yours       build_network: a network of yours from a Python file
    library     import_torchvision

Layer names are those of the public checkpoints (the CIFAR model zoo's ``layer2.0.conv1`` and
``features.4``, torchvision's ``features.1.conv.0.0``, timm's ``blocks.0.attn.qkv``), because an
assignment speaks of layers by name.
The same seed gives the same weights, and leaves torch's own random numbers alone. Every factory takes
``topology`` with the options of :func:`upcycle`, and most a ``width``, the share of the published channels.

    resnet20(classes=100, topology="hard", experts=4, r=0.5)

Chapter: 05, "What happens to a network?"
"""

from axmoe_lite.models.factories import mobilenet_v2, resnet8, resnet20, resnet56, vgg11_bn, vgg19_bn, vit_small
from axmoe_lite.models.foreign import Loaded, load_weights
from axmoe_lite.models.library import import_torchvision
from axmoe_lite.models.mobilenet import InvertedResidual, MobileNetV2
from axmoe_lite.models.resnet import BasicBlock, PadShortcut, ResNet
from axmoe_lite.models.topology import TOPOLOGIES, eligible, upcycle
from axmoe_lite.models.vgg import VGG
from axmoe_lite.models.vit import Matmul, ViT
from axmoe_lite.models.yours import build_network

__all__ = [
    "TOPOLOGIES",
    "VGG",
    "BasicBlock",
    "InvertedResidual",
    "Loaded",
    "Matmul",
    "MobileNetV2",
    "PadShortcut",
    "ResNet",
    "ViT",
    "build_network",
    "eligible",
    "import_torchvision",
    "load_weights",
    "mobilenet_v2",
    "resnet8",
    "resnet20",
    "resnet56",
    "upcycle",
    "vgg11_bn",
    "vgg19_bn",
    "vit_small",
]
