"""What is measured: each case is one piece of work and the ways to do it.

Chapter: 06, "Faster than float32?"
"""

import copy
import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from axmoe_lite import kernels, models
from axmoe_lite.bench.columns import (
    FEW,
    FLOAT32,
    GATHERED,
    HIGH_RANK,
    MOSAICS,
    NAIVE,
    RANK_2,
    SEED,
    approximated,
    layer_columns,
    network_columns,
    table_of,
)
from axmoe_lite.bench.gather import gather_matmul
from axmoe_lite.kernels import int8
from axmoe_lite.layers import Matmul, approximable, default_layers
from axmoe_lite.multipliers import EVOAPPROX, EXACT


@dataclass(eq=False)
class Case:
    """One piece of work and the ways to do it.

    Attributes:
        name: what rows and tables call it, with all sizes.
        group: its name on the command line.
        columns: the ways, each a call without arguments; the first is float32.
        macs: products that one call takes in each column.
        inputs: images or rows that one call takes.
        share: for columns that do only a part of the work, which part: their times are divided by it.
        axis, value: for a case of a series, what grows in it ("none" elsewhere), and how large it is here.
        training: whether gradients are wanted.
    """

    name: str
    group: str
    columns: dict[str, Callable[[], object]]
    macs: int
    inputs: int
    share: dict[str, float] = field(default_factory=dict)
    axis: str = "none"
    value: int | str = ""
    training: bool = False


def _draw(*shape: int, positive: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))
    x = x.relu_() if positive else x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Linear(inputs, outputs, bias=bias)


def _conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        conv = nn.Conv2d(inputs, outputs, bias=False, **options)
    return conv.to(memory_format=torch.channels_last)


@torch.no_grad()
def _settled(network: nn.Module, x: Tensor) -> nn.Module:
    """The network with BatchNorm statistics of one pass in training mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


@torch.no_grad()
def _products(network: nn.Module, x: Tensor) -> int:
    """Multiplications in convolutions, linear layers and attention's products of one call."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal total
        fan_in = inputs[0].shape[-1] if isinstance(layer, Matmul) else layer.weight[0].numel()
        total += y.numel() * fan_in

    hooks = [layer.register_forward_hook(count) for layer in approximable(network).values()]
    network(x)
    for hook in hooks:
        hook.remove()
    return total


def _names(quick: bool) -> tuple[str, ...]:
    return FEW if quick else (*EVOAPPROX, *HIGH_RANK)


def _gemm(quick: bool) -> list[Callable[[], Case]]:
    """A matrix product: as a layer, floats to floats, and the bare product, codes to sums."""
    m, k, n = 8192, 576, 64
    size, part = f"product {m} x {k} x {n}", m // 32

    def layer() -> Case:
        columns, share = layer_columns(_linear(k, n, bias=False), (_draw(m, k),), _names(quick), part=part)
        return Case(f"{size}, floats to floats", "gemm", columns, m * k * n, m, share)

    def bare() -> Case:
        a, b = (_codes(_draw(*shape)) for shape in ((m, k), (k, n)))
        columns = {FLOAT32: functools.partial(torch.matmul, a.float(), b.float())}
        columns |= {name: functools.partial(kernels.matmul, a, b, table_of(name)) for name in _names(quick)}
        columns[NAIVE] = functools.partial(gather_matmul, a[:part], b, table_of(GATHERED).table)
        return Case(f"{size}, codes to sums", "gemm", columns, m * k * n, m, {NAIVE: part / m})

    return [layer, bare]


def _codes(x: Tensor) -> Tensor:
    return (x * 40).round().clamp(-127, 127).to(torch.int8)


def _convs(quick: bool) -> list[Callable[[], Case]]:
    """Every distinct convolution of ResNet-20, on what it really sees: the image, and activations after ReLU."""
    images = 8 if quick else 64
    network = models.resnet20(classes=100)
    found: dict[str, tuple[nn.Conv2d, tuple[int, int]]] = {}

    def look(layer: nn.Conv2d, inputs: tuple[Tensor], y: Tensor) -> None:
        side, stride = inputs[0].shape[-1], f", stride {layer.stride[0]}" if layer.stride[0] > 1 else ""
        kernel = "x".join(map(str, layer.kernel_size))
        name = f"conv {kernel}, {layer.in_channels} to {layer.out_channels} channels, {side}x{side}{stride}"
        found.setdefault(f"{name}, {images} images", (layer, side, y.shape[-1]))

    hooks = [m.register_forward_hook(look) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()

    def build(name: str) -> Case:
        layer, side, out = found[name]
        x = _draw(images, layer.in_channels, side, side, positive=layer.in_channels > 3)
        columns, share = layer_columns(layer, (x,), _names(quick), part=1)
        return Case(name, "convs", columns, images * out**2 * layer.weight.numel(), images, share)

    names = ["conv 3x3, 16 to 16 channels, 32x32, 8 images"] if quick else list(found)
    return [functools.partial(build, name) for name in names]


def _mlp(quick: bool) -> list[Callable[[], Case]]:
    def build() -> Case:
        images, d, hidden = 8 if quick else 64, 384, 1536
        tokens = images * 197
        columns, share = layer_columns(_linear(d, hidden, bias=True), (_draw(tokens, d),), _names(quick), part=32)
        name = f"ViT-Small MLP, {tokens} tokens, {d} to {hidden}"
        return Case(name, "mlp", columns, tokens * d * hidden, tokens, share)

    return [build]


def _attention(quick: bool) -> list[Callable[[], Case]]:
    images, heads, t, d = 4 if quick else 64, 6, 197, 64

    def build(name: str) -> Case:
        q, k = _draw(images, heads, t, d), _draw(images, t, heads, d).transpose(1, 2).flip(0)
        inputs = (q, k.mT) if name == "Q K^T" else ((q @ k.mT / d**0.5).softmax(-1), k)
        columns, share = layer_columns(Matmul(), inputs, _names(quick), part=1)
        case = f"ViT-Small attention, {name}, {images} images"
        return Case(case, "attention", columns, images * heads * t * t * d, images, share)

    return [functools.partial(build, name) for name in ("Q K^T", "A V")]


def _network(name: str, group: str, make: Callable[[], nn.Module], side: int, images: int, quick: bool) -> Case:
    x = _draw(images, 3, side, side)
    network = _settled(make(), x) if group != "vit" else make().eval()
    # A transformer has no pipeline yet, and a naive gather would take minutes an image.
    columns, share = network_columns(network, x, _names(quick), frozen=group != "vit", part=int(group != "vit"))
    macs = _products(network, x[:1]) * images
    return Case(f"{name} forward, {images} images", group, columns, macs, images, share)


def _resnet20(quick: bool) -> list[Callable[[], Case]]:
    make = functools.partial(models.resnet20, classes=100)
    return [functools.partial(_network, "ResNet-20", "resnet20", make, 32, 8 if quick else 64, quick)]


def _vgg11(quick: bool) -> list[Callable[[], Case]]:
    make = functools.partial(models.vgg11_bn, classes=100)
    return [functools.partial(_network, "VGG11", "vgg11", make, 32, 8 if quick else 64, quick)]


def _vit(quick: bool) -> list[Callable[[], Case]]:
    make = functools.partial(models.vit_small, classes=200)
    return [functools.partial(_network, "ViT-Small", "vit", make, 224, 1 if quick else 8, quick)]


def _two_products(quick: bool) -> list[Callable[[], Case]]:
    """Both CNNs on a circuit of rank 2, which none of the thirteen has."""

    def build(name: str, make: Callable[..., nn.Module]) -> Case:
        images = 8 if quick else 64
        x = _draw(images, 3, 32, 32)
        network = _settled(make(classes=100), x)
        columns, _ = network_columns(network, x, (RANK_2,), frozen=True, part=0)
        macs = _products(network, x[:1]) * images
        return Case(f"{name} forward, two products, {images} images", "two_products", columns, macs, images, {})

    named = (("ResNet-20", models.resnet20), ("VGG11", models.vgg11_bn))
    return [functools.partial(build, *each) for each in named]


def _mosaic(quick: bool) -> list[Callable[[], Case]]:
    """Several multipliers inside each layer, beside the dearest and the cheapest way to have one."""
    few = (EXACT, GATHERED, "pr(1,4)", "roup(0,4)", "random table")

    def conv() -> Case:
        images, layer = 8 if quick else 64, _conv(64, 64, kernel_size=3, padding=1)
        x = _draw(images, 64, 16, 16, positive=True)
        columns, share = layer_columns(layer, (x,), (*few, *MOSAICS), part=1)
        name = f"conv 3x3, 64 to 64 channels, 16x16, mosaics, {images} images"
        return Case(name, "mosaic", columns, x.numel() * layer.weight[0].numel(), images, share)

    def resnet20() -> Case:
        images = 8 if quick else 64
        x = _draw(images, 3, 32, 32)
        network = _settled(models.resnet20(classes=100, shortcut="pad"), x)
        fitting = [name for name in MOSAICS if not name.startswith("thirteen")]  # whatever a layer's size
        columns, _ = network_columns(network, x, (*few[:-1], *fitting), frozen=True, part=0)
        macs = _products(network, x[:1]) * images
        return Case(f"ResNet-20 forward, mosaics, {images} images", "mosaic", columns, macs, images)

    return [conv, resnet20]


def _training(quick: bool) -> list[Callable[[], Case]]:
    """One step of ResNet-20: forward, straight-through backward in float32, SGD."""

    def build() -> Case:
        images = 8 if quick else 64
        x = _draw(images, 3, 32, 32)
        y = torch.randint(0, 100, (images,), generator=torch.Generator().manual_seed(SEED))
        network = _settled(models.resnet20(classes=100), x)
        layers = default_layers(network)
        copies = {FLOAT32: copy.deepcopy(network)}
        for name in _names(quick):  # each with weights of its own, which its steps change
            (copies[name],) = approximated(copy.deepcopy(network), layers, x, [name]).values()
        columns = {name: _step(net, x, y) for name, net in copies.items()}
        macs = 3 * _products(network, x[:1]) * images  # forward, and two products of the backward pass
        return Case(f"ResNet-20 training step, {images} images", "training", columns, macs, images, training=True)

    return [build]


def _step(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    network.train()
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(network(x), y)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def _scaling(quick: bool) -> list[Callable[[], Case]]:
    """One convolution as its batch, its width and its multiplier's rank grow."""
    names = (EXACT, "mul8s_1KVA", "random table")

    def grow(axis: str, value: int, channels: int, images: int) -> Case:
        layer = _conv(channels, channels, kernel_size=3, padding=1)
        x = _draw(images, channels, 16, 16, positive=True)
        columns, share = layer_columns(layer, (x,), names, part=0)
        name = f"conv 3x3, {channels} to {channels} channels, 16x16, {images} images"
        macs = x.numel() * layer.weight[0].numel()
        return Case(name, "scaling", columns, macs, images, share, axis=axis, value=value)

    def rank(value: int) -> Case:
        layer = _conv(64, 64, kernel_size=3, padding=1)
        x = _draw(16, 64, 16, 16, positive=True)
        columns, share = layer_columns(layer, (x,), (f"rank {value}", "random table"), part=0)
        columns["rank R"] = columns.pop(f"rank {value}")
        name = f"conv 3x3, 64 to 64 channels, 16x16, 16 images, rank {value}"
        return Case(name, "scaling", columns, x.numel() * 576, 16, share, axis="rank", value=value)

    batches = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64, 128)
    widths = (8, 32, 128) if quick else (4, 8, 16, 32, 64, 128, 256)
    ranks = (1, 4, 16) if quick else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    cases = [functools.partial(grow, "images", n, 32, n) for n in batches]
    cases += [functools.partial(grow, "channels", c, c, 16) for c in widths]
    return [*cases, *(functools.partial(rank, r) for r in ranks)]


def _peak(quick: bool) -> list[Callable[[], Case]]:
    """Large matrix products: as fast as this machine gets in each arithmetic."""

    def build(m: int, k: int, n: int) -> Case:
        a, b = _draw(m, k), _draw(k, n)
        columns = {FLOAT32: functools.partial(torch.matmul, a, b)}
        if int8.available():
            columns["int8 units"] = functools.partial(int8.matmul, _codes(a), _codes(b.T).T)
        return Case(f"product {m} x {k} x {n}", "peak", columns, m * k * n, m, axis="peak", value=m)

    sizes = ((1024, 1024, 1024),) if quick else ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
    return [functools.partial(build, *size) for size in sizes]


CASES: dict[str, Callable[[bool], list[Callable[[], Case]]]] = {
    "gemm": _gemm,
    "convs": _convs,
    "mlp": _mlp,
    "attention": _attention,
    "resnet20": _resnet20,
    "vgg11": _vgg11,
    "vit": _vit,
    "two_products": _two_products,
    "mosaic": _mosaic,
    "training": _training,
    "scaling": _scaling,
    "peak": _peak,
}
"""The groups of cases by name; each gives the functions that build its cases."""


def builders(names: Iterable[str], *, quick: bool = False) -> list[Callable[[], Case]]:
    """The functions that build the cases of these groups, in the order given.

    Args:
        names: groups, among :data:`CASES`.
        quick: smaller and fewer, for a look in seconds.

    Raises:
        ValueError: for a group that does not exist; the message names the nearest that does.

    >>> builders(["gem"])
    Traceback (most recent call last):
        ...
    ValueError: There is no case 'gem'. Did you mean 'gemm'? There are gemm, convs, mlp, attention, ...
    """
    for name in (names := list(names)):
        if name not in CASES:
            near = difflib.get_close_matches(name, CASES, n=1, cutoff=0.0)[0]
            raise ValueError(f"There is no case {name!r}. Did you mean {near!r}? There are {', '.join(CASES)}.")
    return [build for name in names for build in CASES[name](quick)]
