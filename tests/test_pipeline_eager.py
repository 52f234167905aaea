"""What a frozen network leaves to torch, by name, and what it leaves alone."""

import copy
import pickle
import threading

import pytest
import torch
from frozen import MANY, ROUGH, Net, check, conv, evidence, frozen_of, needs_units, random_table, settle
from torch import nn

from axmoe_lite import approximate, kernels, models, restore
from axmoe_lite.layers import Matmul
from axmoe_lite.pipeline import freeze
from axmoe_lite.train import evaluate, fit, predict


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(5))


# ------------------------------------------------------------------------------ what stays eager


@needs_units
@evidence
def test_mixed_assignments(x):
    network = nn.Sequential(
        conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.Flatten(),
        nn.Linear(252, 2),
    )  # fmt: skip
    frozen = check(network, x, {"0": ROUGH, "5": MANY, "7": "swap:mul8s_1KVM"}, same=False)
    assert "3 convolutions" in repr(frozen) and "3" not in frozen.eager
    check(network, x, {"3": ROUGH, "9": MANY}, same=False)  # a classifier too


@needs_units
def test_high_ranks_and_wide_factors_stay_eager_by_name(x, monkeypatch):
    monkeypatch.setattr(kernels, "crossover_rank", lambda arithmetic: kernels.ALWAYS_FACTORED)
    network = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
    frozen = check(network, x, {"0": ROUGH, "2": "mitchell()", "4": "drum(4)"})
    assert set(frozen.eager) == {"2", "4"} and all("int8 units" in why for why in frozen.eager.values())
    assert "eager: 2, mitchell()" in repr(frozen)


@needs_units
def test_padding_that_the_units_do_not_know_stays_eager_by_name(x):
    network = nn.Sequential(
        conv(padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU(), conv()
    )
    assert set(check(network, x).eager) == {"0", "2"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_network_in_another_type_answers_in_it(x, dtype):
    network = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), Matmuls(), nn.Flatten(), nn.Linear(196, 2))
    approximate(settle(network), {"0": ROUGH, "3": ROUGH, "4.m": ROUGH, "6": ROUGH}, calibration=x)
    frozen, images = freeze(network.to(dtype)), x.to(dtype)
    with torch.no_grad():
        y = network(images)
    assert y.dtype == dtype and torch.equal(frozen(images), y) and torch.equal(frozen.law(images), y)
    assert set(frozen.eager) == {"0", "3"} and f"answers in {dtype}" in frozen.eager["0"]


@needs_units
def test_layers_that_are_given_their_input_by_name(x):
    def forward(net, x):
        y = torch.relu(net.norm(input=net.a(input=x)))
        return net.out(input=net.m(b=net.b(input=y), a=net.padded(input=y)).flatten(1))

    parts = {name: conv() for name in ("a", "b", "padded")} | {"norm": nn.BatchNorm2d(4), "m": Matmul()}
    parts["padded"].padding_mode = "circular"
    network = Net(forward, **parts, out=nn.Linear(4 * 49, 2))
    frozen = check(network, x[..., :7, :], dict.fromkeys(("a", "b", "padded", "m", "out"), ROUGH), same=False)
    assert "2 convolutions" in repr(frozen) and set(frozen.eager) == {"padded"}


def test_without_units_everything_stays_eager(x, monkeypatch):
    monkeypatch.setenv("AXMOE_INT8", "0")
    frozen = check(nn.Sequential(conv(), nn.ReLU(), conv()), x)
    assert set(frozen.eager) == {"0", "2"} and "0 convolutions" in repr(frozen)


@evidence
@pytest.mark.parametrize("signed", [False, True])
def test_factors_that_are_no_masks(x, signed):
    # Code 0 is no byte 0 here: the border is made of codes before the bytes are.
    middle = [] if signed else [nn.ReLU()]
    network = nn.Sequential(conv(), *middle, conv(padding=(2, 0)), *middle, conv(groups=2, stride=2))
    check(network, x, random_table(1))


@needs_units
def test_too_large_sums_for_a_zero_point_stay_eager_where_images_are_signed():
    # 600 * 127 * 255 > 2^24: signed images do not go to the units; those after a ReLU do.
    x = torch.randn(2, 600, 2, 2, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(conv(600, 600, 1), nn.ReLU(), conv(600, 3, 1))
    for layer in (network[0], network[2]):
        layer.weight.data.copy_(torch.where(torch.rand(layer.weight.shape) < 0.5, -1.0, 1.0))
    frozen = frozen_of(network, x)
    assert set(frozen.eager) == {"0"} and "signed" in frozen.eager["0"]
    assert torch.equal(frozen(x), network(x))


class Matmuls(nn.Module):
    """A product of two activations, one image's at a time."""

    def __init__(self):
        super().__init__()
        self.m = Matmul()

    def forward(self, x):
        return self.m(x.mT, x)


class Fickle(nn.Module):
    """Looks at the data to decide what to do, which torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return self.conv(x) if x.mean() > 0 else self.conv(-x)


@needs_units
def test_what_fx_cannot_trace_stays_eager_by_name(x):
    network = nn.Sequential(conv(), nn.ReLU(), nn.Sequential(Fickle(), nn.ReLU()), conv())
    frozen = check(network, x)
    assert frozen.eager == {"2.0": "torch.fx cannot trace it"} and "2 convolutions" in repr(frozen)


def test_a_forward_that_fx_cannot_trace_is_refused(x):
    network = approximate(Fickle(), {"conv": ROUGH}, calibration=x)
    with pytest.raises(ValueError, match="torch.fx cannot trace the forward of this Fickle.*evaluate it as it is"):
        freeze(network)


def test_nothing_to_freeze_is_refused(x):
    network = nn.Sequential(conv(), nn.ReLU())
    with pytest.raises(ValueError, match=r"This Sequential has no approximate layer.*call approximate\(network"):
        freeze(network)
    with pytest.raises(ValueError, match="no approximate layer"):
        freeze(restore(approximate(network, ROUGH, calibration=x)))


def test_an_uncalibrated_network_is_refused(x):
    network = approximate(nn.Sequential(conv(), nn.ReLU(), conv()), ROUGH, calibration=x)
    network[2].scale_x.fill_(torch.nan)
    with pytest.raises(ValueError, match="no activation scale yet; pass calibration images"):
        freeze(network)


def test_a_wrong_number_of_inputs_is_refused(x):
    frozen = frozen_of(Net(lambda net, x: net.a(x), a=conv()), x)
    with pytest.raises(ValueError, match="takes 1 inputs; it was given 2"):
        frozen(x, x)


def test_several_inputs_and_outputs(x):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x, shift=0.5):
            y = torch.relu(self.a(x + shift))
            return {"y": y, "both": (self.b(y), y)}

    network = approximate(Two(), {"a": ROUGH, "b": MANY}, calibration=x)
    frozen = freeze(network)
    for inputs in ((x,), (x, 0.1)):
        found, expected = frozen(*inputs), network(*inputs)
        assert torch.equal(found["y"], expected["y"]) and torch.equal(found["both"][0], expected["both"][0])
        assert found["both"][1] is found["y"]


# ------------------------------------------------------------------------------- the network itself


def test_the_network_is_untouched(x):
    network = settle(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), conv()))
    approximate(network, ROUGH, calibration=x)
    before, modules, y = copy.deepcopy(network.state_dict()), list(network.modules()), network(x)
    frozen = freeze(network)
    frozen(x)
    assert frozen.thaw() is network and list(network.modules()) == modules and network[2].inplace
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(x), y)
    # It trains on; the frozen form keeps what it has seen.
    kept = frozen(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
        network[1].running_mean.add_(1.0)
    assert torch.equal(frozen(x), kept) and not torch.equal(freeze(network)(x), kept)


def test_the_modes_of_the_network_are_untouched(x):
    network = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(conv(), nn.BatchNorm2d(4))).train()
    network[3].eval()
    approximate(network, ROUGH, calibration=x)
    modes = [module.training for module in network.modules()]
    frozen = freeze(network)
    frozen(x)
    assert [module.training for module in network.modules()] == modes


def test_a_training_network_is_frozen_as_it_evaluates(x):
    network = settle(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), conv()))
    approximate(network, ROUGH, calibration=x)
    expected = freeze(network)(x)
    mean = network[1].running_mean.clone()
    frozen = freeze(network.train())
    frozen.train()
    assert torch.equal(frozen(x), expected) and torch.equal(network[1].running_mean, mean)


def test_a_copy_is_independent(x):
    frozen = frozen_of(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()), x)
    twin, y = copy.deepcopy(frozen), frozen(x)
    assert torch.equal(twin(x), y) and twin.network is not frozen.network
    with torch.no_grad():
        twin.network[0].weight.zero_()
    assert frozen.network[0].weight.any() and torch.equal(frozen(x), y) and torch.equal(twin(x), y)


def test_two_threads_share_a_frozen_network(x):
    network = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 16), nn.ReLU(), conv(16, 4, 1), nn.Flatten())
    frozen = frozen_of(network, x)
    # Images of one size, whose buffers would be the same, and large enough to be in each other's way.
    images = [torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    expected, wrong, start = [frozen(i) for i in images], [], threading.Barrier(2)

    def work(order):
        start.wait()
        try:
            for _ in range(30):
                wrong.extend(n for n in order if not torch.equal(frozen(images[n]), expected[n]))
        except Exception as reason:
            wrong.append(reason)

    threads = [threading.Thread(target=work, args=(order,)) for order in ([0, 1], [2, 3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_many_image_sizes_do_not_fill_the_memory(x):
    frozen = frozen_of(nn.Sequential(conv(), nn.ReLU(), conv()), x)
    for width in range(1, 60):
        frozen(torch.zeros(1, 4, 3, width))
    assert len(frozen._local.buffers) < 20


# ------------------------------------------------------------------------------ a network that learned


@pytest.fixture(scope="module")
def trained(textures):
    network = models.resnet8(classes=4, seed=0)
    fit(network, textures, epochs=6, lr=0.1, batch_size=32, augment="none", progress=False)
    return network.eval()


@needs_units
@pytest.mark.parametrize("multiplier", ["mul8s_1KV6", ROUGH, MANY])
def test_a_trained_network_keeps_its_accuracy(trained, textures, multiplier):
    network = copy.deepcopy(trained)
    x = textures.normalised(textures.x_test)
    approximate(network, multiplier, calibration=textures.normalised(textures.x_train[:64]), per_channel=True)
    frozen = freeze(network)
    assert frozen.eager == {}
    with torch.no_grad():
        unfrozen = network(x)
    assert (frozen(x) - unfrozen).norm() < 0.02 * unfrozen.norm()
    # 64 images: one that changes sides is 1/64.
    before, after = evaluate(network, textures, progress=False), evaluate(frozen, textures, progress=False)
    assert before > 0.6 and abs(before - after) <= 2 / 64
    assert (predict(frozen, textures, batch_size=23, progress=False) == predict(frozen, textures, progress=False)).all()


# ------------------------------------------------------------------------------------------ the law's corners


@needs_units
def test_a_product_of_two_matrices_and_a_single_image(x):
    network = Net(lambda net, x: net.m(net.a(x).flatten(1), net.a(x).flatten(1).t()), a=conv(), m=Matmul())
    check(network, x, {"a": ROUGH, "m": ROUGH})
    layer = approximate(nn.Sequential(conv()), {"0": ROUGH}, calibration=x)
    with torch.no_grad():
        assert torch.equal(layer(x[0]), layer(x[:1])[0])
    with pytest.raises(ValueError, match=r"batches of images \[N, C, H, W\]"):
        freeze(layer)(x[0])


@pytest.mark.parametrize("multiplier", [ROUGH, "mitchell()"])
def test_products_whose_batches_broadcast(x, multiplier):
    network = Net(lambda net, x: net.m(net.n(net.a(x), x[:, :1].mT), x[0, 0]), a=conv(), m=Matmul(), n=Matmul())
    check(network, x, {"a": ROUGH, "m": multiplier, "n": multiplier})


def test_a_frozen_network_can_be_pickled(x):
    frozen = frozen_of(nn.Sequential(conv(), nn.ReLU(), conv()), x)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))


@pytest.mark.parametrize("backend", ["", "torch"])
def test_a_network_on_a_table_that_is_looked_up(backend, monkeypatch):
    # Nothing is fused, but pooling at the end adds up in an order that depends on the layout that layers hand out.
    monkeypatch.setenv("AXMOE_LOOKUP", backend)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    frozen = check(settle(models.resnet8(classes=4)), images, "mitchell()")
    assert len(frozen.eager) == 7
