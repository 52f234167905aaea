"""Layers that nobody uses, measured on this machine's cores: what a predictor of times is fitted to.

    shapes = synthetic(400)                                 such as networks have, drawn by a seed
    rows = measure(shapes, configurations=host())           each on one core, on two, and so on, float32

A layer is known by its shape alone: G groups of products [N, K] x [K, M]. Source: Pipe-it (arXiv 1903.05898) for the
idea to measure synthetic layers once instead of every network; shapes and procedure are not from the paper.

Chapter: 19, "Which core for which layer?"
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from axmoe_lite.runs import store, timing
from axmoe_lite.runs.evidence import device_name
from axmoe_lite.search.pipeit.schedule import Stage
from axmoe_lite.search.pipeit.shapes import Layer

KERNELS = (11, 7, 5, 3)
SHAPE = ("kind", "n", "k", "m", "groups")


def host(kind: str = "host") -> dict[Stage, list[int]]:
    """One core of this machine, two, and so on up to all that this process may use.

    >>> list(host())[0]
    ('host', 1)
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {(kind, h): cores[:h] for h in range(1, len(cores) + 1)}


def synthetic(n: int = 400, *, seed: int = 0, macs: tuple[float, float] = (1e5, 3e8)) -> list[Layer]:
    """Shapes such as convolutional networks have, for one image: no two alike, sizes even on a logarithmic scale.

    Of all, about 0.28 each are 1 x 1 and 3 x 3 convolutions, 0.07 each 5 x 5 and 7 x 7, 0.1 each depthwise (3 x 3 or
    5 x 5), linear for one row, and linear for 2 to 256 rows, of which 0.4 are products of two activations in 2 to 16
    groups, as in attention. Pictures have 4 to 112 pixels a side, channels are multiples of 8 from 8 to 1024, and a
    tenth of the dense convolutions of 3 x 3 and above read 3 channels; linear layers for one row read up to 12288
    numbers and give up to 4096, since weights that no cache holds are slow. Not from the paper.

    Args:
        macs: the fewest and the most multiply-accumulates; shapes outside are drawn anew. Depthwise and linear layers
            have few, so theirs may be a tenth of the fewest.

    Raises:
        ValueError: for n below 1, or bounds that are not 0 < fewest < most / 100.

    >>> synthetic(1)
    [Layer(name='synthetic0', n=100, k=392, m=8, groups=1, kind='conv')]
    """
    if n < 1 or not 0 < macs[0] < macs[1] / 100:
        raise ValueError(f"n is {n} and macs {macs}; at least 1, and bounds a hundredfold apart are needed.")
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        shape = _draw(rng)
        low = macs[0] / (1 if shape[3] == 1 and shape[4] == "conv" else 10)
        if low <= math.prod(shape[:4]) <= macs[1]:
            found.setdefault(shape, Layer(f"synthetic{len(found)}", *shape))
    return list(found.values())


def _draw(rng: np.random.Generator) -> tuple[int, int, int, int, str]:
    def size(low: float, high: float) -> int:
        return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))

    kinds = ["1", "3", "5", "7", "depthwise", "linear", "rows"]
    what = rng.choice(kinds, p=[0.28, 0.28, 0.07, 0.07, 0.1, 0.1, 0.1])
    rows, c_in, c_out = size(4, 112) ** 2, 8 * size(1, 128), 8 * size(1, 128)
    if what == "linear":
        return 1, 8 * size(2, 1536), 8 * size(1, 512), 1, "linear"
    if what == "rows":
        tokens, head, products = size(2, 256), 8 * size(2, 16), rng.random() < 0.4
        sizes = (head, tokens) if rng.random() < 0.5 else (tokens, head)  # queries and keys, or values
        return (tokens, *sizes, size(2, 16), "linear") if products else (tokens, c_in, c_out, 1, "linear")
    if what == "depthwise":
        return rows, int(rng.choice([3, 5])) ** 2, 1, c_in, "conv"
    if what != "1" and rng.random() < 0.1:
        c_in = 3
    return rows, int(what) ** 2 * c_in, c_out, 1, "conv"


def kernel(layer: Layer) -> int:
    """The kernel's side that a convolution probably has: the largest of 11, 7, 5, 3 whose square divides K, else 1.

    A shape does not say it. A 1 x 1 convolution of 144 channels is taken for a 3 x 3 one of 16.

    >>> kernel(Layer("a", 49, 64 * 9, 8)), kernel(Layer("b", 49, 64, 8)), kernel(Layer("c", 1, 63, 8, kind="linear"))
    (3, 1, 1)
    """
    if layer.kind == "linear":
        return 1
    return next((side for side in KERNELS if layer.k % side**2 == 0), 1)


def realise(layer: Layer, *, seed: int = 0) -> Callable[[], Tensor]:
    """A float32 layer of that shape that can be run: its input, channels last, and its weights are random.

    A convolution has stride 1 and a :func:`kernel` that keeps the picture's size; the picture is as square as the rows
    allow. No bias, no BatchNorm, no activation. A linear layer in groups is a product of two activations.

    Raises:
        ValueError: for a kind other than conv and linear, or numbers below 1.

    >>> realise(Layer("a", 6, 18, 4))().shape
    torch.Size([1, 4, 2, 3])
    """
    check_layers([layer])
    rng = torch.Generator().manual_seed(seed)
    if layer.kind == "linear":
        x, weight = (torch.randn(layer.groups, size, layer.k, generator=rng) for size in (layer.n, layer.m))
        if layer.groups > 1:
            return lambda: x @ weight.mT
        x, weight = x[0], weight[0]
        return lambda: F.linear(x, weight)
    side = kernel(layer)
    channels = layer.k // side**2
    height = next(h for h in range(math.isqrt(layer.n), 0, -1) if layer.n % h == 0)
    x = torch.randn(1, channels * layer.groups, height, layer.n // height, generator=rng)
    weight = torch.randn(layer.m * layer.groups, channels, side, side, generator=rng)
    x, weight = (one.contiguous(memory_format=torch.channels_last) for one in (x, weight))
    return lambda: F.conv2d(x, weight, padding=side // 2, groups=layer.groups)


def measure(
    shapes: Sequence[Layer],
    *,
    configurations: Mapping[Stage, Sequence[int]] | None = None,
    repeats: int = 7,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Seconds of each layer on each configuration of this machine's cores, the medians of ``repeats``.

    Each configuration has a process of its own, pinned to its cores, with as many threads, and the layers come in an
    order drawn by the seed. A repeat runs a layer for 5 ms or once, after runs that are not counted, so its weights
    are in the cache. Where processes cannot be pinned they are not, which one warning says. Another job on the
    machine makes two threads wait for each other, so measure on a quiet one.

    Args:
        shapes: see :func:`synthetic`.
        configurations: from a stage, such as ``("host", 2)``, to the numbers of its cores; None: :func:`host`.
        checkpoint: a file of JSON lines, one a row; what is in it is not measured again.

    Returns:
        A dict for each layer and configuration: ``type``, ``cores``, ``pinned`` (their numbers, as text; empty where
        they could not be), ``kind``, ``n``, ``k``, ``m``, ``groups``, ``seconds``, ``repeats``.

    Raises:
        ValueError: before anything is measured: for no or impossible shapes, a core that this process may not use,
            another number of cores than the stage says, or a checkpoint made on another machine or with other settings.
        RuntimeError: with the process's last words, where it fails.
    """
    configurations = host() if configurations is None else {key: list(ids) for key, ids in configurations.items()}
    check_layers(shapes)
    _check_configurations(configurations, repeats)
    can_pin = hasattr(os, "sched_setaffinity")
    if not can_pin:
        warnings.warn("This system cannot pin a process to cores; threads run where it puts them.", stacklevel=2)
    pinned = {stage: " ".join(map(str, ids)) if can_pin else "" for stage, ids in configurations.items()}
    device = device_name("cpu").rsplit(",", 1)[0]  # without this process's number of threads
    known = _open(checkpoint, {"device": device, "torch": torch.__version__, "repeats": repeats})
    asked = [(*stage, pinned[stage], *shape_of(one)) for stage in configurations for one in shapes]
    with tqdm(total=len(set(asked)), desc="micro-benchmarks", disable=not progress) as bar:
        bar.update(len(set(asked) & set(known)))
        for stage, ids in configurations.items():
            start = (*stage, pinned[stage])
            left = list(dict.fromkeys(shape_of(one) for one in shapes if (*start, *shape_of(one)) not in known))
            left = [left[i] for i in np.random.default_rng(seed).permutation(len(left))]
            for shape, seconds in zip(left, _in_child(left, ids if can_pin else [], len(ids), repeats), strict=True):
                row = dict(zip(("type", "cores", "pinned", *SHAPE), (*start, *shape), strict=True))
                known[*start, *shape] = row | {"seconds": seconds, "repeats": repeats}
                _append(checkpoint, known[*start, *shape])
                bar.update()
    return [known[key] for key in dict.fromkeys(asked)]


def _in_child(shapes: list[tuple], cores: list[int], threads: int, repeats: int) -> Iterator[float]:
    """Seconds of one shape after another, from a process of its own.

    No multiprocessing: its way to start clean processes runs the caller's script again.
    """
    if not shapes:
        return
    code = "from axmoe_lite.search.pipeit import microbench; microbench._child()"
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=variables, **pipes) as child:
        try:
            told = {"shapes": shapes, "cores": cores, "threads": threads, "repeats": repeats}
            with contextlib.suppress(BrokenPipeError):  # it has died already, and says below of what
                child.stdin.write(json.dumps(told))
                child.stdin.close()
            for _ in shapes:
                line = child.stdout.readline()
                if not line:
                    words = child.stderr.read().strip().splitlines()
                    raise RuntimeError(f"The process that measures has ended: {words[-1] if words else 'no word'}")
                yield float(line)
        finally:
            child.kill()


def _child() -> None:
    """What the process does: told on stdin what to measure, it says a number a line."""
    told = json.loads(sys.stdin.read())
    if told["cores"]:
        os.sched_setaffinity(0, told["cores"])
    torch.set_num_threads(told["threads"])
    with torch.inference_mode():
        for kind, n, k, m, groups in told["shapes"]:
            call = realise(Layer("", n, k, m, groups, kind))
            for _ in range(2):
                call()
            print(timing.interleaved({"layer": call}, repeats=told["repeats"])["layer"], flush=True)


def shape_of(layer: Layer) -> tuple[str, int, int, int, int]:
    """What a layer's time depends on: kind, N, K, M and groups, not its name.

    >>> shape_of(Layer("a", 49, 64, 8))
    ('conv', 49, 64, 8, 1)
    """
    return layer.kind, layer.n, layer.k, layer.m, layer.groups


# ------------------------------------------------------------------------------ kept in a file


def _open(checkpoint: Path | str | None, settings: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    """The rows of a checkpoint, which is made if it is not there; a last line that was cut short is dropped."""
    if not checkpoint:
        return {}
    file = Path(checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    told = []
    for i, line in enumerate(lines):
        try:
            told.append(json.loads(line))
        except ValueError as reason:
            if i < len(lines) - 1:
                raise ValueError(f"Line {i + 1} of {file} is not readable as JSON; delete the file.") from reason
    before = told[0] if told else settings
    if before != settings:
        raise ValueError(
            f"{file} was made with {before}, and {settings} is asked for; name another file, or delete this one."
        )
    store.write_text(file, "".join(json.dumps(one) + "\n" for one in [settings, *told[1:]]))
    return {tuple(row[name] for name in ("type", "cores", "pinned", *SHAPE)): row for row in told[1:]}


def _append(checkpoint: Path | str | None, row: dict[str, Any]) -> None:
    if checkpoint:
        with Path(checkpoint).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------------ what is asked for is checked


def check_layers(layers: Sequence[Layer]) -> None:
    """Raise ValueError unless there is a layer, and each can exist."""
    if not len(layers):
        raise ValueError("No layers were given; at least one is needed, such as synthetic(400).")
    for one in layers:
        sizes = (one.n, one.k, one.m, one.groups)
        if one.kind not in ("conv", "linear"):
            raise ValueError(f"Layer {one.name!r} is of kind {one.kind!r}; conv and linear can be measured.")
        if not all(isinstance(size, int | np.integer) and size >= 1 for size in sizes):
            raise ValueError(f"Layer {one.name!r} has N, K, M and groups {sizes}; whole numbers from 1 are needed.")


def _check_configurations(configurations: Mapping[Stage, Sequence[int]], repeats: int) -> None:
    if repeats < 1 or not configurations:
        raise ValueError(
            f"{repeats} repeats on {len(configurations)} configurations were asked for; at least 1 of each."
        )
    usable = max(host().values(), key=len)
    for stage, ids in configurations.items():
        if len(stage) != 2 or stage[1] != len(ids) or len(set(ids)) != len(ids) or not ids:
            raise ValueError(
                f"The configuration {stage!r} was given the cores {ids}; a stage is a type and a number of cores, and"
                " needs as many different ones."
            )
        if not set(ids) <= set(usable):
            raise ValueError(f"The configuration {stage!r} needs the cores {ids}; this process may use {usable}.")
