"""A network as a row of layers, each described by its shape alone, and cut between them into stages.

    layers = describe(network, x)                   name, N, K, M, groups of each, in the order of execution
    stages = split(network, x, [0, 8, 22])          layers 0 to 7, and 8 to 21, each a module of its own
    seams(network, x)                               where it can be cut
    chain(stages, x)                                the network's answers, in every bit

torch.fx follows the network once while it runs on x, so every size is known. What a convolution or a fully
connected layer costs depends on its matrix product: N rows of the image matrix, K numbers in each, M filters
(Pipe-it's GEMM view). What runs between two layers (BatchNorm, ReLU, additions) belongs to the first of them.

An ``if`` on a size is decided as x decides it. An ``if`` on a number computed from the image cannot be cut at,
because another image takes another way; only mixtures of experts may do so, each inside one step.

Letters: N, K, M as above; B images; T, S tokens; D features; h heads; W layers.

Chapter: 19, "Which core for which layer?"
"""

import importlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from axmoe_lite.search.pipeit.follow import Followed, follow
from axmoe_lite.search.pipeit.shapes import Layer


def describe(model: nn.Module, x: Tensor) -> list[Layer]:
    """The layers of a network in the order in which they run on x; a layer that is called twice is there twice.

    Found are convolutions, linear layers and attention, as modules or as functions (``F.linear``, ``@``, ...);
    products of two activations are of kind ``"linear"`` with one group for each pair of matrices. The MACs of the
    modules add up to what :func:`axmoe_lite.cost.count` counts. Left out are recurrent layers, quadratic forms such
    as ``nn.Bilinear``, and an ``einsum`` of more than two factors.

    A mixture of experts is one step of the graph, and its gate and experts are layers of their own, each
    described as if every item came to it: expert e takes p_e of that time on average, p_e the share of the items
    that :func:`axmoe_lite.moe.statistics` or ``cost.count`` measures.

    Args:
        model: any module that takes one tensor; left as it is, and run in evaluation mode.
        x: [B, ...] as the model expects it. One image will do; N grows with B.

    Raises:
        ValueError: for a model that torch.fx cannot trace, that is a cluster of networks, or that has no layers.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    >>> for layer in describe(net, torch.zeros(1, 3, 8, 8)):
    ...     print(layer)
    Layer(name='0', n=36, k=27, m=8, groups=1, kind='conv')
    Layer(name='3', n=1, k=288, m=10, groups=1, kind='linear')
    """
    return follow(model, x).layers


def split(model: nn.Module, x: Tensor, cuts: Sequence[int]) -> list[nn.Module]:
    """The model cut into stages: stage i has ``layers[cuts[i]:cuts[i + 1]]`` of :func:`describe`, and what is between.

    A step without products belongs to the stage of the latest layer before it. A value that a later stage reads,
    as a residual, is handed on by all stages between. A stage takes what the one before gave: one tensor, or a
    tuple with one entry for each argument. See :func:`chain`.

    Args:
        model, x: as in :func:`describe`. Sizes that the model needs as Python numbers (in an ``if`` or a ``range``)
            are those of x, so trace with the image size to be used, and where the model does so with the
            batch size, with that too.
        cuts: rising, from 0 to the number of layers. For a split into stages of so many layers each it is
            ``[0, *itertools.accumulate(split)]``.

    Returns:
        A GraphModule for each stage, in evaluation mode. Their weights are the model's, not copies of them. They can
        be pickled wherever the model's own modules can.

    Raises:
        ValueError: as :func:`describe`; for cuts that do not rise, leave a layer out, ask for more stages than there
            are layers, or lie inside a step of several (see :func:`seams`); for a model that answers otherwise when
            it is run again.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)).eval()
    >>> x = torch.ones(2, 3, 8, 8)
    >>> stages = split(net, x, [0, 1, 2])
    >>> [[type(m).__name__ for m in stage.children()] for stage in stages], torch.equal(chain(stages, x), net(x))
    ([['Conv2d', 'ReLU', 'Flatten'], ['Linear']], True)
    """
    cuts = _check_cuts_rise(cuts)
    traced = follow(model, x)
    stage_of = _stages_of_nodes(traced, cuts)
    stages = [_stage(traced, stage_of, i) for i in range(len(cuts) - 1)]
    with torch.no_grad():
        got = chain(stages, x.clone())
    same = not isinstance(got, Tensor) or (
        got.shape == traced.answer.shape and torch.allclose(got, traced.answer, rtol=1e-3, atol=1e-4, equal_nan=True)
    )
    if not same:
        raise ValueError(
            f"The stages of this {type(model).__name__} do not answer as it did: it draws random numbers, or changes"
            " its own values while it runs. Take that out of its forward."
        )
    return stages


def seams(model: nn.Module, x: Tensor) -> list[int]:
    """Where :func:`split` can cut: rising numbers from 0 to the number of layers, all but those inside one step.

    Steps of several layers are mixtures of experts, and attention that torch computes in one call. A schedule for such
    a network is made over steps: ``numpy.add.reduceat(times, seams[:-1])`` are theirs.

    >>> block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    >>> seams(nn.Sequential(nn.Linear(4, 4), block), torch.ones(1, 3, 4))
    [0, 1, 7]
    """
    traced = follow(model, x)
    return [first for first, _ in traced.at.values()] + [len(traced.layers)]


def chain(stages: Sequence[nn.Module], x: Any) -> Any:
    """Run stages one after the other in this process: what the last of them gives.

    >>> chain([nn.ReLU(), nn.Flatten()], torch.tensor([[[-1.0, 2.0]]]))
    tensor([[0., 2.]])
    """
    for stage in stages:
        x = stage(*x) if type(x) is tuple else stage(x)
    return x


# ---------------------------------------------------------------------------------- cutting


def _check_cuts_rise(cuts: Sequence[int]) -> list[int]:
    cuts = list(cuts)
    if len(cuts) < 2 or cuts[0] != 0 or any(isinstance(c, bool) or not hasattr(c, "__index__") for c in cuts):
        raise ValueError(f"cuts is {cuts}; it begins with 0, ends with the number of layers and rises, as [0, 8, 22].")
    return [int(c) for c in cuts]


def _stages_of_nodes(traced: Followed, cuts: list[int]) -> dict[fx.Node, int]:
    """Which stage computes which node: that of the latest layer before it."""
    layers = traced.layers
    if len(cuts) - 1 > len(layers):
        raise ValueError(f"cuts asks for {len(cuts) - 1} stages; there are {len(layers)} layers, so at most as many.")
    if cuts[-1] != len(layers) or any(b <= a for a, b in itertools.pairwise(cuts)):
        raise ValueError(f"cuts is {cuts}; it must rise from 0 to {len(layers)}, the number of layers.")
    stage_of, stage = {}, 0
    for node in traced.graph.nodes:
        if node in traced.at:
            first, several = traced.at[node]
            inside = [c for c in cuts if first < c < first + several]
            if inside:
                raise ValueError(
                    f"A cut at {inside[0]} lies inside {str(node)!r}, one step that is layers {first}"
                    f" ({layers[first].name!r}) to {first + several - 1}; cut at {first} or {first + several}. seams()"
                    " says where one can."
                )
            while cuts[stage + 1] <= first:
                stage += 1
        stage_of[node] = stage
    return stage_of


def _stage(traced: Followed, stage_of: dict[fx.Node, int], i: int) -> fx.GraphModule:
    graph, new = fx.Graph(), {}
    takes, gives = _crossing(traced.graph, stage_of, i), _crossing(traced.graph, stage_of, i + 1)
    new.update({node: graph.placeholder(node.name) for node in takes})

    def here(node: fx.Node) -> fx.Node:
        if node not in new:  # weights are read where they are used, and never travel
            new[node] = graph.node_copy(node)
        return new[node]

    for node in traced.graph.nodes:
        if stage_of[node] == i and node.op not in ("placeholder", "get_attr", "output"):
            new[node] = graph.node_copy(node, here)
    if i == max(stage_of.values()):
        output = next(node for node in traced.graph.nodes if node.op == "output")
        graph.output(fx.node.map_arg(output.args[0], here))
    else:
        alone = len(gives) == 1 and gives[0].meta["is_tensor"]
        graph.output(new[gives[0]] if alone else tuple(new[node] for node in gives))
    return _Stage(traced.root, graph, class_name=f"Stage{i}").eval()


def _crossing(graph: fx.Graph, stage_of: dict[fx.Node, int], i: int) -> list[fx.Node]:
    """Values made before stage i and read in it or after, in the order in which they are made."""
    return [
        node
        for node in graph.nodes
        if node.op != "get_attr"
        and (node.op == "placeholder" if i == 0 else stage_of[node] < i and any(stage_of[u] >= i for u in node.users))
    ]


class _Stage(fx.GraphModule):
    """A GraphModule that is pickled step by step, where torch.fx would trace its source again, and may fail to."""

    def __reduce__(self) -> tuple:
        holder = nn.Module()
        for kind in ("_parameters", "_buffers", "_modules"):
            setattr(holder, kind, getattr(self, kind))
        steps = [
            (
                node.op,
                node.name,
                _called(node.target),
                *fx.node.map_arg((node.args, node.kwargs), lambda n: _Answer(n.name)),
            )
            for node in self.graph.nodes
        ]
        return _rebuilt, (type(self).__name__, holder, steps)


@dataclass(frozen=True)
class _Answer:
    """Of the step of this name."""

    name: str


@dataclass(frozen=True)
class _Function:
    """What its module calls so: torch has some, such as max_pool2d, that pickle does not find."""

    module: str
    name: str


def _called(target: Any) -> Any:
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    known = isinstance(module, str) and getattr(sys.modules.get(module), name, None) is target
    return _Function(module, name) if known else target


def _rebuilt(name: str, holder: nn.Module, steps: list[tuple]) -> _Stage:
    graph, made = fx.Graph(), {}
    for op, step, target, args, kwargs in steps:
        target = (
            getattr(importlib.import_module(target.module), target.name) if isinstance(target, _Function) else target
        )
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: made[a.name] if isinstance(a, _Answer) else a)
        made[step] = graph.create_node(op, target, args, kwargs, name=step)
    return _Stage(holder, graph, class_name=name).eval()
