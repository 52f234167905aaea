"""How each architecture is trained at each stage of the study; options of ``fit``.

Chapter: 08, "Can a network learn its new arithmetic?"
"""

from torch import nn

from axmoe_lite.models import ViT
from axmoe_lite.moe import check_option

STAGES = ("train", "upcycle", "retrain")

CONVOLUTIONAL = {"optimiser": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128}
TRANSFORMER = {"optimiser": "adamw", "momentum": 0.9, "weight_decay": 0.05, "batch_size": 128, "clip_norm": 1.0}
RATES = {  # peak learning rate of each stage, and the epochs of its warm-up
    "train": {"cnn": (0.1, 1.0), "vit": (5e-4, 5.0)},
    "upcycle": {"cnn": (0.05, 0.5), "vit": (1e-4, 0.5)},
    "retrain": {"cnn": (0.1, 0.5), "vit": (1e-4, 0.5)},
}


def recipe(network: nn.Module, *, stage: str) -> dict:
    """Options of :func:`~axmoe_lite.train.fit` for a network's architecture; the epochs are yours to say.

    From AxMoE (as summarised to us): retraining by SGD with lr 0.1, weight decay 5e-4 and batches of 128. Not from the
    paper: momentum 0.9, warm-up, a cosine to 0, all of exact training, and AdamW at 1e-4 with gradients cut at length
    1 for retraining transformers, because SGD at 0.1 is not how they are trained.

    Args:
        stage: ``"train"`` (from fresh weights), ``"upcycle"`` (mixtures whose experts begin as copies) or ``"retrain"``
            (under approximate products).

    >>> from axmoe_lite import models
    >>> recipe(models.vgg11_bn(classes=10), stage="retrain")["lr"]
    0.1
    """
    check_option("stage", stage, STAGES)
    kind = "vit" if any(isinstance(module, ViT) for module in network.modules()) else "cnn"
    lr, warmup_epochs = RATES[stage][kind]
    return {**(TRANSFORMER if kind == "vit" else CONVOLUTIONAL), "lr": lr, "warmup_epochs": warmup_epochs}
