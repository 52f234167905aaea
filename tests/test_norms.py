"""Refreshed norms: averages of BatchNorm under the products a network has now, and nothing else."""

import copy

import pytest
import torch
from torch import nn

from axmoe_lite import datasets, models, moe, train


@pytest.fixture(scope="module")
def images():
    return datasets.synthetic(classes=3, size=8, n_train=40, n_test=4)


def test_averages_are_those_of_the_batches_and_weights_stay(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 3))
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    assert train.refresh_norms(network, images, n=40, batch_size=20, augment="none") is network
    seen = network[0](images.normalised(images.x_train))
    assert torch.allclose(network[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    variances = torch.stack([half.var((0, 2, 3)) for half in seen.split(20)]).mean(0)
    assert torch.allclose(network[1].running_var, variances, rtol=1e-4)
    assert network[1].momentum == 0.1 and not network[1].training and network[2].training
    for name, value in network.state_dict().items():
        assert "running" in name or "tracked" in name or torch.equal(value, before[name])


def test_images_are_augmented_as_in_training_and_seeded(images):
    def averages(**options):
        network = nn.Sequential(nn.BatchNorm2d(3))
        return train.refresh_norms(network, images, **options)[0].running_mean

    plain, cropped = averages(augment="none"), averages(augment="crop")
    assert torch.equal(cropped, averages(augment="crop")) and not torch.equal(cropped, averages(augment="crop", seed=1))
    black = ((torch.zeros(3) / 255 - torch.tensor(images.mean)) / torch.tensor(images.std)).double()
    assert (cropped < plain).all() and (cropped > black).all(), "borders are black"
    with pytest.raises(ValueError, match="augment"):
        averages(augment="crops")


def test_gates_gateways_and_idle_experts_keep_theirs(images):
    dense = models.resnet8(classes=3, width=1 / 4)
    gateway = nn.Sequential(models.resnet8(classes=2, width=1 / 4))
    gateway[0].fc.bias.data[:] = torch.tensor([100.0, -100.0])  # all images go to the first expert
    network = models.upcycle(dense, topology="cluster", experts=2, gateway=gateway)
    before = copy.deepcopy(network.state_dict())
    train.refresh_norms(network, images)
    changed = {n for n, v in network.state_dict().items() if "running" in n and not torch.equal(v, before[n])}
    assert changed and all(name.startswith("experts.0.") for name in changed)
    hard = models.upcycle(dense, topology="hard", experts=2, gate="standardised")
    inside = {norm for gate in hard.modules() if isinstance(gate, moe.Gate) for norm in gate.modules()}
    assert not inside & set(train.norms_of(hard)) and len(train.norms_of(hard)) == len(train.norms_of(dense))


def test_averages_survive_a_pass_that_fails(images):
    network = models.resnet8(classes=3, width=1 / 4)
    network(images.normalised(images.x_train))  # averages that are not those of a fresh network
    before = copy.deepcopy(network.state_dict())

    def interrupted(*_):
        raise KeyboardInterrupt

    network.layer3.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.refresh_norms(network, images)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {norm.momentum for norm in train.norms_of(network)} == {0.1} and network.training


def test_a_network_without_norms_is_refused(images):
    with pytest.raises(ValueError, match="no BatchNorm that keeps averages"):
        train.refresh_norms(models.vit_small(classes=3, image_size=8, patch=4, width=1 / 8), images)
