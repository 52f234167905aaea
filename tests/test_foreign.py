"""Other people's weights: what fits is loaded, what may differ is reported, all else is refused and nothing touched."""

import copy
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from axmoe_lite import EXACT, approximate, models
from axmoe_lite.models import ViT, load_weights, mobilenet_v2, resnet8, resnet20, vgg11_bn

SIZES = {"dim": 48, "depth": 2, "heads": 3, "classes": 10, "image_size": 32, "patch": 8}


def vit(seed=0, **changes):
    """A small transformer with every number drawn, so that none can hide behind a zero."""
    torch.manual_seed(seed)
    network = ViT(**SIZES | changes).eval()
    drawn(network)
    return network


def drawn(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)


@pytest.fixture
def theirs():
    """torchvision's transformer of the same sizes."""
    torch.manual_seed(7)
    network = models.import_torchvision().models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=10
    )
    drawn(network)
    return network.eval()


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def refused(network, source, match, error=ValueError):
    """The source is refused with these words, and the network is as it was."""
    before = state(network)
    with pytest.raises(error, match=match):
        load_weights(network, source)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ------------------------------------------------------------------------------ torchvision's networks


def test_torchvisions_transformer_gives_its_own_answers(theirs, x):
    network = vit()
    found = load_weights(network, theirs.state_dict())
    assert set(found.loaded) == set(network.state_dict()) and not found.resampled and not found.kept
    with torch.inference_mode():
        expected = theirs(x)
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().max() > 0.1


def test_the_names_of_older_torchvision_files(theirs):
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
        for name, value in theirs.state_dict().items()
    }
    assert sum("linear_" in name for name in old) == 8
    new, network = vit(seed=1), vit(seed=2)
    load_weights(new, theirs.state_dict())
    load_weights(network, old)
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in network.state_dict().items())


def test_torchvisions_mobilenet_gives_its_own_answers():
    torch.manual_seed(3)
    theirs = models.import_torchvision().models.mobilenet_v2(num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):  # torchvision's start is so faint in eval mode that no image would show
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):  # as after training, so that nothing hides behind a zero or a one
            for part in (module.weight, module.running_var):
                nn.init.uniform_(part, 0.5, 1.5)
            for part in (module.bias, module.running_mean):
                nn.init.uniform_(part, -0.5, 0.5)
    network = mobilenet_v2(classes=7, strides="imagenet").eval()
    assert {n: v.shape for n, v in network.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    load_weights(network, theirs.state_dict())
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    with torch.inference_mode():
        ours, expected = network(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    assert (expected[0] - expected[1]).abs().max() > 0.01 * expected.abs().max(), "the image decides"
    assert network.features[0][0].weight.is_contiguous(memory_format=torch.channels_last), "the layout stays ours"


# -------------------------------------------------------------------------------- files and containers


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt", "bin"])
@pytest.mark.parametrize("make", [resnet20, vgg11_bn])
def test_files_of_each_kind(tmp_path, make, ending):
    source, network = make(classes=5, seed=1), make(classes=5)
    path = tmp_path / f"zoo.{ending}"
    tensors = {name: value.contiguous() for name, value in source.state_dict().items()}
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    found = load_weights(network, str(path))
    assert set(found.loaded) == set(tensors) and not found.kept
    assert all(torch.equal(value, tensors[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_containers_and_prefixes(prefix, container):
    source, network = vit(seed=1), vit()
    tensors = {prefix + name: value for name, value in source.state_dict().items()}
    load_weights(network, {container: tensors, "epoch": 3} if container else tensors)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())


def test_precision_becomes_the_networks_own(x):
    source, network = vit(seed=1).half(), vit()
    load_weights(network, source.state_dict())
    assert torch.equal(network.norm.weight, source.norm.weight.float()) and network(x).dtype == torch.float32


# --------------------------------------------------------------------------------- what may differ


@pytest.mark.parametrize("make,head", [(resnet8, "fc"), (vgg11_bn, "classifier.6"), (mobilenet_v2, "classifier.1")])
def test_another_number_of_classes_keeps_the_classifier(make, head):
    source, network = make(classes=7, seed=1), make(classes=5)
    before = state(network)
    found = load_weights(network, source.state_dict())
    why = "the source has 7 classes, the network 5"
    assert found.kept == {f"{head}.weight": why, f"{head}.bias": why} and not found.resampled
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] if name in found.kept else source.state_dict()[name])
    assert set(found.loaded) | set(found.kept) == set(before) and not set(found.loaded) & set(found.kept)


def test_the_record_reads_as_a_sentence():
    found = load_weights(vit(classes=3, image_size=48), vit(seed=1).state_dict())
    assert repr(found) == (
        "Loaded(29 tensors loaded; "
        "pos_embed resampled: bicubic from 4 x 4 to 6 x 6 patches, the class token's kept; "
        "head.weight kept: the source has 10 classes, the network 3; "
        "head.bias kept: the source has 10 classes, the network 3)"
    )


def test_positions_are_resampled_and_not_turned():
    source, network = vit(seed=1, image_size=64), vit(image_size=128)  # 8 x 8 and 16 x 16 patches
    with torch.no_grad():
        grid = source.pos_embed[0, 1:].unflatten(0, (8, 8))
        grid[:, :, 0] = torch.arange(8.0)[:, None]  # feature 0 is the row, feature 1 the column, feature 2 constant
        grid[:, :, 1] = torch.arange(8.0)[None]
        grid[:, :, 2] = 5.0
        source.pos_embed[0, 1:] = grid.flatten(0, 1)
    before = source.pos_embed[0, 0].clone()
    found = load_weights(network, source.state_dict())
    assert list(found.resampled) == ["pos_embed"] and "pos_embed" not in found.loaded
    assert torch.equal(network.pos_embed[0, 0], before), "the class token has no place in the image"
    grid = network.pos_embed[0, 1:].unflatten(0, (16, 16))
    # Patch i of 16 has its centre at (i + 1/2) / 16 of the side, where the old grid counts (i + 1/2) / 2 - 1/2. Cubic
    # interpolation returns straight lines as they are, away from the borders.
    line = (torch.arange(16) + 0.5) / 2 - 0.5
    inner = slice(4, 12)
    torch.testing.assert_close(grid[inner, inner, 0], line[inner, None].expand(8, 8))
    torch.testing.assert_close(grid[inner, inner, 1], line[None, inner].expand(8, 8))
    torch.testing.assert_close(grid[:, :, 2], torch.full((16, 16), 5.0))


def test_torchvisions_positions_are_resampled_too(theirs):
    # One patch is all there is: bicubic weights of the 4 x 4 grid, symmetric, are the same along both sides.
    network = vit(image_size=8)
    found = load_weights(network, theirs.state_dict())
    assert "from 4 x 4 to 1 x 1" in found.resampled["pos_embed"] and network.pos_embed.shape == (1, 2, 48)
    grid = theirs.encoder.pos_embedding[0, 1:].unflatten(0, (4, 4))
    # Antialiased from 4 to 1, Keys' kernel (a = -1/2) is stretched by 4: 1.5 and 0.5 old patches from the centre it is
    # k(3/8) = 1.5 (3/8)^3 - 2.5 (3/8)^2 + 1 = 0.7275 and k(1/8) = 0.9639, which are then made to sum to 1.
    outer, inner = 1.5 * 0.375**3 - 2.5 * 0.375**2 + 1, 1.5 * 0.125**3 - 2.5 * 0.125**2 + 1
    weights = torch.tensor([outer, inner, inner, outer]) / (2 * outer + 2 * inner)
    expected = torch.einsum("i,j,ijd->d", weights, weights, grid)
    torch.testing.assert_close(network.pos_embed[0, 1], expected)
    assert torch.equal(network.pos_embed[0, 0], theirs.encoder.pos_embedding[0, 0])


# ------------------------------------------------------------------------------------ what is refused


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


def test_what_does_not_fit_is_named_and_refused(theirs):
    good, renamed = vit(seed=1).state_dict(), theirs.state_dict()
    head = {"head.weight": torch.zeros(4, 48), "head.bias": torch.zeros(5)}
    cases = [
        (without(good, "norm.bias"), r"it lacks norm.bias \[48\]\. Build"),
        (good | {"head_dist.bias": torch.zeros(10)}, r"it has, and the network has not, head_dist.bias \[10\]\. Build"),
        (good | {"norm.bias": torch.zeros(47)}, r"these differ: norm.bias \[47\], here \[48\]"),
        (good | {"norm.bias": torch.zeros(48, dtype=torch.int8)}, r"norm.bias \[48\] of torch.int8, here \[48\]"),
        (vit(patch=4).state_dict(), r"these differ: patch_embed.proj.weight \[48, 3, 4, 4\], here \[48, 3, 8, 8\]"),
        (vit(dim=24).state_dict(), r"these differ: cls_token \[1, 1, 24\], here \[1, 1, 48\], .* and \d+ more"),
        (vit(depth=3).state_dict(), r"the network has not, blocks.2.norm1.weight \[48\], .* and 9 more"),
        (vit(depth=1).state_dict(), r"it lacks blocks.1.norm1.weight \[48\], .* and 9 more"),
        (without(good, "head.weight", "head.bias"), r"it lacks head.weight \[10, 48\], head.bias \[10\]"),
        (good | head, r"these differ: head.weight \[4, 48\], here \[10, 48\], head.bias \[5\], here \[10\]"),
        # Two tokens before the patches, as in DeiT: 1 + 17 is no square of patches.
        (good | {"pos_embed": torch.zeros(1, 18, 48)}, r"these differ: pos_embed \[1, 18, 48\], here \[1, 17, 48\]"),
        (good | {"pos_embed": torch.zeros(1, 10, 47)}, r"these differ: pos_embed \[1, 10, 47\]"),
        (good | {"pos_embed": torch.zeros(10, 48)}, r"these differ: pos_embed \[10, 48\]"),
        (without(renamed, "encoder.ln.bias"), r"it lacks norm.bias \[48\]"),
        (renamed | {"encoder.ln.bias": torch.zeros(3)}, r"these differ: encoder.ln.bias \[3\], here \[48\]"),
        (renamed | {"norm.bias": torch.zeros(48)}, "both encoder.ln.bias and norm.bias, which are norm.bias here"),
        (resnet8(classes=3).state_dict(), "fit this ViT: it lacks cls_token.*the network has not, conv1.weight"),
    ]  # fmt: skip
    for source, match in cases:
        refused(vit(), source, match)


def test_the_wrong_shortcut_is_named():
    network = resnet20(classes=3, shortcut="pad")
    refused(network, resnet20(classes=3).state_dict(), "this ResNet.*has not, layer2.0.downsample.0.weight.*9 more")


def test_a_network_of_ones_own_must_fit_exactly():
    def make(classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, classes))

    refused(make(2), make(3).state_dict(), r"this Sequential: these differ: 1.weight \[3, 4\], here \[2, 4\]")
    network, source = make(2), make(2)
    assert load_weights(network, source.state_dict()).loaded == ("1.weight", "1.bias")
    assert torch.equal(network[1].weight, source[1].weight)


def test_an_approximated_network_must_be_restored_first(x):
    network = approximate(resnet8(classes=3), EXACT, calibration=x)
    before = copy.deepcopy(network.layer1[0].conv1.weight)
    with pytest.raises(ValueError, match=r"it lacks conv1.scale_x .*approximated: restore\(\) it"):
        load_weights(network, resnet8(classes=3, seed=1).state_dict())
    assert torch.equal(network.layer1[0].conv1.weight, before)


@pytest.mark.parametrize(
    "source,match",
    [
        ({}, "holds nothing; a state dict is needed"),
        ({"model": "resnet"}, r"no tensors \(model\).*'state_dict'"),
        ({"weights": {}, "epoch": 3, "loss": 0.5, "lr": 0.1}, r"no tensors \(weights, epoch, loss and 1 more\)"),
        ({3: torch.zeros(2)}, r"no tensors \(3\)"),
    ],
)
def test_what_is_no_state_dict_is_refused(source, match):
    refused(vit(), source, match)


@pytest.mark.trust("input", "checkpoints and networks from broken files")
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("keep", [0, 0.02, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(tmp_path, ending, keep):
    path = tmp_path / f"half.{ending}"
    tensors = vit(seed=1).state_dict()
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(vit(), path, rf"half.{ending} cannot be read as weights: .+\. Download or copy it again")


@pytest.mark.trust("input", "checkpoints and networks from broken files")
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_files_of_something_else_are_refused_by_name(tmp_path, ending):
    path = tmp_path / f"page.{ending}"
    for contents in (b"<!DOCTYPE html><html>404</html>\n" * 9, bytes(range(256)) * 9):
        path.write_bytes(contents)
        refused(vit(), path, rf"page.{ending} cannot be read as weights")


class Program:
    """What a pickle can hold: reading it would call print."""

    def __reduce__(self):
        return print, ("a program ran",)


@pytest.mark.trust("input", "checkpoints and networks from broken files")
@pytest.mark.parametrize("as_zip", [True, False])
def test_no_program_in_a_file_is_run(tmp_path, capsys, as_zip):
    path = tmp_path / "trap.pth"
    contents = {"norm.bias": torch.zeros(48), "trap": Program()}
    torch.save(contents, path, _use_new_zipfile_serialization=as_zip)
    refused(vit(), path, "trap.pth cannot be read.*could run programs.*save its state_dict")
    path.write_bytes(pickle.dumps(Program()))
    refused(vit(), path, "trap.pth cannot be read")
    torch.save(nn.Linear(2, 2), path)
    refused(vit(), path, "trap.pth cannot be read.*state_dict")
    torch.save(torch.zeros(3), path)
    refused(vit(), path, "trap.pth holds a Tensor; a state dict is needed")
    assert "a program ran" not in capsys.readouterr().out


def test_files_that_are_absent_or_of_another_kind(tmp_path):
    refused(vit(), tmp_path / "absent.pth", "No weights at .*absent.pth", FileNotFoundError)
    refused(vit(), tmp_path, "No weights at", FileNotFoundError)
    for name, ending in (("vit.npz", ".npz"), ("vit", "nothing")):
        (tmp_path / name).write_bytes(b"x")
        refused(vit(), tmp_path / name, f"is called '{ending}'; weights are read from .safetensors")


# ---------------------------------------------------------------------------------- torchvision itself


def test_torchvision_imports_on_a_cpu_build():
    torchvision = models.import_torchvision()
    assert torchvision is sys.modules["torchvision"] is models.import_torchvision()
