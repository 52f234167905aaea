"""Forward by the multiplier, backward through it: what training sees of an approximate product.

    straight-through   the gradient of the exact product of the quantised operands: dM/da = b, dM/db = a
    smoothed           the table's own slopes, dM/da = D_a(a, b) and dM/db = D_b(a, b)

A slope is that of the least-squares line through the products of nine neighbouring codes (fewer at the
ends of the range), so that steps of a truncated operand become a ramp. A table of slopes has few
factors where the table of products has, so

    dL/da[m, k] = sum over s of p_s(a[m, k]) * (sum over n of dL/dy[m, n] q_s(b[k, n]))           (2)

is a few ordinary products, of floats. Not from any of the papers; ApproxTorch offers a similar estimate by lookups.

Where an activation was clipped its gradient is 0 (Bengio et al., 2013). The activation is saved as the float
that came in, which ReLU and BatchNorm keep alive anyway: an approximate layer adds nothing to the memory.

Mixed precision: a layer in training mode under ``torch.autocast(..., torch.bfloat16)`` rounds what the law says to
bfloat16 at the very end, as an exact layer would, so that what follows it is as cheap. Its straight-through
backward then multiplies in bfloat16 too, which holds codes exactly; the gradient that comes in, the weights as
dequantised and the results are rounded to 8 bits, sums are not. The smoothed backward stays in float32, and so does
everything in evaluation mode and under other types: float16 would overflow on sums of codes.

Chapters: 06, "Faster than float32?", and 08, "Can a network learn its new arithmetic?"
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from axmoe_lite import kernels, quant
from axmoe_lite.kernels import factored
from axmoe_lite.kernels.encode import clear_outside, codes_in_bfloat16, round_trip
from axmoe_lite.layers import small
from axmoe_lite.multipliers import Multiplier

GRADIENTS = ("straight-through", "smoothed")
WINDOW = 4  # codes on either side of a slope
NEGLIGIBLE = 1e-3  # a term of D below this share of the largest is left out
MOST_TERMS = 16
CACHED = 2**18  # floats that a core's own cache holds


def check_gradient(gradient: str) -> None:
    """Raise ValueError unless the name is known."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}; it can be {', '.join(map(repr, GRADIENTS))}.")


@functools.lru_cache(maxsize=64)
def slopes(multiplier: Multiplier, operand: str, *, window: int = WINDOW) -> tuple[Tensor, Tensor]:
    """Factors p, q [S, Q], float32, of the slopes D(a, b) = sum over s of p_s(a) q_s(b) of (2).

    Args:
        operand: ``"a"`` for dM/da, ``"b"`` for dM/db.
        window: codes on either side that the line is fitted to.

    A table of high rank has as many terms of slopes; the smallest are left out, at most 16 kept.

    >>> from axmoe_lite import multiplier
    >>> p, q = slopes(multiplier("mul8s_1KV6"), "a")  # exact products: dM/da = b, one term
    >>> len(p), round((p[0, 7 + 128] * q[0, -5 + 128]).item(), 3)
    (1, -5.0)
    """
    table = multiplier.table.double().T if operand == "b" else multiplier.table.double()
    size = len(table)
    steps = torch.arange(size, dtype=torch.float64)
    near = (steps[:, None] - steps[None, :]).abs() <= window
    centred = near * (steps[None, :] - (near * steps).sum(1, keepdim=True) / near.sum(1, keepdim=True))
    fit = centred / (centred**2).sum(1, keepdim=True)  # [Q, Q]: products of a column to their slopes
    along, strength, across = torch.linalg.svd(fit @ table)
    terms = min(MOST_TERMS, int((strength > NEGLIGIBLE * strength[0]).sum())) if strength[0] > 0 else 0
    p, q = (along[:, :terms] * strength[:terms]).T.float(), across[:terms].float()
    return (q, p) if operand == "b" else (p, q)


def _terms(layer: Any, operand: str, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    p, q = slopes(layer.multiplier, operand)
    return zip(p.to(device), q.to(device), strict=True)


def _look_up(row: Tensor, codes: Tensor) -> Tensor:
    return row[codes.long() + 128]


def _mixed(layer: Any, x: Tensor) -> bool:
    """Whether a forward pass is one of mixed precision; asked there, because autocast has ended before backward."""
    kind = x.device.type
    wanted = layer.training and torch.is_autocast_enabled(kind)
    return wanted and torch.get_autocast_dtype(kind) == torch.bfloat16


def _seen(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, float]:
    """What a product saw in place of x: floats, notes for :func:`clear_outside`, and what a float of 1 means.

    The floats are values in float32, but codes in bfloat16, where values would be rounded. They lie in memory
    that the next such call overwrites.
    """
    if dtype == torch.bfloat16:
        return *codes_in_bfloat16(x, float(scale)), float(scale)
    return *round_trip(x, float(scale)), 1.0


def _times(product: Tensor, step: float) -> Tensor:
    """The product of codes as one of values; in float32, because there it is not rounded a second time."""
    return product if step == 1.0 else product.float().mul_(step)


def _channel_sums(grad: Tensor) -> Tensor:
    """The gradient of the bias, float32 [O], from grad [M, O] or [N, O, H, W].

    Of a large bfloat16 tensor torch first makes a whole copy in float32; part by part takes a sixth of the time.
    """
    if grad.dtype != torch.bfloat16 or grad.device.type != "cpu":
        return grad.sum([d for d in range(grad.ndim) if d != 1], dtype=torch.float32)
    rows = grad.movedim(1, -1).flatten(0, -2)
    parts = rows.split(max(1, CACHED // rows.shape[1]))
    return torch.stack([part.sum(0, dtype=torch.float32) for part in parts]).sum(0)


def _stopped(grad: Tensor, x: Tensor, scale: Tensor | float, outside: Tensor | None = None) -> Tensor:
    """The gradient, in place, with 0 where x was clipped; of x's type."""
    return clear_outside(grad, x, float(scale), outside).to(x.dtype)


def _forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
    # The product goes along, because its scale and codes are those of the weights as they were.
    ctx.save_for_backward(x)
    ctx.layer, ctx.product, ctx.weight_dtype = layer, layer.product(), weight.dtype
    ctx.dtype = torch.bfloat16 if _mixed(layer, x) else torch.float32
    # A network in half or double precision goes on in its own type.
    return ctx.product(x).to(ctx.dtype if weight.dtype == torch.float32 else weight.dtype)


def _operands(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient in the type in which the backward pass multiplies."""
    return grad.to(ctx.dtype if ctx.layer.gradient == "straight-through" else torch.float32)


class Convolution(torch.autograd.Function):
    """y = layer.product()(x); x [N, C, H, W], weight [O, c, KH, KW], bias [O] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        return _forward(ctx, x, weight, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer, product, wanted = ctx.saved_tensors, ctx.layer, ctx.product, ctx.needs_input_grad
        grad, outside = _operands(ctx, grad), None

        def backward(
            first: Tensor, second: Tensor, grad: Tensor, which: tuple[bool, bool], padding: tuple = layer.code_padding
        ) -> tuple:
            how = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
            if small.suits(first, second, **how, groups=layer.groups):
                return small.gradients(grad, first, second, which)
            options = (*how.values(), False, (0, 0), layer.groups)
            return torch.ops.aten.convolution_backward(grad, first, second, None, *options, (*which, False))[:2]

        if layer.gradient == "straight-through":
            used, seen, step = product.weight.float().mul_(product.scale_w).to(ctx.dtype), x.to(ctx.dtype), 1.0
            if wanted[1]:
                seen, outside, step = _seen(x, product.scale_x, ctx.dtype)
            grad_x, grad_weight = backward(seen, used, grad, wanted[:2])
            grad_weight = _times(grad_weight, step) if wanted[1] else None
        else:
            codes, parts_x, parts_weight = quant.quantise(x, product.scale_x), [], []
            if wanted[0]:
                scaled = grad * product.scale_w.flatten(1)[..., None]
                parts_x = (
                    backward(x.float(), _look_up(q, product.weight), scaled, (True, False))[0] * _look_up(p, codes)
                    for p, q in _terms(layer, "a", x.device)
                )
            if wanted[1]:
                # The border is code 0, and M(0, b) may have a slope too.
                seen, used = factored.padded(codes, layer.code_padding), product.weight.float()
                parts_weight = (
                    backward(_look_up(p, seen), used, grad, (False, True), (0, 0))[1] * _look_up(q, product.weight)
                    for p, q in _terms(layer, "b", x.device)
                )
            grad_x, grad_weight = _total(parts_x, x), _total(parts_weight, product.weight).mul_(product.scale_x)
        grad_x = _stopped(grad_x, x, product.scale_x, outside) if wanted[0] else None
        grad_weight = grad_weight.to(ctx.weight_dtype) if wanted[1] else None
        return grad_x, grad_weight, _channel_sums(grad) if wanted[2] else None, None


class Linear(torch.autograd.Function):
    """y = layer.product()(x); x [..., C], weight [O, C], bias [O] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        return _forward(ctx, x, weight, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer, product, wanted = ctx.saved_tensors, ctx.layer, ctx.product, ctx.needs_input_grad
        grad, rows = _operands(ctx, grad).flatten(0, -2), x.flatten(0, -2)
        grad_x = grad_weight = outside = None
        if layer.gradient == "straight-through":
            if wanted[0]:
                grad_x = grad @ product.weight.float().mul_(product.scale_w).to(ctx.dtype)
            if wanted[1]:
                seen, outside, step = _seen(rows, product.scale_x, ctx.dtype)
                grad_weight = _times(grad.T @ seen, step)
        else:
            codes, scaled = quant.quantise(rows, product.scale_x), grad * product.scale_w.flatten()
            if wanted[0]:
                terms = _terms(layer, "a", x.device)
                parts = (scaled @ _look_up(q, product.weight) * _look_up(p, codes) for p, q in terms)
                grad_x = _total(parts, rows)
            if wanted[1]:
                terms = _terms(layer, "b", x.device)
                parts = (grad.T @ _look_up(p, codes) * _look_up(q, product.weight) for p, q in terms)
                grad_weight = _total(parts, product.weight).mul_(product.scale_x)
        grad_x = _stopped(grad_x, rows, product.scale_x, outside).view(x.shape) if wanted[0] else None
        grad_weight = grad_weight.to(ctx.weight_dtype) if wanted[1] else None
        return grad_x, grad_weight, _channel_sums(grad) if wanted[2] else None, None


class Activations(torch.autograd.Function):
    """y = float32(sum over k of M(code of a, code of b)) * (s_a * s_b); a [..., M, K], b [..., K, N]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(a, b, layer.scale_a, layer.scale_b)
        ctx.layer, ctx.dtype = layer, torch.bfloat16 if _mixed(layer, a) else torch.float32
        codes = quant.quantise(a, layer.scale_a), quant.quantise(b, layer.scale_b)
        sums = factored.float_sums(*codes, layer.multiplier)  # spares two passes over what may be a large result
        sums = kernels.matmul(*codes, layer.multiplier).float() if sums is None else sums
        mixed = torch.is_autocast_enabled(a.device.type)
        return sums.mul_(layer.scale_a * layer.scale_b).to(
            ctx.dtype if mixed else torch.promote_types(a.dtype, b.dtype)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale_a, scale_b = ctx.saved_tensors
        layer, (want_a, want_b, _) = ctx.layer, ctx.needs_input_grad
        grad, grad_a, grad_b = _operands(ctx, grad), None, None
        if layer.gradient == "straight-through":
            if want_a:
                seen, _, step = _seen(b, scale_b, ctx.dtype)
                grad_a = _times(grad @ seen.mT, step)
            if want_b:
                seen, _, step = _seen(a, scale_a, ctx.dtype)
                grad_b = _times(seen.mT @ grad, step)
        else:
            x, y = quant.quantise(a, scale_a), quant.quantise(b, scale_b)
            if want_a:
                parts = (grad @ _look_up(q, y).mT * _look_up(p, x) for p, q in _terms(layer, "a", a.device))
                grad_a = _total(parts, a) * scale_b
            if want_b:
                parts = (_look_up(p, x).mT @ grad * _look_up(q, y) for p, q in _terms(layer, "b", a.device))
                grad_b = _total(parts, b) * scale_a
        grad_a = _stopped(grad_a, a, scale_a) if want_a else None
        grad_b = _stopped(grad_b, b, scale_b) if want_b else None
        return grad_a, grad_b, None


def _total(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    total = None
    for part in parts:
        total = part if total is None else total.add_(part)
    return torch.zeros_like(like, dtype=torch.float32) if total is None else total
