"""The networks are the published ones: sizes, names, shapes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from axmoe_lite import approximate, assignment_of, models, restore
from axmoe_lite.models import (
    Matmul,
    PadShortcut,
    ViT,
    mobilenet_v2,
    resnet8,
    resnet20,
    resnet56,
    vgg11_bn,
    vgg19_bn,
    vit_small,
)

CNNS = [resnet8, resnet20, resnet56, vgg11_bn, vgg19_bn, mobilenet_v2]


def counts(network, size=32):
    """Of one image, from the shapes that really pass: multiply-adds of layers and of products, numbers normalised."""
    total = {"layers": 0, "products": 0, "normalised": 0}

    def count(module, inputs, output):
        if isinstance(module, Matmul):
            total["products"] += inputs[0].shape[-1] * output[0].numel()
        elif isinstance(module, nn.LayerNorm):
            total["normalised"] += inputs[0][0].numel()
        else:
            total["layers"] += module.weight[0].numel() * output[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm | Matmul):
            module.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    return total


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def names(network, *kinds):
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


@pytest.fixture
def tiny():
    """A transformer of two blocks on four patches, with every parameter drawn so that none can hide."""
    network = ViT(dim=12, depth=2, heads=3, classes=5, image_size=8, patch=4).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double) / 2)
    return network


@pytest.fixture
def x():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)


# --------------------------------------------------------------------------------- convolutional


@pytest.mark.parametrize(
    "make,classes,macs,size",
    [  # millions, as the CIFAR model zoo prints them
        (resnet20, 10, 40.81, 0.27), (resnet20, 100, 40.82, 0.28),
        (resnet56, 10, 125.75, 0.86), (resnet56, 100, 125.75, 0.86),
        (vgg11_bn, 10, 153.29, 9.76), (vgg11_bn, 100, 153.34, 9.80),
        (vgg19_bn, 10, 398.66, 20.57), (vgg19_bn, 100, 398.71, 20.61),
        (mobilenet_v2, 10, 87.98, 2.24), (mobilenet_v2, 100, 88.09, 2.35),
    ],
)  # fmt: skip
def test_cnns_have_the_published_size(make, classes, macs, size):
    network = make(classes=classes)
    assert round(counts(network)["layers"] / 1e6, 2) == macs
    assert round(parameters(network) / 1e6, 2) == size


def test_resnet20_is_named_like_the_model_zoo():
    found = names(resnet20(classes=10), nn.Conv2d, nn.Linear)
    assert found[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"] and found[-1] == "fc" and len(found) == 22
    assert "layer2.0.downsample.0" in found


def test_resnet56_is_resnet20_with_six_more_blocks_in_a_stage():
    found = names(resnet56(classes=100), nn.Conv2d, nn.Linear)
    assert len(found) == 1 + 3 * 9 * 2 + 2 + 1 and found[-2:] == ["layer3.8.conv2", "fc"]
    # AxMoE's gateway: 0.442 M in the first convolution, 18 of 2.359 M in each stage but for the two that come from
    # half as many channels (1.180 M), projections of 0.131 M, 6,400 in the classifier.
    hand = 1024 * 27 * 16 + 52 * 1024 * 9 * 16**2 + 2 * 1024 * 9 * 16**2 // 2 + 2 * 256 * 16 * 32 + 64 * 100
    assert counts(resnet56(classes=100))["layers"] == hand == 125_753_600
    assert not any("downsample" in name for name in names(resnet56(classes=10, shortcut="pad"), nn.Conv2d))


def test_vgg_is_numbered_like_the_model_zoo():
    # A convolution with its BatchNorm and ReLU takes three numbers, a pooling one: 0, then 3 + 1, then 4 + 3 + 1, ...
    assert names(vgg11_bn(classes=10), nn.Conv2d) == [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)]
    sixteen = (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)
    assert names(vgg19_bn(classes=10), nn.Conv2d) == [f"features.{i}" for i in sixteen]
    assert names(vgg19_bn(classes=10), nn.Linear) == ["classifier.0", "classifier.3", "classifier.6"]
    state = vgg11_bn(classes=10).state_dict()
    assert {"features.0.bias", "features.1.running_var", "classifier.6.bias"} < set(state)
    assert {key.split(".")[0] for key in state} == {"features", "classifier"}


def test_resnet8_has_seven_convolutions_and_no_projection():
    convolutions = [m for m in resnet8(classes=10).modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16, 16, 16, 32, 32, 64, 64]
    assert all(c.kernel_size == (3, 3) for c in convolutions)


@pytest.mark.parametrize("make", [resnet8, resnet20])
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_shapes_for_odd_sizes(make, shortcut):
    network = make(classes=7, shortcut=shortcut).eval()
    for n, side in ((1, 32), (2, 23), (3, 9)):
        assert network(torch.zeros(n, 3, side, side)).shape == (n, 7)


@pytest.mark.parametrize("make", [vgg11_bn, vgg19_bn])
def test_vgg_takes_odd_batches_and_larger_images(make):
    network = make(classes=7).eval()
    for n, side in ((1, 32), (3, 32), (2, 47), (1, 64)):  # 47 pixels leave one, as 32 do; 64 leave two by two
        assert network(torch.zeros(n, 3, side, side)).shape == (n, 7)
    with pytest.raises(ValueError, match="31 x 40 pixels.*at least 32 x 32"):
        network(torch.zeros(1, 3, 31, 40))


def test_vgg_by_plain_functions():
    network = vgg11_bn(classes=3).double().eval()
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after training, so that they cannot hide
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 1, 2)
    w = network.state_dict()
    x = y = torch.randn(3, 3, 32, 32, dtype=torch.double)
    for i in (0, 4, 8, 11, 15, 18, 22, 25):
        y = F.conv2d(y, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1)
        norm = (w[f"features.{i + 1}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        y = F.batch_norm(y, *norm).relu()
        if i not in (8, 15, 22):  # the first of the two convolutions of stages 3, 4 and 5
            y = F.max_pool2d(y, 2)
    y = y[:, :, 0, 0]
    for i in (0, 3, 6):
        y = F.linear(y, w[f"classifier.{i}.weight"], w[f"classifier.{i}.bias"])
        y = y.relu() if i < 6 else y
    torch.testing.assert_close(network(x), y, rtol=1e-10, atol=1e-10)
    assert (y[0] - y[1]).abs().max() > 1e-5, "different images get different scores"


def test_the_parameters_behind_the_published_overhead():
    network = mobilenet_v2(classes=200)
    gamma_and_beta = sum(parameters(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert (parameters(network), gamma_and_beta) == (2_480_072, 34_112)
    # QoS-Nets: three operating points, two of which bring their own gammas and betas.
    assert round(100 * 2 * gamma_and_beta / parameters(network), 3) == 2.751


def test_mobilenet_has_the_published_size_at_imagenet_strides():
    network = mobilenet_v2(classes=1000, strides="imagenet")
    assert parameters(network) == 3_504_872  # torchvision's figure; the paper says 3.4 M
    assert counts(network, 224)["layers"] == 300_774_272  # the paper's 300 M, torchvision's 0.301 G


def test_strides_decide_where_mobilenet_halves():
    for strides, sides in (("small", [32, 32, 32, 16, 8, 8, 4, 4]), ("imagenet", [16, 16, 8, 4, 2, 2, 1, 1])):
        network = mobilenet_v2(classes=3, strides=strides).eval()
        seen = []
        for i in (0, 1, 3, 6, 10, 13, 16, 17):  # the first convolution, then the last block of each stage
            network.features[i].register_forward_hook(lambda m, inputs, output: seen.append(output.shape[-1]))  # noqa: B023
        network(torch.zeros(1, 3, 32, 32))
        assert seen == sides
    for n, side in ((1, 64), (2, 23), (3, 9)):
        assert mobilenet_v2(classes=7).eval()(torch.zeros(n, 3, side, side)).shape == (n, 7)


def test_mobilenet_can_be_traced_and_approximated():
    network = mobilenet_v2(classes=3).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = network(x)
        assert torch.equal(torch.fx.symbolic_trace(network)(x), exact)
        assert not torch.equal(approximate(network, "mul8s_1L2L", calibration=x)(x), exact)
    assert len(assignment_of(network)) == 52, "each convolution, and not the classifier"
    assert torch.equal(restore(network)(x), exact)


@pytest.mark.parametrize("make", CNNS)
def test_cnns_are_channels_last(make):
    network = make(classes=3).eval()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    seen = []
    convolutions[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    network(torch.zeros(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last), "nothing on the way changes the layout"


def test_the_padded_shortcut_by_hand():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    y = PadShortcut(2, 2)(x)
    assert y.flatten().tolist() == [0, 4, 0, 0]  # the top left pixel of each channel, then two empty channels


# ---------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("classes", [200, 1000])
def test_vit_small_has_the_published_size(classes):
    network = vit_small(classes=classes)
    found = counts(network, size=224)
    # By hand: T = 1 + 14 * 14 = 197 tokens of D = 384; a block has 4 D^2 weights in attention and 8 D^2 in the MLP.
    # 12 * 197 * 12 * 384^2 = 4183.0 M, patches 196 * 768 * 384 = 57.8 M, head 384 * classes.
    assert found["layers"] == 12 * 197 * 12 * 384**2 + 196 * 768 * 384 + 384 * classes
    assert found["products"] == 12 * 2 * 197**2 * 384
    assert found["normalised"] == (2 * 12 + 1) * 197 * 384
    assert round((found["layers"] + 5 * found["normalised"]) / 1e9, 2) == 4.25  # AxMoE's figure
    assert round((sum(found.values()) + 4 * found["normalised"]) / 1e9, 2) == 4.61  # timm's figure
    if classes == 1000:
        assert round(parameters(network) / 1e6, 2) == 22.05


def test_vit_small_is_named_like_timm():
    d = 384
    block = {
        "norm1.weight": (d,), "norm1.bias": (d,),
        "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,), "attn.proj.weight": (d, d), "attn.proj.bias": (d,),
        "norm2.weight": (d,), "norm2.bias": (d,),
        "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,), "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,),
    }  # fmt: skip
    expected = {
        "cls_token": (1, 1, d), "pos_embed": (1, 197, d),
        "patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,),
        **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()},
        "norm.weight": (d,), "norm.bias": (d,), "head.weight": (1000, d), "head.bias": (1000,),
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in vit_small(classes=1000).state_dict().items()} == expected


def by_functions(network, x, *, heads, patch):
    """A transformer from its weights alone: patches cut one by one, heads one by one, torch's own attention."""
    w = network.state_dict()
    kernel, last = w["patch_embed.proj.weight"].flatten(1), x.shape[-1] // patch
    cut = [x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] for i in range(last) for j in range(last)]
    tokens = [F.linear(piece.flatten(1), kernel, w["patch_embed.proj.bias"]) for piece in cut]
    y = torch.stack([w["cls_token"][0].expand(len(x), -1), *tokens], 1) + w["pos_embed"]
    d = y.shape[-1]

    def linear(name, z):
        return F.linear(z, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, z):
        return F.layer_norm(z, (d,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    for b in range(len(network.blocks)):
        q, k, v = linear(f"blocks.{b}.attn.qkv", norm(f"blocks.{b}.norm1", y)).chunk(3, -1)
        parts = [[z.split(d // heads, -1)[h] for z in (q, k, v)] for h in range(heads)]
        attended = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], -1)
        y = y + linear(f"blocks.{b}.attn.proj", attended)
        y = y + linear(f"blocks.{b}.mlp.fc2", F.gelu(linear(f"blocks.{b}.mlp.fc1", norm(f"blocks.{b}.norm2", y))))
    return linear("head", norm("norm", y[:, 0]))


def test_vit_by_plain_functions(tiny, x):
    expected = by_functions(tiny, x, heads=3, patch=4)
    assert expected.shape == (3, 5) and expected.std() > 0.1
    torch.testing.assert_close(tiny(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tiny(x[:1]), expected[:1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 3])
def test_vit_small_on_small_images(n):
    network = vit_small(classes=7, image_size=32, patch=8).eval()
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert network(x).shape == (n, 7)
    torch.testing.assert_close(network(x), by_functions(network, x, heads=6, patch=8), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter(tiny, x):
    tiny(x).sum().backward()
    # A key's bias adds the same to all scores of a query, and softmax ignores that: features 12 to 23 of the 36.
    for name, parameter in tiny.named_parameters():
        grad = parameter.grad if "qkv.bias" not in name else torch.cat([parameter.grad[:12], parameter.grad[24:]])
        assert (grad.abs() > 1e-12).all(), name


def test_the_products_of_attention_have_names_and_can_be_replaced(tiny, x):
    products = names(tiny, Matmul)
    assert products == ["blocks.0.attn.qk", "blocks.0.attn.av", "blocks.1.attn.qk", "blocks.1.attn.av"]
    seen = {}
    for name in products:
        tiny.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: [tuple(t.shape) for t in (*inputs, output)]})
        )
    before = tiny(x)
    # Three images, three heads, T = 1 + 2 * 2 = 5 tokens, 12 / 3 = 4 features a head.
    assert seen["blocks.1.attn.qk"] == [(3, 3, 5, 4), (3, 3, 4, 5), (3, 3, 5, 5)]
    assert seen["blocks.1.attn.av"] == [(3, 3, 5, 5), (3, 3, 5, 4), (3, 3, 5, 4)]

    class Nothing(Matmul):
        def forward(self, a, b):
            return super().forward(a, b) * 0

    tiny.set_submodule("blocks.1.attn.av", Nothing())
    without = tiny(x)
    assert not torch.allclose(without, before)
    with torch.no_grad():
        tiny.blocks[1].attn.proj.weight.zero_()  # what is left of an attention that attends to nothing: a bias
    tiny.set_submodule("blocks.1.attn.av", Matmul())
    assert torch.equal(tiny(x), without)


def test_linear_layers_of_a_vit_can_be_approximated(tiny, x):
    network, x = tiny.float(), x.float()
    exact = network(x)
    chosen = {"blocks.0.attn.qkv": "mul8s_1L2L", "blocks.1.mlp.fc2": "mul8s_1L2L"}
    assert not torch.equal(approximate(network, chosen, calibration=x)(x), exact)
    assert assignment_of(network) == chosen
    assert torch.equal(restore(network)(x), exact)


# ------------------------------------------------------------------------------------------ all


@pytest.mark.parametrize("make", [*CNNS, vit_small])
def test_seeds_decide_the_weights_and_nothing_else(make):
    before = torch.manual_seed(5).get_state()
    one, after = make(classes=3, seed=1).state_dict(), torch.random.get_rng_state()
    assert torch.equal(before, after), "the caller's random numbers are left alone"
    torch.manual_seed(6)
    two, other = make(classes=3, seed=1).state_dict(), make(classes=3, seed=2).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    drawn = [key for key in one if key.endswith("weight") and one[key].ndim > 1]
    assert len(drawn) >= 8 and not any(torch.equal(one[key], other[key]) for key in drawn)


def test_every_name_that_is_promised_exists():
    made = {"resnet8", "resnet20", "resnet56", "vgg11_bn", "vgg19_bn", "mobilenet_v2", "vit_small"}
    assert made | {"load_weights", "import_torchvision"} < set(models.__all__)
    assert all(hasattr(models, name) for name in [*models.__all__, "BasicBlock", "ResNet"])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="'conv'.*'projection' or 'pad'"):
        resnet20(classes=10, shortcut="conv")
    with pytest.raises(ValueError, match="'cifar'.*'small'.*or 'imagenet'"):
        mobilenet_v2(classes=10, strides="cifar")
    for make in (*CNNS, vit_small):
        with pytest.raises(ValueError, match="classes is 0.*at least 1"):
            make(classes=0)
    with pytest.raises(ValueError, match="patch = 5 does not divide image_size = 32; the nearest that does is 4"):
        vit_small(classes=10, image_size=32, patch=5)
    with pytest.raises(ValueError, match="heads = 7 does not divide dim = 12; the nearest that does is 6"):
        ViT(dim=12, depth=1, heads=7, classes=2, image_size=8, patch=4)
    for name in ("patch", "image_size"):
        with pytest.raises(ValueError, match=f"{name} is 0.*at least 1"):
            vit_small(classes=10, **{name: 0})


def test_vit_refuses_images_of_another_size(tiny, x):
    for bad in (x[..., :4], x[:, :1], x[0]):
        with pytest.raises(ValueError, match=r"\[3, 8, 8\] only.*image_size"):
            tiny(bad)


def test_narrow_networks_keep_their_shape_and_refuse_what_torch_cannot_train():
    assert resnet8(classes=10, width=0.5).layer3[0].conv2.out_channels == 32
    assert vgg11_bn(classes=10, width=1 / 16).features[0].out_channels == 4
    with pytest.raises(ValueError, match=r"width = 0.5 leaves 8 channels.*shortcut='pad'"):
        resnet20(classes=10, width=0.5)
    with pytest.raises(ValueError, match=r"width is -1"):
        vgg11_bn(classes=10, width=-1)
