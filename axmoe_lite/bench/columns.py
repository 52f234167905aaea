"""The columns of a case: one piece of work in float32, under each multiplier, frozen, and by naive lookups.

Chapter: 06, "Faster than float32?"
"""

import copy
import functools
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from axmoe_lite import pipeline
from axmoe_lite.bench.gather import GatherLayer
from axmoe_lite.layers import approximable, approximate, default_layers
from axmoe_lite.multipliers import EVOAPPROX, EXACT, Mosaic, Multiplier, mosaic_name, multiplier

SEED = 0
FLOAT32, PREPARED, NAIVE, FROZEN = "float32", "float32 prepared", "naive gather", " frozen"
RANK_2 = "broken_array(1,0,2)"
HIGH_RANK = ("mitchell()", "random table")  # rank 64 and 256: looked up, not factored
FEW = (EXACT, "mul8s_1L2J", "mul8s_1KVA", "random table")  # one term (twice), five terms, a lookup
CYCLE = [EVOAPPROX[i % len(EVOAPPROX)] for i in range(64)]
MOSAICS = {  # several multipliers in one layer: of 64 filters and channels, of 3 x 3 cells, or of any channels
    "three ROUPs by row": "row[roup(0,2), roup(0,4), roup(1,4)]",
    "thirteen by filter": mosaic_name(CYCLE),
    "thirteen by channel": mosaic_name(CYCLE, by="channel"),
    "L2L, other signs": "signs:mul8s_1L2L",
    "KVA, other signs": "signs:mul8s_1KVA",
}
GATHERED = "mul8s_1L2J"  # what the naive gather computes; its speed does not depend on the table


def random_table(*, seed: int = SEED) -> Multiplier:
    """A table without any structure, of 15-bit products: the worst case, of rank 256."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-(2**14), 2**14, (256, 256), generator=generator)
    return Multiplier("random table", table, source=f"random, seed {seed}")


def planted_table(rank: int, *, seed: int = SEED) -> Multiplier:
    """A table of exactly this rank whose factors fit int8 units.

    The first ``rank`` entries of its right factors are the unit matrix and the left ones begin with it: the
    right factors are then Hermite's form of their lattice, and factorise() finds these very bytes again.

    >>> from axmoe_lite import factorise
    >>> found = factorise(planted_table(12))
    >>> found.rank, int(max(found.u.abs().max(), found.v.abs().max()))
    (12, 7)
    """
    if not 1 <= rank <= 64:
        raise ValueError(f"A table of rank {rank} was asked for; 1 to 64 can be planted.")
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randint(-7, 8, (rank, 256), generator=generator) for _ in range(2))
    u[:, :rank] = v[:, :rank] = torch.eye(rank, dtype=torch.int64)
    return Multiplier(f"rank {rank}", u.T @ v, source=f"random factors, seed {seed}")


@functools.cache
def table_of(name: str) -> Multiplier | Mosaic:
    """The multiplier of a column: a name of the catalogue or of :data:`MOSAICS`, a random or a planted table."""
    if name.startswith("rank "):
        return planted_table(int(name.removeprefix("rank ")))
    return random_table() if name == "random table" else multiplier(MOSAICS.get(name, name))


class _Only(nn.Module):
    """One layer as a network of one input; a product's second operand is a constant."""

    def __init__(self, layer: nn.Module, others: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.layer, self.others = layer, others
        self.anchor = nn.Parameter(torch.empty(0))  # calibration asks the first parameter for the device

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, *self.others)


def approximated(network: nn.Module, layers: list[str], x: Tensor, names: Iterable[str]) -> dict[str, nn.Module]:
    """A copy of the network for each multiplier, calibrated once; all share the weights' memory."""
    shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
    base = approximate(copy.deepcopy(network, dict(shared)), dict.fromkeys(layers, EXACT), calibration=x)
    copies = {name: copy.deepcopy(base, dict(shared)) for name in names}
    return {name: approximate(net, dict.fromkeys(layers, table_of(name))) for name, net in copies.items()}


def gathered(network: nn.Module) -> nn.Module:
    """A copy of an approximate network whose layers are the naive simulator's."""
    network = copy.deepcopy(network)
    for name, layer in approximable(network).items():
        if hasattr(layer, "multiplier"):
            network.set_submodule(name, GatherLayer(layer))
    return network


def layer_columns(layer: nn.Module, inputs: tuple[Tensor, ...], names: Iterable[str], part: int) -> tuple[dict, dict]:
    """float32 in, float32 out: the exact layer, each multiplier, and the naive gather on ``part`` of the inputs."""
    x, others = inputs[0], inputs[1:]
    network = _Only(layer, others).eval()
    changed = approximated(network, ["layer"], x, names)
    columns = {FLOAT32: functools.partial(network, x)}
    columns |= {name: functools.partial(net, x) for name, net in changed.items()}
    if GATHERED not in changed or not part:
        return columns, {}
    naive = gathered(changed[GATHERED]).layer
    columns[NAIVE] = functools.partial(naive, *(t[:part] for t in inputs))
    return columns, {NAIVE: part / len(x)}


def prepared(network: nn.Module, x: Tensor) -> nn.Module:
    """The float32 network as one would ship it: BatchNorm folded, layers fused, weights laid out for oneDNN."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # it is meant for images of this size
        warnings.simplefilter("ignore", DeprecationWarning)
        ready = torch.jit.optimize_for_inference(torch.jit.trace(network, x, check_trace=False))
        for _ in range(3):  # the first calls look at shapes and compile
            ready(x)
    return ready


def network_columns(
    network: nn.Module, x: Tensor, names: Iterable[str], *, frozen: bool, part: int
) -> tuple[dict, dict]:
    """The same of a whole network, in float32 as one would ship it too, and frozen where that is asked for."""
    changed = approximated(network, default_layers(network), x[:64], names)
    columns = {FLOAT32: functools.partial(network, x), PREPARED: functools.partial(prepared(network, x), x)}
    for name, net in changed.items():
        columns[name] = functools.partial(net, x)
        if frozen and name not in HIGH_RANK:
            columns[name + FROZEN] = functools.partial(pipeline.freeze(net), x)
    if not part:
        return columns, {}
    columns[NAIVE] = functools.partial(gathered(changed[GATHERED]), x[:part])
    return columns, {NAIVE: part / len(x)}
