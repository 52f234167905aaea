"""Other people's weights in our networks, and other people's networks: what comes from outside.

    load_weights(vit_small(classes=200), "vit_small_patch16_224.safetensors")    timm's
    load_weights(mobilenet_v2(classes=1000, strides="imagenet"), "mobilenet_v2.pth")    torchvision's
    load_weights(resnet56(classes=100), "cifar100_resnet56.pt")    the CIFAR model zoo's

Our layers are named as theirs, so most files fit as they are; torchvision's transformers are the exception and
are renamed. Letters: T tokens, D features, h heads.

Chapter: 05, "What happens to a network?"
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from axmoe_lite.layers import assignment_of
from axmoe_lite.models.mobilenet import MobileNetV2
from axmoe_lite.models.resnet import ResNet
from axmoe_lite.models.vgg import VGG
from axmoe_lite.models.vit import ViT

HEADS = {ResNet: "fc", VGG: "classifier.6", MobileNetV2: "classifier.1", ViT: "head"}
"""The layer that alone depends on the number of classes."""

CONTAINERS = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the weights among other things they save."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and training frameworks write before every name."""

TORCHVISION = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
    (r"(blocks\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    (r"(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    # Older files, among them those that torchvision publishes, call the two linear layers linear_1 and linear_2.
    (r"(blocks\.\d+)\.mlp\.(?:linear_1|0)\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.mlp\.(?:linear_2|3)\.", r"\1.mlp.fc2."),
)
"""torchvision's names of a vision transformer and ours, applied in this order at the start of a name."""


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_weights` did, by the names of the network.

    Args:
        loaded: tensors that now hold the source's numbers, unchanged but for their precision.
        resampled: tensors that hold numbers made from the source's, and how.
        kept: tensors left as they were, and why.
    """

    loaded: tuple[str, ...]
    resampled: dict[str, str]
    kept: dict[str, str]

    def __repr__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"{name} resampled: {how}" for name, how in self.resampled.items()]
        parts += [f"{name} kept: {why}" for name, why in self.kept.items()]
        return f"Loaded({'; '.join(parts)})"


def load_weights(network: nn.Module, source: Path | str | Mapping[str, Tensor]) -> Loaded:
    """Load weights made elsewhere into ``network``, by name, and say what was done.

    Two things may differ. With another number of classes the network keeps its own classifier, to be trained.
    With another image size a :class:`ViT` gets position embeddings resampled by bicubic interpolation (with
    antialiasing and pixel centres aligned, as timm does; torchvision aligns corners), the class token's its own.

    The number of heads of a ViT is in no tensor: one with another h takes the weights and answers differently.

    Args:
        network: any network, not approximated; changed in place, on its own device, in its own precision.
        source: a ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.bin`` file of torch, of which nothing but
            tensors is read, so that no program in it can run; or a state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, of another kind, or does not fit. The network is then as it was.

    >>> from axmoe_lite.models import resnet8
    >>> network = resnet8(classes=5)
    >>> load_weights(network, resnet8(classes=5, seed=1).state_dict())
    Loaded(44 tensors loaded)
    >>> load_weights(network, resnet8(classes=3, seed=1).state_dict()).kept["fc.weight"]
    'the source has 3 classes, the network 5'
    """
    if isinstance(source, Mapping):
        where, contents = "This state dict", source
    else:
        where, contents = str(source), _read(Path(source))
    own = network.state_dict()
    found = _by_our_names(_tensors(where, contents), isinstance(network, ViT), where)
    fitting = {name: value for name, (_, value) in found.items() if _same_kind(own.get(name), value)}
    resampled, kept = {}, _other_classes(network, own, found)
    if isinstance(network, ViT) and "pos_embed" in found and "pos_embed" not in fitting:
        value, how = _resample(found["pos_embed"][1], own["pos_embed"])
        if how:
            fitting["pos_embed"], resampled["pos_embed"] = value, how
    done = fitting.keys() | kept.keys()
    if done != own.keys() or not found.keys() <= done:
        raise ValueError(_misfit(where, network, own, found, done))
    network.load_state_dict(fitting, strict=False)
    return Loaded(tuple(name for name in own if name in fitting and name not in resampled), resampled, kept)


def _read(path: Path) -> Mapping:
    if not path.is_file():
        raise FileNotFoundError(f"No weights at {path}; a .safetensors or .pth file that is on this machine is needed.")
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(
            f"{path} is called {path.suffix or 'nothing'!r}; weights are read from .safetensors files and from torch's"
            " .pth, .pt and .bin. Rename the file if it is one of these."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            _check_packed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # a damaged pickle can raise almost anything
        first = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        if "Weights only load failed" in first:
            first = "it is damaged, or holds Python objects besides tensors, which could run programs when read"
        raise ValueError(
            f"{path} cannot be read as weights: {first}. Download or copy it again; if it was saved as a whole"
            " network, save its state_dict() instead."
        ) from reason


def _check_packed(path: Path) -> None:
    """torch.save packs nothing; tensors that unpack to many times the size of the file could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        unpacked, packed = sum(member.file_size for member in archive.infolist()), path.stat().st_size
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("it is a TorchScript archive, which holds a program")
    if unpacked > 2**26 + 4 * packed:
        raise ValueError(f"it would unpack from {packed:,} to {unpacked:,} bytes")


def _tensors(where: str, contents: Mapping) -> dict[str, Tensor]:
    """The tensors by name, taken out of a training script's container and freed of a common prefix."""
    for container in CONTAINERS:
        if isinstance(contents, Mapping) and isinstance(contents.get(container), Mapping):
            contents = contents[container]
    if not isinstance(contents, Mapping) or not contents:
        raise ValueError(
            f"{where} holds {'nothing' if contents == {} else 'a ' + type(contents).__name__}; a state dict is needed,"
            " tensors by name. Save network.state_dict()."
        )
    strange = [name for name, value in contents.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(
            f"{where} holds things that are no tensors ({_list(strange)}); a state dict is needed, tensors by name,"
            f" alone or as the entry {' or '.join(map(repr, CONTAINERS))}."
        )
    special = [n for n, v in contents.items() if v.layout != torch.strided or v.is_quantized or v.is_meta]
    if special:
        raise ValueError(
            f"{where} holds tensors that are sparse, quantised or without numbers ({_list(special)}); save them dense."
        )
    tensors = dict(contents)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _by_our_names(tensors: dict[str, Tensor], is_vit: bool, where: str) -> dict[str, tuple[str, Tensor]]:
    """{our name: (its name in the source, the tensor)}."""
    found: dict[str, tuple[str, Tensor]] = {}
    for theirs, value in tensors.items():
        ours = theirs
        for pattern, name in TORCHVISION if is_vit else ():
            ours = re.sub(rf"^{pattern}", name, ours)
        if ours in found:
            raise ValueError(f"{where} has both {found[ours][0]} and {theirs}, which are {ours} here; remove one.")
        found[ours] = theirs, value
    return found


def _same_kind(own: Tensor | None, value: Tensor) -> bool:
    return own is not None and own.shape == value.shape and own.is_floating_point() == value.is_floating_point()


def _other_classes(network: nn.Module, own: Mapping, found: Mapping) -> dict[str, str]:
    """{name: why} for the classifier, where the source has one of another number of classes and else the same."""
    names = [f"{HEADS.get(type(network))}.{part}" for part in ("weight", "bias")]
    if not all(name in own and name in found for name in names):
        return {}
    weight, bias = (found[name][1] for name in names)
    theirs, ours = len(bias) if bias.ndim else 0, len(own[names[1]])
    if theirs == ours or bias.ndim != 1 or weight.shape != (theirs, own[names[0]].shape[1]):
        return {}
    return dict.fromkeys(names, f"the source has {theirs} classes, the network {ours}")


def _resample(value: Tensor, own: Tensor) -> tuple[Tensor, str]:
    """Positions [1, 1 + g * g, D] for the network's grid, and how; an empty how if they are not of that form."""
    side, target = round((value.shape[1] - 1) ** 0.5) if value.ndim == 3 else 0, round((own.shape[1] - 1) ** 0.5)
    if side < 1 or value.shape != (1, 1 + side**2, own.shape[2]) or not value.is_floating_point():
        return value, ""
    grid = value[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(target, target), mode="bicubic", antialias=True, align_corners=False)
    resampled = torch.cat([value[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)
    return resampled, f"bicubic from {side} x {side} to {target} x {target} patches, the class token's kept"


def _misfit(where: str, network: nn.Module, own: Mapping, found: Mapping, done: set[str]) -> str:
    def shown(value: Tensor) -> str:
        return f"{list(value.shape)}" + ("" if value.is_floating_point() else f" of {value.dtype}")

    missing = [f"{name} {shown(value)}" for name, value in own.items() if name not in found]
    unknown = [f"{theirs} {shown(value)}" for name, (theirs, value) in found.items() if name not in own]
    differ = [
        f"{theirs} {shown(value)}, here {shown(own[name])}"
        for name, (theirs, value) in found.items()
        if name in own and name not in done
    ]
    lists = (("it lacks", missing), ("it has, and the network has not,", unknown), ("these differ:", differ))
    advice = "Build the network with the sizes of the source, or name the source of this network."
    if assignment_of(network):
        advice = "This network is approximated: restore() it, load the weights, approximate() it again."
    found_out = "; ".join(f"{what} {_list(names)}" for what, names in lists if names)
    return f"{where} does not fit this {type(network).__name__}: {found_out}. {advice} Nothing was changed."


def _list(names: list) -> str:
    shown = ", ".join(map(str, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
