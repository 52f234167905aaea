"""Into a network, and out: which layers multiply approximately, with what, and on which range.

Chapter: 05, "What happens to a network?"
"""

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from axmoe_lite import quant
from axmoe_lite.layers.gradients import check_gradient
from axmoe_lite.layers.modules import KINDS, Approximate, Matmul
from axmoe_lite.multipliers import Mosaic, Multiplier, mosaic_name, multiplier

OPTIONS = ("per_channel", "gradient")  # of a layer, beside its multiplier
Choice = str | Multiplier | Mosaic | list  # a list has one name for each filter, or lists of one for each channel
Assignment = Choice | dict[str, Choice]


def approximable(network: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can multiply approximately, by dotted name, in the network's order.

    That is each ``nn.Conv2d``, ``nn.Linear`` and :class:`Matmul` (approximated or not). Left out are layers inside
    ``nn.MultiheadAttention``, which reads their weights without calling them, so that replacing them would
    change nothing.

    Raises:
        ValueError: for what is no torch module.
    """
    check_module(network)
    inside_attention = {
        id(child)
        for module in network.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) in KINDS or isinstance(module, Approximate)
        if id(module) not in inside_attention
    }


def check_module(network: object) -> None:
    """Raise ValueError for what is no torch module, such as the name of a network."""
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"The network is {network!r}, a {type(network).__name__}; a torch module is needed, such as"
            " models.resnet20(classes=10)."
        )


def check_thawed(network: nn.Module) -> None:
    """Raise ValueError for a frozen network, or one with a frozen part: it answers from copies of its layers.

    A frozen one is known here by its method ``thaw`` alone, see :class:`axmoe_lite.pipeline.Frozen`.
    """
    check_module(network)
    for name, module in network.named_modules():
        if hasattr(module, "thaw"):
            what = f"holds a frozen part, {name!r}" if name else "is frozen"
            raise ValueError(
                f"This {type(network).__name__} {what}, which would go on answering as before; change frozen.thaw(),"
                " the network that it was made from, and freeze it again."
            )


# Parts of a network that stay exact, by a component of their name.
ROUTERS = ("gate", "gateway", "router")
CLASSIFIERS = ("classifier", "fc", "head", "heads")
EMBEDDINGS = ("patch_embed", "conv_proj")  # timm's and torchvision's names
SHORTCUTS = ("downsample", "shortcut", "skip")


def default_layers(network: nn.Module, *, stem: bool = True, shortcuts: bool = True) -> list[str]:
    """The layers that one multiplier for all goes to: all that have weights, but those that AxMoE keeps exact.

    AxMoE approximates all convolutions of the CNNs and all linear layers of a transformer's blocks. Exact stay,
    by a component of their dotted name: gates (``gate``, ``gateway``, ``router``), linear layers of the
    classifier (``classifier``, ``fc``, ``head``, ``heads``; where nothing is called so, the last linear layer if
    no convolution comes after it) and a transformer's patch embedding (``patch_embed``, ``conv_proj``).
    Attention's products, which have no weights, are approximated when an assignment names them.

    Args:
        stem: whether the first convolution is among them (of each expert, where there are several).
        shortcuts: whether 1x1 convolutions on a ``downsample``, ``shortcut`` or ``skip`` are.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> default_layers(net), default_layers(net, stem=False)
    (['0', '2'], ['2'])
    """
    weighted = {name: layer for name, layer in approximable(network).items() if exact_kind(layer) is not Matmul}
    layers = {name: layer for name, layer in weighted.items() if not _among(name, ROUTERS)}
    linear = [name for name, layer in layers.items() if exact_kind(layer) is nn.Linear]
    classifier = [name for name in linear if _among(name, CLASSIFIERS)]
    if linear and not classifier and list(layers)[-1] == linear[-1]:
        classifier = [name for name in linear if _without_experts(name) == _without_experts(linear[-1])]
    names = [name for name in layers if name not in classifier and not _among(name, EMBEDDINGS)]
    convolutions = [name for name in names if exact_kind(layers[name]) is nn.Conv2d]
    if convolutions and not stem:
        first = _without_experts(convolutions[0])
        names = [name for name in names if _without_experts(name) != first]
    if not shortcuts:
        small = {n for n in convolutions if layers[n].kernel_size == (1, 1) and _among(n, SHORTCUTS)}
        names = [name for name in names if name not in small]
    return names


def _among(name: str, components: tuple[str, ...]) -> bool:
    return not set(name.split(".")).isdisjoint(components)


def _without_experts(name: str) -> str:
    """The name that a layer has in the dense network: "a.experts.3.b" is "a.b" there."""
    return re.sub(r"(^|\.)experts\.\d+(?=\.|$)", "", name).lstrip(".")


def exact_kind(layer: nn.Module) -> type[nn.Module]:
    """``nn.Conv2d``, ``nn.Linear`` or :class:`Matmul`, whether the layer is approximated or not."""
    return type(layer.exact if isinstance(layer, Approximate) else layer)


def approximate(
    network: nn.Module,
    assignment: Assignment,
    *,
    calibration: Tensor | Iterable[Tensor] | None = None,
    method: str = "percentile",
    percentile: float = 99.99,
    per_channel: bool | None = None,
    gradient: str | None = None,
) -> nn.Module:
    """Give layers of a network their multipliers, in place, and calibrate those that need it.

    Called again it replaces the assignment: layers named then and not now become exact again. Scales already
    calibrated are kept unless ``calibration`` is given anew, and so are ``per_channel`` and ``gradient``.

    Args:
        network: any torch module; only its ``nn.Conv2d``, ``nn.Linear`` and :class:`Matmul` are touched.
        assignment: one multiplier (its name or the object) for all of :func:`default_layers`, or a dict
            from dotted layer names to multipliers; layers that it does not name stay exact floats.
            A name may say ``"swap:..."`` to make the weight the first operand, or name several multipliers for one
            layer (:func:`~axmoe_lite.multipliers.mosaic_name`); a list has one for each filter.
        calibration: a batch as the network expects it ([N, C, H, W], normalised), or several. The exact
            network is run on it in evaluation mode to see how large each layer's inputs are; an expert to which
            no image of a batch goes is shown all of it.
        method, percentile: how the activation range is chosen, see :class:`axmoe_lite.quant.Histogram`.
        per_channel: one weight scale for each output channel instead of one a layer. None: as the layer has it now,
            and one a layer where it was exact until now.
        gradient: what training sees of the multiplier: ``"straight-through"`` (exact products) or
            ``"smoothed"`` (the table's own slopes, see :mod:`axmoe_lite.layers.gradients`). None: as the layer has it
            now, and straight-through where it was exact.

    Returns:
        The same network.

    Raises:
        ValueError: for a layer or multiplier that does not exist, a layer that was never run or makes its weight
            anew at each call (pruning), a frozen part, images that are missing, empty or not finite. The network is
            then as it was.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    >>> x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> approximate(net, "mul8s_1L2J", calibration=x)[0]
    ApproxConv2d(3, 4, kernel_size=(3, 3), mul8s_1L2J)
    >>> restore(net)[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    quant.check_method(method, percentile)
    if gradient is not None:
        check_gradient(gradient)
    if per_channel not in (None, False, True):
        raise ValueError(f"per_channel is {per_channel!r}; it is True or False, or None for what the layer has now.")
    asked = {"per_channel": per_channel, "gradient": gradient}
    chosen = _resolve(network, assignment, gradient)
    before = approximable(network)
    after: dict[str, nn.Module] = {}
    for name, layer in before.items():
        exact = exact_of(layer)
        after[name] = exact
        if name in chosen:
            options = {key: getattr(layer, key, None) if value is None else value for key, value in asked.items()}
            options = {key: value for key, value in options.items() if value is not None}
            after[name] = KINDS[type(exact)](exact, chosen[name], **options)
            if isinstance(layer, Approximate):
                for scale in layer.SCALES:
                    getattr(after[name], scale).copy_(getattr(layer, scale))
    _place(network, before, after)
    layers = {name: after[name] for name in chosen}
    todo = layers if calibration is not None else {n: m for n, m in layers.items() if not m.calibrated}
    try:
        if todo:
            _calibrate(network, todo, calibration, method, percentile)
    except BaseException:
        _place(network, after, before)
        raise
    return network


def restore(network: nn.Module) -> nn.Module:
    """Put the exact layers back, in place, with whatever training did to their weights; returns the network.

    A bias that :func:`~axmoe_lite.layers.correction.correct_bias` made is taken out again, and its training with it.

    Raises:
        ValueError: for a network that is frozen, or holds a frozen part.
    """
    check_thawed(network)
    before = approximable(network)
    _place(network, before, {name: exact_of(layer) for name, layer in before.items()})
    return network


def exact_of(layer: nn.Module) -> nn.Module:
    """The layer itself, or the exact one that it stands for, with the parameters that it has now."""
    if not isinstance(layer, Approximate):
        return layer
    layer.hand_over()
    return layer.exact


def described(network: nn.Module) -> dict[str, dict]:
    """Each approximate layer's multiplier and options, by name, as JSON can hold them; for :func:`as_described`."""
    return {
        name: {"multiplier": m.multiplier.name, "digest": m.multiplier.digest}
        | {key: getattr(m, key) for key in OPTIONS}
        for name, m in approximable(network).items()
        if isinstance(m, Approximate)
    }


def as_described(network: nn.Module, told: dict[str, dict]) -> nn.Module:
    """Give an exact network the layers of another's :func:`described`, in place, without their scales.

    Raises:
        ValueError: for a layer or multiplier that does not exist here, another table under a multiplier's name, or a
            frozen part.
    """
    chosen = _resolve(network, {name: said["multiplier"] for name, said in told.items()}, None)
    for name, value in chosen.items():
        if value.digest != told[name]["digest"]:
            raise ValueError(
                f"Layer {name!r} was saved with a {value.name!r} of digest {told[name]['digest']}; the one of that name"
                f" here has {value.digest}, so it is another table."
            )
    before = approximable(network)
    options = {name: {key: told[name][key] for key in OPTIONS} for name in chosen}
    after = {name: KINDS[type(before[name])](before[name], chosen[name], **options[name]) for name in chosen}
    _place(network, {name: before[name] for name in chosen}, after)
    return network


def assignment_of(network: nn.Module) -> dict[str, str]:
    """Which layer multiplies with what: dotted names to multiplier names; exact layers are not in it."""
    return {n: m.multiplier.name for n, m in approximable(network).items() if isinstance(m, Approximate)}


def chosen_multiplier(choice: Choice) -> Multiplier | Mosaic:
    """What an assignment says of one layer: a name, a multiplier, a mosaic, or a list of names.

    >>> chosen_multiplier(["mul8s_1KV6", "mul8s_1L2L"])  # of two filters
    Mosaic('filter[mul8s_1KV6, mul8s_1L2L]', 0.312 mW)
    """
    if isinstance(choice, list | tuple):
        nested = bool(choice) and not isinstance(choice[0], str)
        return multiplier(mosaic_name(choice, by="filter+channel" if nested else "filter"))
    return choice if isinstance(choice, Multiplier | Mosaic) else multiplier(choice)


def _resolve(network: nn.Module, assignment: Assignment, gradient: str | None) -> dict[str, Multiplier | Mosaic]:
    check_thawed(network)
    known = approximable(network)
    if "" in known:
        raise ValueError(
            f"This {type(network).__name__} is a layer and no network, so nothing holds its place. Put it into one:"
            " nn.Sequential(layer)."
        )
    if not isinstance(assignment, dict):
        names = default_layers(network)
        if not names:
            raise ValueError(
                f"This {type(network).__name__} has no layer to approximate by default; there are"
                f" {', '.join(known) or 'none'}. Name layers in a dict."
            )
        _warn_of_others(network, known)
        assignment = dict.fromkeys(names, assignment)
    for name in assignment:
        if name not in known:
            raise ValueError(_unknown_layer(network, name, known))
    chosen = {name: chosen_multiplier(value) for name, value in assignment.items()}
    for name, value in chosen.items():
        if exact_kind(known[name]) is not Matmul and "weight" not in known[name]._parameters:
            raise ValueError(
                f"Layer {name!r} makes its weight anew at each call, as torch.nn.utils does for prune, spectral_norm"
                " and weight_norm. Make the weight its own first: prune.remove(layer, 'weight'),"
                " remove_spectral_norm(layer) or remove_weight_norm(layer)."
            )
        if isinstance(value, Mosaic):
            if exact_kind(known[name]) is Matmul:
                raise ValueError(f"Layer {name!r} multiplies two activations; {value.name!r} needs weights to lie on.")
            slope = gradient or getattr(known[name], "gradient", "straight-through")
            if slope != "straight-through":
                raise ValueError(f"gradient={slope!r} needs one table a layer; {name!r} has {value.name!r}.")
            value.check_fits(name, known[name].weight.shape)
    return chosen


def _warn_of_others(network: nn.Module, known: dict[str, nn.Module]) -> None:
    """Say which layers multiply but stay exact because we do not know how they use their weights."""
    attention = [f"{name}." for name, m in network.named_modules() if isinstance(m, nn.MultiheadAttention)]
    others = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.MultiheadAttention)
        if name not in known and not name.startswith(tuple(attention))
    ]
    if others:
        first = type(network.get_submodule(others[0])).__name__
        warnings.warn(
            f"{len(others)} other layers multiply too and stay exact, such as {others[0]!r} ({first}): only plain"
            " nn.Conv2d and nn.Linear can be approximated.",
            stacklevel=4,
        )


def _unknown_layer(network: nn.Module, name: str, known: dict[str, nn.Module]) -> str:
    modules = dict(network.named_modules())
    kind = f"is a {type(modules[name]).__name__}" if name in modules else "does not exist"
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"Layer {name!r} {kind} and cannot multiply approximately.{hint} The layers of this"
        f" {type(network).__name__}: {', '.join(known) or 'none'}."
    )


def _place(network: nn.Module, before: dict[str, nn.Module], after: dict[str, nn.Module]) -> None:
    """Put ``after`` wherever ``before`` stands, also where one layer is used under several names; with its hooks."""
    instead = {id(before[name]): after[name] for name in before if before[name] is not after[name]}
    for parent in network.modules():
        for key, child in parent._modules.items():
            if id(child) in instead:
                new = instead[id(child)]
                new.train(child.training)
                for kind in HOOKS:
                    setattr(new, kind, getattr(child, kind))
                parent._modules[key] = new
    for module in network.modules():
        _keep_from_short_cuts(module)


HOOKS = tuple(kind for kind in vars(nn.Module()) if "_hook" in kind)  # torch's names: dicts, and a flag of one
SHORT_CUTS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


def _keep_from_short_cuts(module: nn.Module) -> None:
    """In evaluation torch's own transformer multiplies by its layers' weights without calling them: not ours, please.

    It asks a flag at each call whether it may.
    """
    for kind, flag in SHORT_CUTS.items():
        if isinstance(module, kind):
            before = module.__dict__.setdefault("_before_approximate", getattr(module, flag, False))
            ours = any(isinstance(layer, Approximate) for layer in module.modules())
            setattr(module, flag, False if ours else before)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode for a while; then each of its modules in the mode it had."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def nobody_idle(network: nn.Module) -> Iterator[None]:
    """While it lasts, an expert to which no item of a batch goes sees the whole batch.

    A module that has experts is known here by its attribute ``also`` alone, see :class:`axmoe_lite.moe.Mixture`.
    """
    before = {module: module.also for module in network.modules() if hasattr(module, "also")}
    for module in before:
        module.also = "idle"
    try:
        yield
    finally:
        for module, also in before.items():
            module.also = also


@torch.no_grad()
def _calibrate(
    network: nn.Module,
    layers: dict[str, Approximate],
    batches: Tensor | Iterable[Tensor] | None,
    method: str,
    percentile: float,
) -> None:
    if batches is None:
        raise ValueError(
            f"Layer {next(iter(layers))!r} has no activation scale yet; pass calibration=images, a batch as the"
            " network expects it."
        )
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"calibration is a {type(batches).__name__}; give a batch as the network expects it, or several."
        )
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    watched = {n: m for n, m in approximable(network).items() if isinstance(m, Approximate)}
    for name, layer in watched.items():
        layer.histograms = [quant.Histogram(name) for _ in layer.SCALES]
    try:
        with evaluating(network), nobody_idle(network):
            for batch in batches.split(250) if isinstance(batches, Tensor) else batches:
                if not isinstance(batch, Tensor) or batch.dtype == torch.uint8:
                    kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
                    pair = ", or of pairs the first: (x for x, _ in loader)" if isinstance(batch, list | tuple) else ""
                    raise ValueError(
                        f"Calibration met {kind}; give what the network takes, such as images.normalised(x){pair}."
                    )
                try:
                    network(batch.to(device))
                except RuntimeError as reason:
                    if isinstance(reason, torch.OutOfMemoryError):
                        raise
                    raise ValueError(
                        f"This {type(network).__name__} cannot take calibration images of {list(batch.shape)},"
                        f" {batch.dtype}: {reason}. Give a batch as it expects it."
                    ) from reason
        for name, layer in layers.items():
            if not layer.histograms[0].counts.sum():
                raise ValueError(
                    f"Layer {name!r} was not called on the calibration images: there were none, or the network reads"
                    " its weights without calling it. Name other layers in a dict to leave it exact."
                )
            for scale, histogram in zip(layer.SCALES, layer.histograms, strict=True):
                getattr(layer, scale).copy_(histogram.scale(method, percentile=percentile))
    finally:
        for layer in watched.values():
            layer.histograms = None
