"""Your own network from a Python file, with your own weights.

    build_network("my_network.py")                                   what its function build() returns
    build_network("my_network.py", weights="mine.safetensors")       with weights, by name

The file is executed, as by ``python my_network.py``: name only a file that you would run so. Weights are never
unpickled: of a ``.pth`` file nothing but tensors is read, see :func:`~axmoe_lite.models.load_weights`.

Chapter: 22, "What does my network make of it?"
"""

import difflib
import hashlib
import inspect
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from axmoe_lite import paths
from axmoe_lite.models.foreign import load_weights

EXAMPLE = '''\
"""A small network that is none of the package's: depthwise-separable convolutions, then attention."""

import torch
from torch import nn


def block(inputs, outputs, stride):
    """A filter for each channel, then a 1x1 convolution that mixes channels."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class MyNetwork(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(block(16, 32, 1), block(32, 64, 2), block(64, 64, 1))
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.classifier = nn.Linear(64, classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        tokens = x.flatten(2).transpose(1, 2)
        looked, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.classifier((tokens + looked).mean(1))


def build():
    return MyNetwork(classes=10)
'''
"""A file such as :func:`build_network` takes, for chapter 22 and for trying things out."""


MOST_BYTES = 2**24


def build_network(path: Path | str, *, weights: Path | str | None = None, seed: int = 0) -> nn.Module:
    """The network that a Python file's function ``build()`` returns, as it stands there: nothing is approximated.

    The file may import what lies beside it. While it runs, torch's random numbers begin at ``seed``, so that fresh
    weights are the same at every call; afterwards they go on as if nothing had been.

    Args:
        path: the file. **It is executed**; name only one that you would run yourself.
        weights: a file for :func:`~axmoe_lite.models.load_weights` whose tensors fit by name; None or ``""`` for none.

    Raises:
        FileNotFoundError: if one of the two files is not there. Nothing has been executed then.
        ValueError: for a file that is no Python, fails while it runs (the message says in which line), has no build()
            that works without arguments or returns no network; for weights that do not fit.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "my_network.py"
    >>> _ = file.write_text("from torch import nn\\ndef build():\\n    return nn.Linear(4, 2)\\n")
    >>> build_network(file)
    Linear(in_features=4, out_features=2, bias=True)
    """
    path = paths.expanded(path)
    _check_file(path, "a Python file with a function build() that returns the network", (".py",))
    if weights:
        weights = paths.expanded(weights)
        _check_file(weights, "the network's state dict", (".safetensors", ".pth", ".pt", ".bin"))
    code = _compiled(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _built(path, code)
    if weights:
        load_weights(network, weights)
    return network


def _check_file(path: Path, what: str, endings: tuple[str, ...]) -> None:
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is not there"
        near = path.parent.glob(f"*{endings[0]}") if path.parent.is_dir() else ()
        names = difflib.get_close_matches(path.name, [file.name for file in near], n=1, cutoff=0.5)
        hint = f" Did you mean {names[0]!r}?" if names else ""
        raise FileNotFoundError(f"{path} {state} (in {Path.cwd()}); {what} is needed.{hint}")
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path} is called {path.suffix or 'nothing'!r}; {what} is needed, in {' or '.join(endings)}.")


def _compiled(path: Path) -> types.CodeType:
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a program that builds a network has at most {MOST_BYTES:,}.")
    try:
        return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except (RecursionError, MemoryError):
        raise ValueError(f"{path}: this is nested too deeply for Python.") from None
    except (SyntaxError, ValueError) as problem:  # ValueError: a file with null bytes
        line = f", line {problem.lineno}" if getattr(problem, "lineno", None) else ""
        raise ValueError(f"{path}{line}: this is not Python ({getattr(problem, 'msg', problem)}).") from None


def _built(path: Path, code: types.CodeType) -> nn.Module:
    """Execute the file as a module of its own, and call its build()."""
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    module = types.ModuleType(f"{path.stem}_{digest}", None)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and copies look their module up
    beside = str(path.absolute().parent)
    sys.path.insert(0, beside)
    try:
        _run(path, "running it", exec, code, module.__dict__)
        build = getattr(module, "build", None)
        _check_build(path, module, build)
        network = _run(path, "its build()", build)
    finally:
        if beside in sys.path:
            sys.path.remove(beside)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{path}: build() returned a {type(network).__name__}; it has to return the network, a torch.nn.Module."
        )
    return network


def _check_build(path: Path, module: types.ModuleType, build: object) -> None:
    if not callable(build):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        own = [name for name in own if getattr(vars(module)[name], "__module__", "") == module.__name__]
        raise ValueError(
            f"{path} has no function build(); it defines {', '.join(own) or 'no function and no class'}. Add one that"
            " takes nothing and returns the network: def build(): return MyNetwork()."
        )
    try:
        wanted = [
            name
            for name, p in inspect.signature(build).parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # of some built-in callables nothing is known
        wanted = []
    if wanted:
        raise ValueError(f"{path}: build() wants {', '.join(wanted)}; it is called without arguments: give defaults.")


def _run(path: Path, doing: str, function: Any, *arguments: Any) -> Any:
    """Call what is the user's; what goes wrong there is told in one line, with the place in the user's file."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as problem:
        frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(path)]
        line = f", line {frames[-1].lineno}" if frames else ""
        told = str(problem).splitlines()[0] if str(problem) else ""
        raise ValueError(f"{path}{line}: {doing} ends in {type(problem).__name__}: {told}") from problem
