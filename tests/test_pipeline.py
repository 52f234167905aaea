"""A frozen network equals its law in every bit, and the network it was made from but for BatchNorm's rounding."""

import operator

import pytest
import torch
from frozen import MANY, ROUGH, Net, check, conv, evidence, frozen_of, needs_units, settle
from torch import nn

from axmoe_lite import approximate, models
from axmoe_lite.pipeline import freeze


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------------- whole networks


def vgg_like():
    def block(c_in, c):
        return [nn.Conv2d(c_in, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *block(3, 8), nn.MaxPool2d(2, 2), *block(8, 13), *block(13, 16), nn.MaxPool2d(2, 2),
        *block(16, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 23), nn.ReLU(), nn.Dropout(), nn.Linear(23, 4),
    )  # fmt: skip


def mobile_like():
    def block(c_in, c, kernel, **options):
        return [nn.Conv2d(c_in, c, kernel, bias=False, **options), nn.BatchNorm2d(c), nn.ReLU6(inplace=True)]

    return nn.Sequential(
        *block(3, 8, 3, stride=2, padding=1),
        *block(8, 8, 3, padding=1, groups=8),  # depthwise
        nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6),  # a linear bottleneck: signed codes follow
        *block(6, 12, 3, padding=2, dilation=2, groups=3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


WHOLE = {
    "resnet20": lambda: models.resnet20(classes=4),
    "resnet8": lambda: models.resnet8(classes=4),  # padded shortcuts
    "vgg": vgg_like,
    "mobile": mobile_like,
}


@evidence
@pytest.mark.parametrize(
    "name,multiplier,per_channel",
    [
        ("resnet20", ROUGH, False),
        ("resnet8", ROUGH, True),
        ("resnet8", "mul8s_1KV6", False),  # exact products: codes are the units' bytes as they are
        ("resnet8", MANY, False),
        ("vgg", ROUGH, False),
        ("vgg", MANY, True),
        ("mobile", ROUGH, True),
        ("mobile", "mul8s_1KV8", False),
        ("mobile", "mul8s_1KV6", True),
    ],
)
def test_whole_networks_equal_their_law(name, multiplier, per_channel):
    network = settle(WHOLE[name]())
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    frozen = frozen_of(network, x, multiplier, per_channel=per_channel)
    # The float classifier at the end adds up in an order that depends on the batch, so each batch has its own law.
    batches = [x[:3], x[:1], x[1:3]]
    laws = [frozen.law(batch) for batch in batches]
    assert laws[0].shape == (3, 4) and laws[0].std() > 0
    for _ in range(2):  # other sizes in between: buffers belong to a shape
        for batch, law in zip(batches, laws, strict=True):
            assert torch.equal(frozen(batch), law)
    with torch.no_grad():
        assert (frozen(x) - network(x)).norm() < 0.05 * network(x).norm()


@evidence
def test_other_image_sizes_and_layouts(x):
    frozen = frozen_of(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(stride=2), nn.ReLU(), conv()), x)
    for shape in ((1, 4, 1, 1), (2, 4, 23, 5), (1, 4, 2, 115), (3, 4, 9, 7)):
        images = torch.randn(shape)
        assert torch.equal(frozen(images), frozen.law(images))
    assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)), frozen(x))
    strided = torch.randn(3, 4, 9, 14)[..., ::2]
    assert torch.equal(frozen(strided), frozen(strided.contiguous()))


@evidence
def test_values_without_a_number(x):
    frozen = frozen_of(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()), x)
    spoiled = x.clone()
    spoiled[0, 0, 0, 0], spoiled[1, 1, 2, 2], spoiled[2, 3, 8, 6] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(frozen(spoiled), frozen.law(spoiled)) and torch.isfinite(frozen(spoiled)).all()


@evidence
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_images_of_other_types(x, dtype):
    # The network itself takes them as the numbers they are.
    network = nn.Sequential(conv(), nn.ReLU(), conv())
    frozen, images = frozen_of(network, x), (x * 3).to(dtype)
    with torch.no_grad():
        assert torch.equal(frozen(images), network(images))


def test_a_mixed_network_under_autocast(x):
    network = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
    frozen = frozen_of(network, x, {"2": ROUGH})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), network(x))


def test_an_empty_batch(x):
    frozen = frozen_of(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.Flatten()), x)
    assert frozen(x[:0]).shape == (0, 5 * 63)


# ----------------------------------------------------------------- what may go with a convolution


@needs_units
@evidence
def test_a_chain_of_convolutions_without_batch_norm_is_the_network_itself(x):
    network = nn.Sequential(conv(), nn.ReLU(), conv(4, 5), nn.ReLU6(), conv(5, 3, 1))
    assert network[:3](x * 40).max() > 6  # ReLU6 has something to cut
    frozen = check(network, x * 40)
    assert frozen.eager == {} and "3 convolutions in the pipeline" in repr(frozen)


@needs_units
@pytest.mark.parametrize("residual", [False, True])
def test_six_is_the_ceiling_where_no_codes_follow(x, residual):
    # Before a layer that was calibrated on values up to 6, code 127 is a ceiling already; here nothing else cuts.
    network = Net(lambda net, x: net.six(net.a(x) + x if residual else net.a(x)), a=conv(), six=nn.ReLU6())
    frozen = check(network, x * 40)
    assert frozen(x * 40).max() == 6 and "1 convolutions" in repr(frozen)


def test_batch_norm_without_relu_gives_signed_codes(x):
    check(nn.Sequential(conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4, affine=False), conv()), x, same=False)
    check(nn.Sequential(conv(), conv(), conv()), x, MANY)


def test_batch_norms_epsilon_is_folded_in(x):
    # Variances lie in 0.5..1.5: without an epsilon this large, values would be 1.15 to 1.4 times what they are.
    check(nn.Sequential(conv(), nn.BatchNorm2d(4, eps=0.5), nn.ReLU(), conv(4, 3)), x, same=False)


def test_negative_gains_and_scales_for_each_channel(x):
    network = settle(nn.Sequential(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.ReLU(), conv()))
    network[1].weight.data.copy_(torch.tensor([-1.0, 1.0, -0.5, 0.0]))
    frozen = freeze(approximate(network, ROUGH, calibration=x, per_channel=True))
    assert torch.equal(frozen(x), frozen.law(x))
    with torch.no_grad():
        assert (frozen(x) - network(x)).norm() < 0.02 * network(x).norm()


def test_one_value_encoded_for_two_multipliers_and_read_late(x):
    # b and c share one encoding of r. Between them r is encoded for d, and s for e, in the same shape. Sigmoids keep
    # the additions apart, so that every convolution runs where it stands.
    def forward(net, x):
        r = torch.relu(net.a(x))
        early = net.b(r).sigmoid()
        s = torch.relu(net.d(r))
        middle = net.e(s).sigmoid()
        return torch.cat([early, middle, net.c(r).sigmoid()], 1)

    parts = {name: conv() for name in "abcde"}
    assignment = {"a": ROUGH, "b": ROUGH, "c": ROUGH, "d": "mul8s_1L2L", "e": ROUGH}
    check(Net(forward, **parts), x, assignment)


@pytest.mark.parametrize("relu", [nn.Identity(), nn.ReLU()])
def test_one_value_for_convolutions_with_two_scales(x, relu):
    def forward(net, x):
        r = net.relu(net.a(x))
        return net.b(r) + net.c(r)

    network = settle(Net(forward, a=conv(), b=conv(), c=conv(), relu=relu))
    approximate(network, {"a": ROUGH, "b": ROUGH, "c": MANY}, calibration=x)
    network.c.scale_x.mul_(0.7)
    frozen = freeze(network)
    assert torch.equal(frozen(x), frozen.law(x)) and torch.equal(frozen(x), network(x))


def test_one_convolution_called_twice(x):
    check(Net(lambda net, x: net.a(torch.relu(net.a(x))) + x, a=conv()), x)


# ------------------------------------------------------------------------------------- additions


def test_a_residual_is_added_in_place_only_at_its_last_use(x):
    # r = relu(a(x)) is floats in memory of its own. The first sum must leave it alone, the last may take it.
    def forward(net, x):
        r = torch.relu(net.a(x) + x)
        s = torch.relu(net.b(r) + r)
        return net.c(s) + s * r

    check(Net(forward, a=conv(), b=conv(), c=conv()), x)

    def last(net, x):
        r = torch.relu(net.a(x) + x)
        return torch.relu(r + net.b(r))

    check(Net(last, a=conv(), b=conv()), x)


def test_the_images_given_are_never_written_to(x):
    before = x.clone()
    check(Net(lambda net, x: torch.relu(net.a(x) + x), a=conv()), x)
    assert torch.equal(x, before)


def test_a_result_of_an_earlier_call_is_not_overwritten(x):
    frozen = frozen_of(Net(lambda net, x: net.b(torch.relu(net.a(x))) + net.a(x), a=conv(), b=conv()), x)
    first = frozen(x)
    kept = first.clone()
    frozen(-x)
    assert torch.equal(first, kept)


@evidence
@pytest.mark.parametrize(
    "add",
    [
        lambda y, x: y + y,
        lambda y, x: torch.add(y, x, alpha=2),
        lambda y, x: y.add(x, alpha=-0.5),
        lambda y, x: y.add(x),
        lambda y, x: x.add(y),
        lambda y, x: torch.add(x, y),
        lambda y, x: y + 1,
        lambda y, x: 0.5 + y,
        lambda y, x: torch.add(y, 3),
        lambda y, x: y + x + y,
        lambda y, x: y - x,
        lambda y, x: torch.add(input=y, other=x),
        lambda y, x: y + x[:, :1],  # broadcast along the channels
        lambda y, x: y + x[:1],  # ... along the images
        lambda y, x: y + x.flip(-1),
        lambda y, x: y + x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=[
        "y+y", "alpha", "method alpha", "method", "method of x", "torch", "scalar", "from the right", "torch scalar",
        "three", "minus", "keywords", "one channel", "one image", "flipped", "strided",
    ],
)  # fmt: skip
def test_ways_to_add(x, add):
    check(Net(lambda net, x: net.b(torch.relu(add(net.a(x), x))), a=conv(), b=conv()), x)


@evidence
@pytest.mark.parametrize("case", ["parameter", "larger", "smaller", "smaller and fresh"])
def test_additions_that_broadcast(x, case):
    if case == "parameter":  # [C, 1, 1], three dimensions
        network = Net(lambda net, x: net.b(net.a(x) + net.shift), a=conv(), b=conv())
        network.shift = nn.Parameter(torch.randn(4, 1, 1))
    elif case == "larger":  # the convolution's result is one pixel, what it is added to an image
        network = Net(lambda net, x: net.b(net.a(x.mean((2, 3), keepdim=True)) + x), a=conv(), b=conv())
    else:

        def forward(net, x):
            pixel, image = net.c(x.mean((2, 3), keepdim=True)), net.a(x)
            return net.b(pixel + image if case == "smaller" else image + pixel)

        network = Net(forward, a=conv(), b=conv(), c=conv(kernel=1))
    check(network, x)


def test_adding_a_number_that_the_graph_computes(x):
    check(Net(lambda net, x: net.b(net.a(x) + x.size(1)), a=conv(), b=conv()), x)


@pytest.mark.parametrize("alias", [nn.Identity(), nn.Dropout(), nn.Unflatten(1, (2, 2))], ids=repr)
def test_a_residual_that_has_another_name_is_not_overwritten(x, alias):
    # The alias shares r's memory and is read after the sum that would be written there.
    def forward(net, x):
        r = torch.relu(net.a(x))
        other = net.alias(r)
        s = r + net.b(r)
        return (s * 1.0).flatten(1) + other.flatten(1)

    check(Net(forward, a=conv(), b=conv(), alias=alias), x)


def test_a_residual_that_a_postponed_convolution_still_reads(x):
    # a waits for the sum after b; it encodes r for another multiplier when r has received that sum already.
    def forward(net, x):
        r = torch.relu(net.first(x))
        a, b = net.a(r), net.b(r) + r
        return a + b

    check(Net(forward, first=conv(), a=conv(), b=conv()), x, {"first": ROUGH, "a": MANY, "b": "mul8s_1L2L"})


@evidence
@pytest.mark.parametrize("relu", ["module", "method", "in place", "function", "functional", "six", "clamp"])
def test_ways_to_cut_at_zero(x, relu):
    cut = {
        "module": None, "method": lambda y: y.relu(), "in place": lambda y: y.relu_(), "function": torch.relu,
        "functional": lambda y: nn.functional.relu(y, inplace=True), "six": lambda y: nn.functional.relu6(y * 9),
        "clamp": lambda y: y.clamp(min=0),
    }[relu]  # fmt: skip

    def forward(net, x):
        relu = cut or net.relu
        return net.b(relu(net.a(x))) + relu(net.a(x) + x)

    check(Net(forward, a=conv(), b=conv(), relu=nn.ReLU(inplace=True)), x)


def test_what_a_method_writes_in_place_is_seen_by_later_readers(x):
    def forward(net, x):
        y = net.a(x)
        return net.b(y.relu_()) + y

    check(Net(forward, a=conv(), b=conv()), x)


@pytest.mark.parametrize("case", ["relu module", "sub_", "after an encoding"])
def test_what_is_written_in_place_is_seen_by_all_later_readers(x, case):
    def forward(net, x):
        y = net.a(x)
        if case == "relu module":  # the addition reads y as well, which is cut at zero by then
            return net.b(net.relu(y)) + y
        if case == "sub_":  # no longer at least 0
            y = torch.relu(y)
            y.sub_(0.3)
            return net.b(y)
        y = torch.relu(y + x)
        first = net.b(y)
        y.mul_(-2.0)
        return first + net.b(y)

    check(Net(forward, a=conv(), b=conv(), relu=nn.ReLU(inplace=True)), x)


def written_out(net, x):
    y = net.a(x)
    torch.mul(y, -2.0, out=y)
    return net.b(y)


def compared_out(net, x):
    y = net.a(x)
    torch.ge(y, 0.1, out=y)  # 0.0 and 1.0, which add up as bools would not
    return net.b(y + y)


@evidence
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: (lambda y: net.b(y) + nn.functional.relu_(y))(net.a(x)),
        lambda net, x: (lambda y: net.b(y) + torch.relu_(y))(net.a(x)),
        lambda net, x: (lambda y: (torch.neg_(y), net.b(y))[1])(torch.relu(net.a(x))),
        lambda net, x: (lambda y: (torch.clamp_(y, -0.1, 0.2), net.b(y) + y)[1])(net.a(x)),
        lambda net, x: (lambda y: (nn.functional.leaky_relu_(y, -0.5), net.b(y))[1])(torch.relu(net.a(x)) - 0.1),
        lambda net, x: (lambda y: net.b(y.ge_(0.1)) + y + y)(net.a(x)),
        written_out,
        compared_out,
    ],
    ids=["F.relu_", "relu_", "neg_", "clamp_", "leaky_relu_", "ge_", "out", "out of another type"],
)
def test_functions_that_write_in_place_are_seen_by_later_readers(x, forward):
    check(Net(forward, a=conv(), b=conv()), x)


@evidence
@pytest.mark.parametrize("name", ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod"])
def test_augmented_assignments_reach_the_value_under_its_other_name(x, name):
    def forward(net, x):
        out = net.a(x)
        same, width = out, x.size(1)
        half = width
        half //= 2  # a number gets a new value; nobody else sees it
        out = getattr(operator, name)(out, net.b(out) + 3)
        return net.b(torch.relu(same)) + width / half + x.mean()

    check(Net(forward, a=conv(), b=conv()), x)


@pytest.mark.parametrize(
    "write", [lambda y: torch.zero_(y), lambda y: torch.add(y, 1, out=y[:, 0:4]), lambda y: y.data.__iadd__(1)]
)
def test_writing_that_has_no_other_form_is_refused(x, write):
    def forward(net, x):
        y = net.a(x)
        write(y)
        return net.b(y)

    network = approximate(Net(forward, a=conv(), b=conv()).eval(), ROUGH, calibration=x)
    with pytest.raises(ValueError, match="writes into .* in place .*no frozen form; evaluate it as it is"):
        freeze(network)


# --------------------------------------------------------------------------------------- pooling


@evidence
@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((3, 1), (1, 2), (1, 0)), nn.MaxPool2d(2, 1),
    nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2), nn.AvgPool2d(2), nn.Dropout(),
])  # fmt: skip
@pytest.mark.parametrize("signed", [False, True])
def test_pooling_between_convolutions(x, pool, signed):
    middle = [] if signed else [nn.ReLU()]
    check(nn.Sequential(conv(), *middle, pool, conv(), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv()), x)


def test_pooled_codes_for_two_readers(x):
    def forward(net, x):
        pooled = nn.functional.max_pool2d(net.pool(torch.relu(net.a(x))), 2)
        return net.b(pooled) + net.c(pooled)

    check(Net(forward, a=conv(), b=conv(), c=conv(), pool=nn.MaxPool2d(2)), x)

    def branches(net, x):
        r = torch.relu(net.a(x))
        return net.b(net.pool(r)) + net.c(r)[:, :, ::2, ::2][:, :, :4, :3]

    check(Net(branches, a=conv(), b=conv(), c=conv(), pool=nn.MaxPool2d(2)), x)
