"""Whole networks as an integer pipeline: eight-bit tensors flow between layers, one operation a layer.

    frozen = freeze(network)     # a network in which approximate() has placed multipliers
    frozen(x)                    # the same scores, sooner
    frozen.thaw()                # the network as it was

A convolution takes its BatchNorm, its ReLU, the residual addition and the next layer's rounding with it.
Its law, each step rounded to float32, with g[c] the folded BatchNorm's gain and shift:

    y = float32(accumulator) * scale[c] + bias[c]         scale[c] = s_x s_w[c] g[c],  bias[c] = shift[c]     (1)
    y = y + residual                                      where there is one
    y = min(max(y, 0), ceiling)                           where there is a ReLU; ceiling 6 for ReLU6
    code = round(y * float32(1 / s_next)), cut to 0..127  where the next layer wants codes, half to even     (2)

:meth:`Frozen.law` computes it in plain torch on the reference product; the pipeline equals it in every bit.
The unfrozen network differs by the rounding of BatchNorm alone, which flips a code now and then.

What is not recognised runs as it is, and :attr:`Frozen.eager` says what and why. Weights are taken as they
are at the call: freeze again after training.

Chapter: 06, "Faster than float32?"
"""

import threading
from typing import Any

import torch
from torch import Tensor, fx, nn

from axmoe_lite.layers import evaluating
from axmoe_lite.layers.modules import Approximate
from axmoe_lite.layers.network import check_module
from axmoe_lite.pipeline.plan import Planner, trace
from axmoe_lite.pipeline.steps import Convolve, Run

__all__ = ["Frozen", "freeze"]


class Frozen(nn.Module):
    """A network as an integer pipeline, made by :func:`freeze`; for evaluation only.

    Attributes:
        network: the network it was made from, untouched.
        eager: what runs as it is, by name, and why; functions without products are not listed.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, steps: dict[Any, Any], eager: dict[str, str]) -> None:
        super().__init__()
        self.network, self.eager = network, eager
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._output = next(node for node in graph.nodes if node.op == "output").args[0]
        self._steps = steps
        self._drop = _last_uses(steps, self._output)
        self._local = threading.local()  # buffers, which two threads must not share
        self.training = False  # not eval(), which would reach into the network

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = {}
        buffers = self._local.buffers
        if len(buffers) > 4 * len(self._steps):  # a new image size each time must not fill the memory
            buffers.clear()
        values = self._bound(inputs)
        for key, step in self._steps.items():
            values[key] = step.run(values, buffers)
            for done in self._drop.get(key, ()):
                del values[done]
        return fx.node.map_arg(self._output, lambda n: values[n])

    @torch.no_grad()
    def law(self, *inputs: Tensor) -> Any:
        """The same by the slow and obvious way: plain torch on the reference product. Few images, please."""
        values = self._bound(inputs)
        for key, step in self._steps.items():
            values[key] = step.law(values)
        return fx.node.map_arg(self._output, lambda n: values[n])

    def train(self, mode: bool = True) -> "Frozen":
        """Nothing: it always evaluates, and the network that it was made from keeps its mode."""
        return self

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Refused: the steps hold copies of the weights."""
        raise RuntimeError(
            "A frozen network cannot load weights. Load them into the one that it was made from, frozen.thaw(), and"
            " freeze it again."
        )

    def thaw(self) -> nn.Module:
        """The network this was made from."""
        return self.network

    def _bound(self, inputs: tuple[Tensor, ...]) -> dict:
        defaults = [node.args[0] for node in self._inputs[len(inputs) :] if node.args]
        if len(inputs) + len(defaults) != len(self._inputs):
            raise ValueError(f"The network takes {len(self._inputs)} inputs; it was given {len(inputs)}.")
        return dict(zip(self._inputs, [*inputs, *defaults], strict=True))

    def __reduce__(self) -> tuple:
        # Copies are frozen anew: the units' memory can be neither copied nor written to a file.
        return freeze, (self.network,)

    def __repr__(self) -> str:
        fused = [step for step in self._steps.values() if isinstance(step, Convolve)]
        lines = [f"Frozen({type(self.network).__name__}: {len(fused)} convolutions in the pipeline"]
        lines += [f"  eager: {name}, {why}" for name, why in self.eager.items()]
        return "\n".join(lines) + ")"


def freeze(network: nn.Module) -> Frozen:
    """A network's integer pipeline, for fast evaluation; the network itself is left as it is.

    Args:
        network: one in which :func:`~axmoe_lite.approximate` has placed calibrated multipliers. Any module
            that torch.fx can trace; parts that it cannot are run as they are.

    Returns:
        Frozen, to be called like the network.

    Raises:
        ValueError: if no layer is approximate, one is not calibrated, or the network is frozen already.

    >>> from axmoe_lite import approximate
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    >>> x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> frozen = freeze(approximate(net, "mul8s_1L2J", calibration=x))
    >>> frozen, torch.equal(frozen(x), frozen.law(x))
    (Frozen(Sequential: 2 convolutions in the pipeline), True)
    """
    check_module(network)
    if isinstance(network, Frozen):
        raise ValueError("This network is frozen already; frozen.thaw() is the one that it was made from.")
    if not any(isinstance(module, Approximate) for module in network.modules()):
        raise ValueError(
            f"This {type(network).__name__} has no approximate layer, so there is nothing to freeze; call"
            " approximate(network, multiplier, calibration=images) first."
        )
    with evaluating(network), torch.no_grad():
        graph, opaque = trace(network)
        steps, eager = Planner(network, graph).plan()
    eager.update({name: "torch.fx cannot trace it" for name in sorted(opaque)})
    return Frozen(network, graph, steps, eager)


def _last_uses(steps: dict[Any, Any], output: Any) -> dict[Any, list]:
    """After which step which values are no longer needed."""
    last: dict[Any, Any] = {}
    for key, step in steps.items():
        for used in _reads(step):
            last[used] = key
    kept: set = set()
    fx.node.map_arg(output, kept.add)
    drop: dict[Any, list] = {}
    for used, key in last.items():
        if used not in kept:
            drop.setdefault(key, []).append(used)
    return drop


def _reads(step: Any) -> list:
    if isinstance(step, Run):
        return list(step.node.all_input_nodes)
    if isinstance(step, Convolve):
        return [step.bytes_of] + ([] if step.residual is None else [step.residual])
    return [step.source]
