"""Weights tuned to a circuit, against trying everything."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from axmoe_lite import EVOAPPROX, errors, kernels, multiplier
from axmoe_lite.multipliers.tuning import tuned, weight_map


@pytest.mark.parametrize("name", ["mul8s_1L2J", "mul8s_1L12", "drum(3)", "swap:mul8s_1L2N"])
def test_the_map_is_what_trying_everything_finds(name, draw):
    m = multiplier(name)
    counts = torch.randint(0, 9, (256,), generator=torch.Generator().manual_seed(1))
    for a, weights in ((None, torch.ones(256, dtype=torch.long)), (counts, counts)):
        found = weight_map(m, a=a)
        for w in {-128, -127, 0, 1, 127, *draw(5).tolist()}:
            away = {}
            for v in range(-127, 128):
                meant, answer = w * np.arange(-128, 128), m.table[:, v + 128].numpy()
                away[v] = int((weights.numpy() * np.abs(meant - answer)).sum())
            wanted = min(away, key=lambda v: (away[v], abs(v - w), v))
            assert found[w + 128] == (wanted if w != -128 else -128), (w, found[w + 128], wanted)
    assert found.dtype == torch.int8 and found.shape == (256,)


def test_ties_go_to_the_nearest_then_the_smaller():
    """Weights count in steps of 10 only, all activations alike: 4 is nearest to 0, 5 is as far from 0 as from 10."""
    steps = torch.arange(-128, 128)
    coarse = torch.where(steps % 10 == 0, steps, 1000)
    found = weight_map(replace(multiplier("mul8s_1KV6"), name="steps", table=steps[:, None] * coarse[None, :]))
    assert [int(found[w + 128]) for w in (0, 4, 5, 6, -4, -5, -6, 127, -127)] == [0, 0, 0, 10, 0, -10, -10, 120, -120]
    alike = replace(multiplier("mul8s_1KV6"), name="zeros", table=torch.zeros(256, 256, dtype=torch.int32))
    assert weight_map(alike).tolist() == list(range(-128, 128)), "where nothing is gained nothing moves"


@pytest.mark.parametrize("name", EVOAPPROX)
def test_tuning_never_makes_a_circuit_worse(name):
    m, t = multiplier(name), tuned(multiplier(name))
    assert errors(t).mae <= errors(m).mae and (t.name, t.power_mw) == (f"tuned:{name}", m.power_mw)
    assert torch.equal(t.table[:, 0], m.table[:, 0]), "no weight is -128"
    assert torch.equal(tuned(t).table, t.table), "tuned twice is tuned once"
    relu = torch.arange(-128, 128) >= 0
    after = tuned(m, after_relu=True)
    assert errors(after, a=relu).mae <= min(errors(m, a=relu).mae, errors(t, a=relu).mae)
    assert after.name == f"tuned_relu:{name}" and after.delay_ns == m.delay_ns


def test_what_tuning_gains():
    """Mean absolute error before and after, uniform operands: the seven best circuits and 1KXF have nothing to gain."""
    before, after = ({name: errors(of(multiplier(name))).mae for name in EVOAPPROX} for of in (lambda m: m, tuned))
    changed = {name for name in EVOAPPROX if after[name] < before[name]}
    assert changed == {"mul8s_1L2J", "mul8s_1KX5", "mul8s_1L2L", "mul8s_1L2N", "mul8s_1L12"}
    assert tuned(multiplier("mul8s_1KV6")).digest == multiplier("mul8s_1KV6").digest
    assert after["mul8s_1L2L"] == pytest.approx(125.87, abs=0.01) and before["mul8s_1L2L"] == pytest.approx(
        149.78, abs=0.01
    )


def test_a_tuned_multiplier_is_a_network_with_tuned_weights(draw):
    """The same weights under M' = M(a, map(w)), or mapped weights under M: the same integers."""
    m = multiplier("mul8s_1L2N")
    codes, weights = draw(23, 40), draw(40, 9).clamp_min(-127)
    mapped = weight_map(m)[weights.long() + 128]
    assert not torch.equal(mapped, weights)
    assert torch.equal(kernels.matmul(codes, weights, tuned(m)), kernels.matmul(codes, mapped, m))
