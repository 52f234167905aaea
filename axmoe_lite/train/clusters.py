"""From a classifier to the gateway of a cluster: which images belong together, and how to tell.

Chapter: 07, "What if only some of the network answers?"
"""

import copy

import torch
from torch import Tensor, nn

from axmoe_lite.datasets import Images
from axmoe_lite.layers import evaluating
from axmoe_lite.layers.modules import first_input
from axmoe_lite.moe import GroupedScores, check_option

CLUSTERS = ("features", "classes")


@torch.no_grad()
def gateway_of(
    classifier: nn.Module, images: Images, *, experts: int, by: str = "features", n: int = 10_000, seed: int = 0
) -> nn.Module:
    """The gateway of a :class:`~axmoe_lite.moe.ClusterMoE`, made from a network trained on the classes.

    ``"features"``: k-means on what the classifier's last linear layer receives. The nearest centre c of a feature
    vector f has the largest 2 c.f - |c|^2, so the gateway is the classifier with that as its last layer: nothing is
    trained.
    ``"classes"``: k-means on the mean features of each class; an image goes to the cluster in which its class most
    probably lies. Not from the paper: both; its gateway is only known by its cost.

    Args:
        classifier: [N, C, H, W] to class scores; it ends in an ``nn.Linear``. It stays as it is.
        experts: E, the number of clusters.
        n: training images to look at, at even steps.
        seed: of k-means (scikit-learn's, the best of ten starts).

    Returns:
        A module from [N, C, H, W] to scores [N, E].

    Raises:
        ValueError: for a network without a linear layer, or fewer images or classes than clusters.

    >>> from axmoe_lite import datasets, models
    >>> images = datasets.synthetic(classes=3, size=8, n_train=40, n_test=4)
    >>> gateway_of(models.resnet8(classes=3), images, experts=2)(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 2])
    """
    from sklearn.cluster import KMeans

    check_option("by", by, CLUSTERS)
    some = images.subset(n_train=n)
    have = len(images.classes) if by == "classes" else len(some.x_train)
    if not 1 <= experts <= have:
        raise ValueError(f"{experts} clusters were asked for; there are {have} {by} to group, so 1 to {have} will do.")
    classifier = copy.deepcopy(classifier).eval()
    name, last = _last_linear(classifier)
    features = _inputs_of(last, classifier, some)
    if by == "classes":
        features = torch.stack([features[some.y_train.cpu() == c].mean(0) for c in range(len(images.classes))])
        if not features.isfinite().all():
            raise ValueError(f"Some classes have no image among the {len(some.x_train)} looked at; raise n.")
    found = KMeans(experts, n_init=10, random_state=seed).fit(features.double().numpy())
    if by == "classes":
        return nn.Sequential(classifier, GroupedScores(found.labels_.tolist()).to(last.weight.device))
    centres = torch.from_numpy(found.cluster_centers_)
    head = nn.Linear(last.in_features, experts)
    head.weight.copy_(2 * centres)
    head.bias.copy_(-(centres**2).sum(1))
    parent, _, leaf = name.rpartition(".")
    setattr(classifier.get_submodule(parent), leaf, head.to(last.weight.device))
    return classifier


def _last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not found or not found[-1][0]:
        raise ValueError(
            f"This {type(network).__name__} has no linear layer inside it whose inputs could be clustered; give a"
            " classifier that ends in one."
        )
    return found[-1]


def _inputs_of(layer: nn.Module, network: nn.Module, images: Images) -> Tensor:
    """What the layer receives for the training images: [N, D], on the CPU."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, named: seen.append(first_input(args, named).flatten(1).cpu()), with_kwargs=True
    )
    device = next(network.parameters()).device
    try:
        with evaluating(network):
            for x in images.x_train.split(250):
                network(images.normalised(x.to(device)).contiguous(memory_format=torch.channels_last))
    finally:
        hook.remove()
    return torch.cat(seen)
