"""Layers found by following a network, and networks cut between them: the same answers in every bit."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from axmoe_lite import approximate, cost, models, moe
from axmoe_lite.models import import_torchvision, upcycle
from axmoe_lite.search.pipeit import Layer, chain, describe, seams, split

SMALL = {"classes": 10, "image_size": 16, "patch": 4, "width": 0.125}
NETWORKS = {
    "resnet8": (lambda: models.resnet8(classes=10), 16),
    "resnet20": (lambda: models.resnet20(classes=10), 16),
    "resnet56": (lambda: models.resnet56(classes=10, shortcut="pad", width=0.25), 8),
    "vgg11_bn": (lambda: models.vgg11_bn(classes=10, width=0.25), 32),
    "vgg19_bn": (lambda: models.vgg19_bn(classes=10, width=0.125), 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(classes=10), 16),
    "vit_small": (lambda: models.vit_small(**SMALL), 16),
    "hard": (lambda: models.resnet8(classes=10, topology="hard", experts=3), 16),
    "soft": (lambda: models.resnet8(classes=10, topology="soft", experts=2), 16),
    "hard tokens": (lambda: models.vit_small(**SMALL, topology="hard", experts=3), 16),
}


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=NETWORKS)
def case(request):
    """A network in evaluation mode, whose BatchNorms do something, and images [3, 3, H, H]."""
    make, size = NETWORKS[request.param]
    network = make().eval()
    for i, norm in enumerate(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.copy_(0.1 * some(len(norm.running_mean), seed=i))
    return network, some(3, 3, size, size)


def of(module, *shape):
    return [(v.n, v.k, v.m, v.groups, v.kind) for v in describe(nn.Sequential(module), some(*shape))]


# ------------------------------------------------------------------------------ layers


def test_products_by_hand():
    # 3x3, stride 2, padding 1: 9 x 11 pixels become 5 x 6; 4 of 8 channels in each of 2 groups, 6 of 12 filters.
    assert of(nn.Conv2d(8, 12, 3, 2, 1, groups=2), 2, 8, 9, 11) == [(2 * 30, 4 * 9, 6, 2, "conv")]
    assert of(nn.Conv2d(6, 6, 5, groups=6), 1, 6, 5, 7) == [(3, 25, 1, 6, "conv")]  # depthwise
    assert of(nn.Conv1d(3, 4, 3, dilation=2), 2, 3, 10) == [(2 * 6, 9, 4, 1, "conv")]
    assert of(nn.Conv3d(2, 5, (1, 2, 3)), 1, 2, 4, 4, 4) == [(4 * 3 * 2, 2 * 6, 5, 1, "conv")]
    # Each of 2 x 3 x 3 pixels: 4 channels of its group times 2 filters of 2 x 2.
    assert of(nn.ConvTranspose2d(8, 4, 2, 2, groups=2), 2, 8, 3, 3) == [(18, 4, 2 * 4, 2, "conv")]
    assert of(nn.Linear(7, 3), 5, 7) == [(5, 7, 3, 1, "linear")]
    assert of(nn.Linear(7, 3), 5, 4, 7) == [(20, 7, 3, 1, "linear")]  # tokens
    attention = [(10, 8, 24, 1, "linear"), (5, 4, 5, 4, "linear"), (5, 5, 4, 4, "linear"), (10, 8, 8, 1, "linear")]
    assert of(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), 2, 5, 8) == [
        *attention,
        (10, 8, 6, 1, "linear"),
        (10, 6, 8, 1, "linear"),
    ]
    assert Layer("a", 2, 3, 5, 7).macs == 210


@fx.wrap
def hidden(x, weight):
    """torch.fx does not look inside."""
    return F.linear(x, weight).relu() if x.sum() > 0 else F.linear(x, weight)


class Functions(nn.Module):
    """Products without modules of their own, a layer called twice, sizes in every form, an argument with a default."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(some(4, 3, 3, 3))
        self.fc = nn.Linear(4, 4)
        self.register_buffer("places", some(1, 30, 4))

    def forward(self, x, mask=None, *more, scale=2):
        b, c, _, _ = x.shape
        if c != 3 or len(more) or mask is not None or x.ndim != 4 or not x.dtype.is_floating_point:
            raise ValueError("not reached")
        y = F.conv2d(x, self.kernel).flatten(2).transpose(1, 2)
        y = y + self.places[:, : y.shape[1]]
        for _ in range(scale):
            y = self.fc(y)
        y = F.linear(y, self.fc.weight)
        y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None]).view(b, -1, 4)
        y = torch.einsum("btd,bsd->bts", y, y) @ y
        y = torch.addmm(torch.zeros(len(x), 4), y.mean(1), self.fc.weight)
        y = torch.bmm(y[:, None], hidden(y, self.fc.weight)[:, :, None]).flatten(1)
        return F.dropout(F.max_pool1d(y, 1), 0.5, self.training)


def test_functions_are_found_like_modules():
    """Two images of 5 x 5: 9 tokens of 4 features each."""
    found = describe(Functions(), some(2, 3, 5, 5))
    assert [(v.name, v.n, v.k, v.m, v.groups, v.kind) for v in found] == [
        ("conv2d", 18, 27, 4, 1, "conv"),
        ("fc", 18, 4, 4, 1, "linear"),
        ("fc", 18, 4, 4, 1, "linear"),
        ("fc", 18, 4, 4, 1, "linear"),
        ("scaled_dot_product_attention.qk", 9, 4, 9, 2, "linear"),
        ("scaled_dot_product_attention.av", 9, 9, 4, 2, "linear"),
        ("einsum", 9, 4, 9, 2, "linear"),
        ("matmul", 9, 9, 4, 2, "linear"),
        ("addmm", 2, 4, 4, 1, "linear"),
        ("fc", 2, 4, 4, 1, "linear"),
        ("bmm", 1, 4, 1, 2, "linear"),
    ]


def test_macs_are_those_of_the_count(case):
    network, x = case
    counted = cost.count(network, x)
    layers = describe(network, x)
    assert sum(layer.macs for layer in layers) == round(3 * counted.static)
    assert {layer.name for layer in layers} == set(counted.layers)
    for layer in layers:
        assert layer.macs == round(3 * counted.layers[layer.name].static), layer
        assert (layer.kind == "conv") == (counted.layers[layer.name].kind == "conv")
    one = describe(network, x[:1])
    assert [(a.name, a.k, a.m) for a in one] == [(a.name, a.k, a.m) for a in layers]
    assert [3 * a.macs for a in one] == [a.macs for a in layers]


def test_layers_come_in_the_order_of_execution():
    network, called = models.resnet8(classes=10, shortcut="projection").eval(), []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    found = [layer.name for layer in describe(network, some(1, 3, 8, 8))]
    called.clear()
    network(some(1, 3, 8, 8))
    assert found == called


def test_a_mixture_is_described_by_its_gate_and_experts_with_all_items():
    """Whatever the routing: 4 images to experts of 8 x 8 pixels, 3 experts."""
    network = upcycle(models.resnet8(classes=4, width=0.25), topology="hard", experts=3, r=0.1)
    (name,) = moe.mixtures(network)
    x = some(4, 3, 32, 32)
    found = [layer for layer in describe(network, x) if layer.name.startswith(name)]
    assert [v.name.removeprefix(name) for v in found] == [".experts.0", ".experts.1", ".experts.2", ".gate.score"]
    assert {(v.n, v.k, v.m) for v in found[:3]} == {(4 * 64, 16 * 9, 16)} and found[3] == Layer(
        f"{name}.gate.score", 4, 16, 3, kind="linear"
    )


def test_approximate_layers_are_described_as_exact_ones():
    network, x = models.resnet8(classes=4, width=0.25).eval(), some(2, 3, 16, 16)
    before = describe(network, x)
    approximate(network, "mul8s_1L2J", calibration=x)
    assert describe(network, x) == before
    assert torch.equal(chain(split(network, x, [0, 3, 8]), x), network(x))


# ------------------------------------------------------------------------------ stages


def test_stages_answer_like_the_network(case):
    """At many cuts, also for batches of other sizes and images that are routed otherwise."""
    network, x = case
    steps = seams(network, x)
    other = some(5, *x.shape[1:], seed=1)
    draw = torch.Generator().manual_seed(0)
    for n in (2, 3, len(steps) - 1):
        inner = torch.randperm(len(steps) - 2, generator=draw)[: n - 1].sort().values
        stages = split(network, x, [0, *(steps[i + 1] for i in inner.tolist()), steps[-1]])
        with torch.no_grad():
            assert len(stages) == n
            for images in (x, other, other[:1]):
                assert torch.equal(chain(stages, images), network(images))


def test_a_mixture_cannot_be_cut():
    """Three convolutions of a ResNet-8 stay, four become 3 experts and a gate each, then comes the classifier."""
    network, x = NETWORKS["hard"][0](), some(2, 3, 16, 16)
    names = [layer.name for layer in describe(network, x)]
    assert seams(network, x) == [0, 1, 2, 3, 7, 11, 15, 19, 20]
    for i in set(range(names.index("fc"))) - set(seams(network, x)):
        with pytest.raises(ValueError, match=rf"A cut at {i} lies inside 'layer\d_0_conv\d', one step that is layers"):
            split(network, x, [0, i, len(names)])


class Crossing(nn.Module):
    """Values that are read much later: the image, a convolution's answer, a size, both halves of a pair."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        b = len(x)
        a = self.layers[0](x)
        pair = self.layers[1](self.relu(a)).chunk(2, 1)
        y = self.layers[2](torch.cat(pair[::-1], 1)) + a
        y = self.layers[3](y * self.layers[0].weight.mean())
        y = self.layers[4](y + pair[0].repeat(1, 2, 1, 1) + a) * self.layers[0].weight.mean()
        return (y + x).reshape(b, -1)


def test_values_travel_through_all_stages_between():
    network, x = Crossing().eval(), some(3, 4, 6, 5)
    for cuts in ([0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 4, 5], [0, 1, 5]):
        stages = split(network, x, cuts)
        for images in (x, some(2, 4, 6, 5, seed=1)):
            value = images.clone()
            assert torch.equal(chain(stages, value), network(images.clone()))
    stages = split(network, x, [0, 1, 2, 3, 4, 5])
    taken = [[n.name for n in stage.graph.nodes if n.op == "placeholder"] for stage in stages]
    # Beside what the layer works on: the image and its length to the end, a to stage 3, and the pair to there too,
    # which stage 1 makes. Never a weight.
    assert [len(names) for names in taken] == [1, 4, 5, 5, 3] and taken[0] == ["x"]
    assert all({"x", "len_1"} <= set(names) for names in taken[1:])
    assert [i for i, names in enumerate(taken) if "layers_0" in names] == [1, 2, 3]
    assert not any("weight" in name for names in taken for name in names)


def test_a_step_belongs_to_the_latest_layer_before_it():
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1), nn.Flatten())
    stages = split(net, some(1, 3, 4, 4), [0, 1, 2])
    kinds = [[type(m).__name__ for m in stage.children()] for stage in stages]
    assert kinds == [["ReLU", "Conv2d", "Tanh", "MaxPool2d"], ["Conv2d", "Flatten"]]


def test_the_model_stays_as_it_is_and_shares_its_weights():
    network, x = models.resnet8(classes=4, width=0.25), some(2, 3, 16, 16)
    network.layer2.eval()
    before = copy.deepcopy(network)
    stages = split(network, x, [0, 4, 8])
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), network.state_dict().values(), strict=True)
    )
    assert not any(m.training for stage in stages for m in stage.modules())
    shared = {t.data_ptr() for stage in stages for t in [*stage.parameters(), *stage.buffers()] if t.ndim}
    assert shared == {t.data_ptr() for t in [*network.parameters(), *network.buffers()] if t.ndim}
    with torch.no_grad():
        network.fc.bias += 1
        assert torch.equal(chain(stages, x), network.eval()(x))


@pytest.mark.parametrize("make", [Functions, NETWORKS["vit_small"][0], NETWORKS["hard"][0]])
def test_stages_can_be_sent(make):
    network = make().eval()
    x = some(2, 3, 5, 5) if make is Functions else some(2, 3, 16, 16)
    steps, file = seams(network, x), io.BytesIO()
    torch.save(split(network, x, [0, steps[len(steps) // 2], steps[-1]]), file)
    file.seek(0)
    stages = torch.load(file, weights_only=False)
    larger = [some(2, 3, 5, 6)] if make is Functions else []  # nothing in it knows the image size
    for images in (x, torch.cat([x, x]), *larger):
        assert torch.equal(chain(stages, images), network(images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_torchvisions_models(name):
    options = {"image_size": 32} if name == "vit_b_16" else {}
    with torch.random.fork_rng(devices=[]):
        network = getattr(import_torchvision().models, name)(**options).eval()
    x = some(2, 3, 32, 32)
    layers = describe(network, x)
    assert sum(layer.macs for layer in layers) == round(2 * cost.count(network, x).static)
    with torch.no_grad():
        assert torch.equal(chain(split(network, x, [0, 5, 11, len(layers)]), x), network(x))


# ------------------------------------------------------------------------------ errors


class Decides(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Loops(nn.Conv2d):
    def forward(self, x):
        for _ in range(int(x.amax())):
            x = super().forward(x)
        return super().forward(x)


class Draws(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + torch.randn(3)[0]


class Two(nn.Conv2d):
    def forward(self, x, y):
        return super().forward(x) + y


def test_errors_say_what_to_do():
    x, net = some(2, 3, 4, 4), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    cluster = moe.cluster(net, nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), experts=2)
    for message, call in {
        r"cannot trace this Decides: it decides by a number .*py, line \d+: `return y if y.sum\(\) > 0 else -y`": (
            lambda: describe(Decides(3, 3, 1), x)
        ),
        "cannot trace this Sequential: it decides by a number": lambda: describe(nn.Sequential(Loops(3, 3, 1)), x),
        "this Draws do not answer as it did: it draws random": lambda: split(Draws(3, 3, 1), x, [0, 1]),
        "The forward of this Two takes x, y; only": lambda: describe(Two(3, 3, 1), x),
        "This ClusterMoE chooses by the image which of 2 experts": lambda: describe(cluster, x),
        "This ReLU has no convolution": lambda: describe(nn.ReLU(), x),
        "given a Conv2d and a tensor .0, 3, 4, 4.": lambda: describe(net[0], x[:0]),
        "given a Sequential and a list": lambda: describe(net, [1]),
        "cuts asks for 3 stages; there are 2 layers": lambda: split(net, x, [0, 1, 2, 3]),
        r"cuts is \[0, 1\]; it must rise from 0 to 2": lambda: split(net, x, [0, 1]),
        r"cuts is \[0, 0, 2\]; it must rise": lambda: split(net, x, [0, 0, 2]),
        r"cuts is \[1, 2\]; it begins with 0": lambda: split(net, x, [1, 2]),
        r"cuts is \[0, 1.5, 2\]; it begins with 0": lambda: split(net, x, [0, 1.5, 2]),
        "kind is 'fc'; it can be 'conv', 'linear'": lambda: Layer("a", 1, 1, 1, kind="fc"),
        "n, k, m, groups = 1, 0, 1, 1; each is at least 1": lambda: Layer("a", 1, 0, 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="expected input"):  # the model's own words
        describe(net, some(1, 4, 4, 4))


def test_tracing_leaves_python_as_it_was():
    """While a ViT is followed, `len` means something else in its file."""
    from axmoe_lite.models import vit

    network, zeros = NETWORKS["vit_small"][0](), torch.zeros
    with pytest.raises(ValueError, match="This ViT was given images"):
        describe(network, some(1, 3, 8, 8))
    describe(network, some(1, 3, 16, 16))
    assert "len" not in vars(vit) and torch.zeros is zeros
    assert not any(m._forward_hooks for m in network.modules())
