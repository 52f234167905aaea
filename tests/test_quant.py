"""Rounding, scales and calibration, with numbers that can be redone by hand."""

import pytest
import torch

from axmoe_lite.quant import Histogram, dequantise, fake_quantise, quantise, weight_scale


def test_rounding_is_half_to_even_and_clips_at_127():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 500.0, -500.0])
    assert quantise(x, 1.0).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127]


def test_scale_multiplies_by_the_reciprocal():
    # The law says x * float32(1 / s). Halfway between two codes the last bit decides, and there a division differs.
    scale = torch.tensor(0.0237)
    x = (torch.arange(-126, 126).float() + 0.5) * scale
    by_law, divided = (torch.round(found).to(torch.int8) for found in (x * (1 / scale), x / scale))
    assert torch.equal(quantise(x, scale), by_law) and not torch.equal(by_law, divided)


def test_a_scale_for_each_channel_is_the_same_law_row_by_row():
    scales = torch.tensor([0.0237, 1.0, 3.0])
    x = torch.tensor([-9.0, -2.5, -0.5, 0.0118, 0.5, 1.5, 2.6, 126.5, 500.0]).expand(3, -1)
    rows = torch.stack([quantise(row, scale) for row, scale in zip(x, scales, strict=True)])
    assert torch.equal(quantise(x, scales[:, None]), rows)
    assert rows[1].tolist() == [-9, -2, 0, 0, 0, 2, 3, 126, 127]


def test_there_and_back_is_within_half_a_step():
    x = torch.linspace(-3, 3, 1001)
    scale = 3 / 127
    assert (dequantise(quantise(x, scale), scale) - x).abs().max() <= scale / 2 * 1.0001


def test_weight_scales():
    weight = torch.tensor([[1.0, -2.54], [0.127, 0.0]])
    assert weight_scale(weight).item() == pytest.approx(0.02)
    assert weight_scale(weight, per_channel=True).tolist() == pytest.approx([0.02, 0.001])
    assert quantise(torch.zeros(3), weight_scale(torch.zeros(2, 2))).tolist() == [0, 0, 0]


def test_straight_through_gradient():
    x = torch.tensor([-20.0, -12.74, 0.04, 3.0, 12.76], requires_grad=True)  # clipped beyond 127.5 * 0.1 = 12.75
    (fake_quantise(x, 0.1) * torch.tensor([1.0, 2, 3, 4, 5])).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_percentile_ignores_what_is_rare():
    seen = Histogram()
    x = torch.cat([torch.linspace(0, 1, 99_990), torch.full((10,), 50.0)])  # 0.01 % outliers
    seen.update(x)
    assert seen.scale("max").item() * 127 == pytest.approx(50)
    assert seen.scale("percentile", percentile=99.9).item() * 127 == pytest.approx(1, abs=0.01)
    assert seen.scale("percentile", percentile=100).item() * 127 == pytest.approx(50, abs=0.01)


def test_mse_clips_a_long_tail_and_not_a_uniform():
    uniform, tailed = Histogram(), Histogram()
    uniform.update(torch.linspace(-1, 1, 50_001))
    generator = torch.Generator().manual_seed(0)
    tailed.update(torch.randn(200_000, generator=generator))
    assert uniform.scale("mse").item() * 127 == pytest.approx(1, abs=0.02)
    # The best clip of a Gaussian at 8 bits lies near 4 standard deviations; its largest of 200,000 near 4.5.
    assert 3.5 < tailed.scale("mse").item() * 127 < float(tailed.largest)


def test_batches_may_be_cut_anyhow():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9000, generator=generator) * torch.logspace(-2, 1, 9000)
    whole, parts = Histogram(), Histogram()
    whole.update(x)
    for part in x.split(700):
        parts.update(part)
    for method in ("percentile", "mse", "max"):
        assert whole.scale(method) == parts.scale(method)


@pytest.mark.parametrize("power", [-130, -100, -3, 0, 5])
def test_batches_may_be_cut_where_the_largest_value_is_a_power_of_two(power):
    x = torch.tensor([1.0] * 9 + [1.5]) * 2.0**power
    whole, parts = Histogram(), Histogram()
    whole.update(x)
    for part in x.split(9):
        parts.update(part)
    assert whole.top == parts.top > whole.largest and torch.equal(whole.counts, parts.counts)


@pytest.mark.parametrize("least", [1e-36, 1e-38, 1e-45])
def test_activations_may_be_as_small_as_floats_are(least):
    seen = Histogram()
    seen.update(torch.tensor([0.0, least]))
    assert seen.counts.sum() == 2 and float(seen.scale("max")) > 0 and float(seen.scale()) > 0
    seen.update(torch.tensor([1.0]))
    assert float(seen.scale("max")) * 127 == pytest.approx(1)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf]), torch.empty(0)])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="'conv7'"):
        Histogram("conv7").update(bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf, torch.tensor([1.0, 0.0, 1.0])])
def test_a_scale_that_means_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="a scale of .* positive and finite"):
        quantise(torch.ones(3), bad)


def test_nan_has_no_code_and_becomes_0_for_one_scale_and_for_many():
    x = torch.tensor([torch.nan, 1.0])
    assert quantise(x, 0.5).tolist() == quantise(x, torch.tensor([0.5, 0.5])).tolist() == [0, 2]


def test_unknown_methods_are_refused():
    seen = Histogram()
    seen.update(torch.ones(3))
    with pytest.raises(ValueError, match="'entropy'.*'percentile'"):
        seen.scale("entropy")
    with pytest.raises(ValueError, match="percentile is 0"):
        seen.scale("percentile", percentile=0)
    with pytest.raises(ValueError, match="seen nothing"):
        Histogram("conv1").scale()


def test_all_zero_activations_have_a_usable_scale():
    seen = Histogram()
    seen.update(torch.zeros(10))
    assert quantise(torch.zeros(2), seen.scale()).tolist() == [0, 0]


def test_how_activations_lie_in_memory_changes_nothing():
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    before, seen = x.clone(), []
    lying = [x, x.contiguous(memory_format=torch.channels_last), x.permute(3, 0, 1, 2), x.repeat(1, 1, 1, 2)[..., :6]]
    for one in [*lying, x[:, :, ::2].repeat_interleave(2, 2), x.double()]:
        seen.append(Histogram())
        seen[-1].update(one)
    assert all(torch.equal(one.counts, seen[0].counts) for one in [*seen[:4], seen[5]])
    assert not torch.equal(seen[4].counts, seen[0].counts) and torch.equal(x, before)
    width = seen[0].top / Histogram.BINS
    expected = torch.bincount((x.abs() / width).floor().long().flatten(), minlength=Histogram.BINS)
    assert torch.equal(seen[0].counts, expected.double())
