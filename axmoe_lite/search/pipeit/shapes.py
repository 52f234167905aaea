"""What one call of a layer multiplies: the shape of its matrix product, read off its weights and its answer.

Letters: N rows of the image matrix, K numbers in a row, M filters, each in one group; B images; T, S tokens;
D features; h heads.

Chapter: 19, "Which core for which layer?"
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from axmoe_lite import cost, moe
from axmoe_lite.layers import Matmul
from axmoe_lite.layers.modules import Approximate

CONVS = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
LINEARS = (nn.functional.linear,)
PRODUCTS = tuple(getattr(of, name) for of in (torch, Tensor) for name in ("matmul", "mm", "bmm"))
PRODUCTS += (Tensor.__matmul__, Tensor.__rmatmul__)
SUMS_OF_PRODUCTS = (torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm)  # what is added comes first
ATTENTION = (nn.functional.scaled_dot_product_attention,)


@dataclass(frozen=True)
class Layer:
    """The matrix product of one layer: ``groups`` of them, each [N, K] times [K, M].

    Attributes:
        name: dotted, as in the model; a function is called after the module whose weight it reads, or its place.
        n: N, rows of the image matrix: O_w O_h B for a convolution, B for a fully connected layer, B T with tokens.
        k: K, F_w F_h F_d / groups: what is added up for one number of the answer.
        m: M, filters / groups.
        groups: of a grouped convolution (a depthwise one has as many as channels); of a product of two
            activations the pairs of matrices (B h in attention).
        kind: ``"conv"`` or ``"linear"``; products of two activations are ``"linear"``.

    >>> Layer("conv1", n=32 * 32, k=27, m=16).macs
    442368
    """

    name: str
    n: int
    k: int
    m: int
    groups: int = 1
    kind: str = "conv"

    def __post_init__(self) -> None:
        moe.check_option("kind", self.kind, ("conv", "linear"))
        if min(self.n, self.k, self.m, self.groups) < 1:
            raise ValueError(
                f"Layer {self.name!r} has n, k, m, groups = {self.n}, {self.k}, {self.m}, {self.groups};"
                " each is at least 1."
            )

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all groups."""
        return self.n * self.k * self.m * self.groups


def layers_of_call(name: str, call: Callable, args: tuple, named: dict[str, Any]) -> tuple[Any, list[Layer]]:
    """Call a function: its answer, and the products of torch that it computed, all by one name.

    >>> layers_of_call("f", nn.functional.linear, (torch.ones(5, 2), torch.ones(1, 2)), {})[1]
    [Layer(name='f', n=5, k=2, m=1, groups=1, kind='linear')]
    """
    with _Noting(name) as noting:
        answer = call(*args, **named)
    return answer, noting.layers


class _Noting(TorchFunctionMode):
    """While it lasts, products are noted, also those inside a function that nobody could trace."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.layers = name, []

    def __torch_function__(self, call: Callable, types: Any, args: tuple = (), named: dict | None = None) -> Any:
        answer = call(*args, **(named or {}))
        if isinstance(answer, Tensor) and answer.numel():
            self.layers += _of_function(self.name, call, args, named or {}, answer)
        return answer


def _of_function(name: str, call: Callable, args: tuple, named: dict[str, Any], answer: Tensor) -> list[Layer]:
    def given(position: int, *names: str) -> Tensor:
        return args[position] if len(args) > position else next(named[n] for n in names if n in named)

    if call in CONVS:
        return [_conv(name, given(0, "input"), given(1, "weight"), answer)]
    if call in TRANSPOSED:
        return [_transposed(name, given(0, "input"), given(1, "weight"), answer)]
    if call in LINEARS:
        return [_linear(name, given(1, "weight"), answer)]
    if call in PRODUCTS:
        a, b = given(0, "input"), given(1, "other", "mat2")
        return [_product(name, b, a, answer) if call is Tensor.__rmatmul__ else _product(name, a, b, answer)]
    if call in SUMS_OF_PRODUCTS:
        return [_product(name, given(1, "mat1", "batch1"), given(2, "mat2", "batch2"), answer)]
    if call in ATTENTION:
        q, k, v = given(0, "query"), given(1, "key"), given(2, "value")
        return _attention(name, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], answer[..., 0, 0].numel())
    return _einsum(name, *args) if call is torch.einsum and len(args) == 3 and "->" in args[0] else []


def layers_of_module(name: str, module: nn.Module, args: tuple, named: dict[str, Any]) -> tuple[Any, list[Layer]]:
    """Run a module: its answer, and the layers that were called inside it, itself among them.

    In a mixture each expert computes every item, and its calls are added up, in the order of the modules.
    """
    found: list[Layer] = []

    def note(inside: str) -> Callable:
        def hook(one: nn.Module, args: tuple, named: dict[str, Any], answer: Any) -> None:
            found.extend(_of_module(f"{name}.{inside}".strip("."), one, args, named, answer))

        return hook

    counted = {inside: one for inside, one in module.named_modules() if isinstance(one, cost.COUNTED)}
    # torch's fused transformer layer would not call its modules; with hooks on them it does.
    hooks = [one.register_forward_hook(note(inside), with_kwargs=True) for inside, one in counted.items()]
    try:
        with moe.all_experts(module):
            answer = module(*args, **named)
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(module, moe.Mixture):
        order = [f"{name}.{inside}" for inside, _ in module.named_modules()]
        found = _added_up(sorted(found, key=lambda layer: order.index(layer.name)))
    return answer, found


def _added_up(layers: list[Layer]) -> list[Layer]:
    """Calls of one layer as one: an expert computes its own items and those of the others apart."""
    kept: dict[Layer, int] = {}
    for layer in layers:
        shape = replace(layer, n=1)
        kept[shape] = kept.get(shape, 0) + layer.n
    return [replace(shape, n=n) for shape, n in kept.items()]


def _of_module(name: str, module: nn.Module, args: tuple, named: dict[str, Any], answer: Any) -> list[Layer]:
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(name, module, *args, **named)
    if not answer.numel():  # an expert to which nothing goes
        return []
    exact = module.exact if isinstance(module, Approximate) else module
    x = args[0] if args else named.get("a", named.get("input"))
    if isinstance(exact, Matmul):
        return [_product(name, x, args[1] if len(args) > 1 else named["b"], answer)]
    if isinstance(exact, nn.modules.conv._ConvTransposeNd):
        return [_transposed(name, x, exact.weight, answer)]
    if isinstance(exact, nn.modules.conv._ConvNd):
        return [_conv(name, x, exact.weight, answer)]
    return [_linear(name, exact.weight, answer)]


def _conv(name: str, x: Tensor, weight: Tensor, answer: Tensor) -> Layer:
    filters, groups = len(weight), x.shape[1 - weight.ndim] // weight.shape[1]
    return Layer(name, answer.numel() // filters, weight[0].numel(), filters // groups, groups)


def _transposed(name: str, x: Tensor, weight: Tensor, answer: Tensor) -> Layer:
    """Each pixel of the input gives a window of the answer: the product that is computed before windows are added."""
    groups = answer.shape[1 - weight.ndim] // weight.shape[1]
    return Layer(name, x.numel() // len(weight), len(weight) // groups, weight[0].numel(), groups)


def _linear(name: str, weight: Tensor, answer: Tensor) -> Layer:
    m, k = weight.shape if weight.ndim == 2 else (1, len(weight))
    return Layer(name, answer.numel() // m, k, m, kind="linear")


def _product(name: str, a: Tensor, b: Tensor, answer: Tensor) -> Layer:
    m = 1 if b.ndim == 1 else b.shape[-1]
    # With one matrix on the right all rows on the left go through the same product.
    n = answer.numel() // m if b.ndim <= 2 else 1 if a.ndim == 1 else a.shape[-2]
    return Layer(name, n, a.shape[-1], m, answer.numel() // (n * m), "linear")


def _einsum(name: str, equation: str, a: Tensor, b: Tensor) -> list[Layer]:
    """A sum over two factors: letters of both that stay are groups, those that go are K, of one alone N or M."""
    terms, _, kept = equation.replace(" ", "").partition("->")
    first, second = terms.split(",")
    if "..." in terms:
        return []
    sizes = dict(zip(first + second, [*a.shape, *b.shape], strict=True))
    both = set(first) & set(second)
    n, m, k, groups = (
        math.prod(sizes[letter] for letter in letters)
        for letters in (set(first) - both, set(second) - both, both - set(kept), both & set(kept))
    )
    return [Layer(name, n, k, m, groups, "linear")]


def _attention(name: str, t: int, s: int, features: int, values: int, pairs: int) -> list[Layer]:
    return [Layer(f"{name}.qk", t, features, s, pairs, "linear"), Layer(f"{name}.av", t, s, values, pairs, "linear")]


def _multihead(
    name: str, module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> list[Layer]:
    """torch computes its projections and products in one call; here they are layers as in a plain transformer."""
    D, heads = module.embed_dim, module.num_heads
    images = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
    rows, others = query.numel() // D, key.numel() // key.shape[-1]
    if query is key and key is value:
        projections = [Layer(f"{name}.in_proj", rows, D, 3 * D, kind="linear")]
    else:
        projections = [
            Layer(f"{name}.{letter}_proj", n, k, D, kind="linear")
            for letter, n, k in (("q", rows, D), ("k", others, key.shape[-1]), ("v", others, value.shape[-1]))
        ]
    products = _attention(name, rows // images, others // images, D // heads, D // heads, images * heads)
    return [*projections, *products, Layer(f"{name}.out_proj", rows, D, D, kind="linear")]
