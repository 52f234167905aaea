"""The steps of a frozen network: each runs on the int8 units, and each has a law to run by.

A value is a float tensor, or codes: 0..127 in uint8 where they come from the units, int8 in the law.

Chapter: 06, "Faster than float32?"
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from axmoe_lite.kernels import factored, int8, reference
from axmoe_lite.kernels.encode import LIMIT, encode
from axmoe_lite.kernels.products import ConvProduct
from axmoe_lite.layers import ApproxConv2d
from axmoe_lite.layers.modules import Approximate, spread


@dataclass(eq=False)
class Run:
    """A node that runs as it is: a module, a function, a method or an attribute."""

    node: fx.Node
    call: Callable | None  # modules are called as they were when frozen

    def run(self, values: dict, buffers: dict) -> Any:
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda n: values[n])
        if self.node.op == "call_method":
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)
        return self.call(*args, **kwargs)

    def law(self, values: dict) -> Any:
        if isinstance(self.call, Approximate):
            args = fx.node.map_arg(self.node.args, lambda n: values[n])
            y = _layer_by_law(self.call, *args)
            if hasattr(self.call, "weight"):
                return y.to(self.call.weight.dtype)
            return y if torch.is_autocast_enabled(y.device.type) else y.to(torch.result_type(*args))
        return self.run(values, {})


@dataclass(eq=False)
class Encode:
    """Floats or codes of ``source`` to the bytes that the units multiply, for one or more convolutions."""

    source: fx.Node
    product: ConvProduct
    from_codes: bool
    offset: int

    def key(self) -> tuple:
        scale = None if self.from_codes else self.product.inverse_scale
        return (
            self.source,
            self.product.factors,
            scale,
            self.offset,
            self.product.options["groups"],
            self.product.by_hand,
        )

    def run(self, values: dict, buffers: dict) -> Tensor:
        product, x = self.product, values[self.source]
        if x.ndim != 4 or x.shape[1] != product.in_channels:
            raise ValueError(
                f"A frozen network takes batches of images [N, C, H, W]; a convolution of {product.in_channels}"
                f" channels met {list(x.shape)}."
            )
        x = factored.padded(x, product.by_hand)
        rows = x.permute(0, 2, 3, 1).contiguous()
        shape = (*rows.shape[:-1], rows.shape[-1] * product.factors.rank)
        dtype = torch.uint8 if self.offset or self.from_codes else torch.int8
        where = (self, shape)  # not by shape alone: a later layer may read what two others have encoded since
        if where not in buffers:
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                buffers[where] = torch.empty(shape, dtype=dtype)
        quantisation = {} if self.from_codes else {"inverse_scale": product.inverse_scale}
        least = -LIMIT if self.offset else 0
        groups, out = product.options["groups"], buffers[where]
        encode(rows, product.factors, groups=groups, offset=self.offset, least=least, out=out, **quantisation)
        return out.view(torch.uint8).permute(0, 3, 1, 2)

    def law(self, values: dict) -> Tensor:
        x = values[self.source]
        return x if self.from_codes else codes_of_law(x, self.product.inverse_scale)


@dataclass(eq=False)
class Convolve:
    """A convolution with all that follows it, by laws (1) and (2)."""

    bytes_of: Any  # the key of the Encode step, or the node whose codes are the bytes already
    product: ConvProduct
    units: int8.PackedConv2d
    residual: fx.Node | None
    in_place: bool  # the residual's memory receives the result: nobody reads it afterwards
    ceiling: float | None  # None: no ReLU; infinity: an ordinary one
    code_scale: float | None

    def run(self, values: dict, buffers: dict) -> Tensor:
        x = values[self.bytes_of]
        if self.residual is None:
            return self.units(x, ceiling=self.ceiling, code_scale=self.code_scale)
        residual = values[self.residual]
        if self.in_place and self.ceiling in (None, torch.inf) and residual.shape == self.units.result_shape(x.shape):
            residual = residual.contiguous(memory_format=torch.channels_last)
            return self.units(x, add_to=residual, ceiling=self.ceiling)
        y = self.units(x) + residual  # which may be of another shape, or a number
        return y if self.ceiling is None else y.clamp_(0, self.ceiling)

    def law(self, values: dict) -> Tensor:
        product = self.product
        columns, table = product.multiplier.columns(product.weight), product.multiplier.table
        sums = _channels_last(reference.conv2d(values[self.bytes_of], columns, table, **product.options))
        scale = self.units.scale * 0.5**product.factors.shift
        y = sums.float() * scale.view(-1, 1, 1) + self.units.bias.view(-1, 1, 1)
        y = y if self.residual is None else y + values[self.residual]
        y = y if self.ceiling is None else y.clamp(0, self.ceiling)
        if self.code_scale is None:
            return y
        return codes_of_law(y, float(1.0 / torch.tensor(self.code_scale)), least=0)


@dataclass(eq=False)
class PoolCodes:
    """Max pooling of codes: rounding is monotonic, so the largest code is the code of the largest value."""

    source: fx.Node
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def run(self, values: dict, buffers: dict) -> Tensor:
        x = values[self.source].permute(0, 2, 3, 1)  # torch's own pooling refuses bytes
        for axis in (1, 2):
            k, s, p = (pair[axis - 1] for pair in (self.kernel, self.stride, self.padding))
            if p:  # with zeros, below which no code lies
                x = nn.functional.pad(x, (0, 0, p, p) if axis == 2 else (0, 0, 0, 0, p, p))
            length = (x.shape[axis] - k) // s + 1
            shifted = [
                x.narrow(axis, i, (length - 1) * s + 1)[(slice(None),) * axis + (slice(None, None, s),)]
                for i in range(k)
            ]
            x = shifted[0]
            for other in shifted[1:]:
                x = torch.maximum(x, other)
        return x.permute(0, 3, 1, 2)

    def law(self, values: dict) -> Tensor:
        x = values[self.source].float()
        return nn.functional.max_pool2d(x, self.kernel, self.stride, self.padding).to(torch.int8)


def codes_of_law(x: Tensor, inverse_scale: float, least: int = -LIMIT) -> Tensor:
    """Law (2) in plain torch: int8."""
    return (x.float() * inverse_scale).round().clamp(least, LIMIT).nan_to_num(nan=0.0).to(torch.int8)


def _channels_last(x: Tensor) -> Tensor:
    """The layout of the pipeline: what stays eager adds up in an order that depends on it."""
    return x.contiguous(memory_format=torch.channels_last)


def _layer_by_law(layer: Approximate, *inputs: Tensor) -> Tensor:
    """An approximate layer that stayed eager, on the reference product."""
    table = layer.multiplier.table
    if not hasattr(layer, "product"):
        scales = (float(1.0 / getattr(layer, scale).float()) for scale in layer.SCALES)
        a, b = (codes_of_law(x, inverse) for x, inverse in zip(spread(*inputs), scales, strict=True))
        pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
        sums = torch.stack([reference.matmul(x, y, table) for x, y in pairs])
        return sums.view(*a.shape[:-1], b.shape[-1]).float() * (layer.scale_a * layer.scale_b)
    product, (x,) = layer.product(), inputs
    if isinstance(layer, ApproxConv2d):
        if layer.image_padding is not None:
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = nn.functional.pad(x, layer.image_padding, mode=mode)
        codes = codes_of_law(x, product.inverse_scale)
        columns = layer.multiplier.columns(product.weight)
        sums = _channels_last(reference.conv2d(codes, columns, table, **product.options))
        scale, bias = (None if t is None else t.view(-1, 1, 1) for t in (product.scale, product.bias))
    else:
        codes = codes_of_law(x, product.inverse_scale).view(-1, x.shape[-1])
        sums = reference.matmul(codes, layer.multiplier.columns(product.weight).T, table).view(*x.shape[:-1], -1)
        scale, bias = product.scale, product.bias
    return sums.float() * scale if bias is None else sums.float() * scale + bias
