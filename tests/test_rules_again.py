"""The same call again, and on more threads, gives the same bits."""

import contextlib
from unittest import mock

import pytest
import torch
from operands import (
    codes,
    convolved,
    equal,
    floats,
    layer_of,
    multiplied,
    small_network,
    table,
)

from axmoe_lite import (
    EXACT,
    approximate,
    layers,
    models,
    train,
)
from axmoe_lite.kernels import encode, factored, lookup
from axmoe_lite.kernels.products import ConvProduct, LinearProduct
from axmoe_lite.pipeline import freeze

# ------------------------------------------------------------------------------------- again, and on more threads


@contextlib.contextmanager
def threads(count):
    """So many threads for torch and for the compiled loops, which run on torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results(m, path):
    """Of operands that are large enough to be shared out."""
    a, b = codes((300, 40), "whole range", 0), codes((40, 20), "whole range", 1)
    yield multiplied(a, b, m, path)
    yield multiplied(a.view(3, 100, 40), b.expand(3, -1, -1), m, path)
    yield convolved(codes((3, 6, 23, 24), "whole range", 2), codes((8, 3, 3, 3), "extremes", 3), m, path, groups=2)
    if path != "auto":
        return
    w, image, rows = codes((8, 3, 3, 3), "whole range", 4), floats((5, 6, 40, 40), 5, torch.float32), a.float()
    units = {"scale_w": torch.tensor(0.7), "scale_x": 0.37}
    yield ConvProduct(w, m, **units, bias=torch.arange(8.0), padding=(1, 1), groups=2)(image)
    yield LinearProduct(b.T, m, **units, bias=None)(rows)
    yield encode.encode(image, factored.factors_of(table(EXACT)), inverse_scale=2.7)
    yield encode.codes_in_bfloat16(image, 0.37)[0]
    yield encode.round_trip(image, 0.37)[0]
    with torch.no_grad():
        yield layer_of(layers.Matmul(), m)(rows.view(3, 100, 40), rows.view(3, 100, 40).mT)
        network, x = small_network(0)
        approximate(network, dict.fromkeys(("0", "3"), m), calibration=x)
        yield freeze(network[:5])(image[:, :3])
        yield network[:4](image[:, :3])


@pytest.mark.trust("rule", "1, 2 and 4 threads, and the same call again: the same bits")
@pytest.mark.parametrize("key", [("mul8s_1KVA",), ("drum(4)",), ("low rank", 0, 2)], ids=str)
@pytest.mark.parametrize("way", ["auto", "factored", *lookup.BACKENDS])
def test_threads(way, key, record_property):
    if way in lookup._obstacles():
        pytest.skip(f"{way}: {lookup._obstacles()[way]}")
    path, backend = ("lookup", way) if way in lookup.BACKENDS else (way, "")
    found = []
    with mock.patch.object(lookup, "WORTH_A_THREAD", 1000), mock.patch.dict("os.environ", {lookup.SWITCH: backend}):
        for count in (1, 2, 4, 2):
            with threads(count):
                found.append([result.clone() for result in results(table(*key), path)])
    assert all(equal(ours, theirs) for others in found[1:] for ours, theirs in zip(others, found[0], strict=True))
    record_property("cases", 3 * len(found[0]))


@pytest.fixture(scope="module")
def retrained(textures):
    """Two steps of retraining from one seed: the network after them, of 1, 2 and again 2 threads."""
    networks, images = [], textures.subset(n_train=64, n_test=16)
    for count in (1, 2, 2):
        with threads(count):
            network = models.resnet8(classes=4, width=0.25, seed=3)
            train.calibrate(network, "mul8s_1L2L", images, n=32)
            train.retrain(network, images, epochs=1, batch_size=32, evaluate_every=0, progress=False, seed=5)
        networks.append(network.eval())
    return networks


@pytest.mark.trust("rule", "retraining from the same seed again: the same network")
def test_the_same_retraining_again(retrained):
    one, other = (network.state_dict() for network in retrained[1:])
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.trust("rule", "retrained on 1 or on 2 threads: products of the same weights are the same")
def test_retraining_on_more_threads(retrained, textures):
    # Not promised: equal weights. Two threads add the floats of a gradient, or of BatchNorm's averages, in another
    # order, and training ends a little elsewhere. Promised: whatever the weights are, products are the circuit's.
    one, two = (list(network.parameters()) for network in retrained[:2])
    assert max((a - b).abs().max() for a, b in zip(one, two, strict=True)) < 0.01
    x = textures.normalised(textures.x_test[:16])
    for network in retrained[:2]:
        found = []
        for count in (1, 2):
            with threads(count), torch.no_grad():
                found.append(network.conv1(x))
        assert equal(*found)
