"""Networks on disk: weights with their recipe, and half-finished training; safetensors, written atomically.

Chapter: 08, "Can a network learn its new arithmetic?"
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import paths
from axmoe_lite.layers import assignment_of, restore
from axmoe_lite.layers.network import as_described, described

SHORT = {"momentum_buffer": "momentum"}  # what an optimiser's state is called in a file
KNOWN = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def save(model: nn.Module, path: Path | str, *, recipe: dict) -> None:
    """Write weights and buffers as safetensors, with ``recipe`` (how they were made) in the file's header.

    Of an approximate network the scales are among the buffers, and the header says which layer has which multiplier.
    """
    header = {"recipe": recipe, "approximate": described(model)}
    _write(Path(path), dict(model.state_dict()), {key: json.dumps(value) for key, value in header.items()})


def load(model: nn.Module, path: Path | str) -> dict:
    """Load weights written by :func:`save` into ``model`` and return their recipe.

    An exact model becomes approximate if the one that was saved was: its multipliers and scales are in the file. A
    model that is approximate already keeps its own multipliers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, its tensors do not fit the model (both lists are named), or a multiplier of
            it is not known here. The model is then as it was.

    >>> import tempfile
    >>> from axmoe_lite import approximate, models
    >>> x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> network = approximate(models.resnet8(classes=10).eval(), "mul8s_1L2J", calibration=x)
    >>> again = models.resnet8(classes=10).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(network, f"{folder}/mine.safetensors", recipe={"by": "me"})
    ...     load(again, f"{folder}/mine.safetensors")
    {'by': 'me'}
    >>> torch.equal(again(x), network(x))
    True
    """
    path = Path(path)
    tensors, metadata = _read(path)
    recipe, told = _told(path, metadata, "recipe", dict), _told(path, metadata, "approximate", dict)
    placing = bool(told) and not assignment_of(model)
    try:
        if placing:
            as_described(model, told)
        _load_exactly(model, tensors, path)
    except (KeyError, TypeError, ValueError) as reason:
        if placing:
            restore(model)
        if isinstance(reason, ValueError):
            raise
        raise ValueError(f"{path} has no readable 'approximate' in its header; delete it, train again.") from reason
    return recipe


def _load_exactly(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own = {name: _kind(value) for name, value in model.state_dict().items()}
    theirs = {name: _kind(value) for name, value in tensors.items()}
    if own != theirs:
        wrong = [name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)]
        name = sorted(wrong)[0]
        raise ValueError(
            f"{path} does not fit this {type(model).__name__}: {len(wrong)} tensors differ, such as {name!r}, which is"
            f" {theirs.get(name, 'absent')} in the file and {own.get(name, 'absent')} in the model. Build the model"
            " with the number of classes, the shortcut and the multipliers that the saved one had."
        )
    model.load_state_dict(tensors)


def _kind(value: Tensor) -> str:
    """The shape, and the type where it is no fraction: half precision may become single, a whole number may not."""
    return f"{tuple(value.shape)}" + ("" if value.is_floating_point() else f" of {value.dtype}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is a folder or a device; a checkpoint is read from a plain file.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, MemoryError) as reason:
        raise ValueError(f"{path} is not a readable safetensors file ({reason}); delete it, train again.") from reason


def _told(path: Path, metadata: dict[str, str], key: str, kind: type) -> Any:
    """What the file's header says under that key: a dict, empty where it says nothing, or a list."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):  # no JSON, or brackets inside brackets without end
        found = None
    if type(found) is not kind:
        raise ValueError(f"{path} has no readable {key!r} in its header; delete it, train again.")
    return found


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # Convolution weights may be channels_last in memory; the file holds them in their logical order.
    logical: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        shared = value.numel() and any(value.data_ptr() == other.data_ptr() for other in logical.values())
        logical[name] = value.clone() if shared else value  # tied weights are written under each of their names
    try:
        save_file(logical, partial, metadata)
        os.replace(partial, path)
    except SafetensorError as reason:
        raise OSError(f"{path} cannot be written ({reason}); what was there before is there still.") from reason
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def alone(path: Path | str | None) -> Iterator[None]:
    """No other process trains towards this file meanwhile. The system frees a dead process's lock."""
    if path is None:
        yield
        return
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    file = paths.cache_dir() / "locks" / f"{name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        tqdm.write(f"Waiting: another process is training towards {path}.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def suspend(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, settings: dict, history: list[dict]
) -> None:
    """Write all that :func:`resume` needs to go on after the last epoch of ``history``."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, parameter in enumerate(_parameters(optimiser)):
        for key, value in optimiser.state[parameter].items():
            if value is not None:
                tensors[f"{SHORT.get(key, key)}.{index}"] = torch.as_tensor(value)
    _write(path, tensors, {"settings": json.dumps(settings), "history": json.dumps(history)})


def resume(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, settings: dict) -> list[dict]:
    """Put model and optimiser where :func:`suspend` left them; returns the history until then.

    Raises:
        ValueError: if a call with other settings made the file, or it is damaged. Nothing has been changed then.
    """
    tensors, metadata = _read(path)
    made_by = _told(path, metadata, "settings", dict)
    if made_by != settings:
        differ = sorted(key for key in settings.keys() | made_by if made_by.get(key) != settings.get(key))
        raise ValueError(
            f"The checkpoint {path} was made by another call: "
            + ", ".join(f"{key} was {made_by.get(key)!r}, now {settings.get(key)!r}" for key in differ)
            + ". Name another file, or delete this one to start afresh."
        )
    history = _told(path, metadata, "history", list)
    epochs = [row.get("epoch") if isinstance(row, dict) else None for row in history]
    if not history or epochs != list(range(1, len(history) + 1)):
        raise ValueError(f"{path} tells of the epochs {epochs}; they count from 1. Delete it, train again.")
    state = _state_of(path, {k: v for k, v in tensors.items() if not k.startswith("model.")}, optimiser)
    _load_exactly(model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, path)
    for parameter, values in state.items():
        for key, value in values.items():
            on = parameter.device if value.ndim else value.device  # AdamW counts its steps on the CPU
            optimiser.state[parameter][key] = value.to(on, copy=True)
    return history


def _state_of(
    path: Path, tensors: dict[str, Tensor], optimiser: torch.optim.Optimizer
) -> dict[nn.Parameter, dict[str, Tensor]]:
    """What the optimiser knew of each parameter, if it is all that such an optimiser knows, in its shape."""
    long, parameters = {short: key for key, short in SHORT.items()}, _parameters(optimiser)
    found: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        short, _, index = name.rpartition(".")
        parameter = parameters[int(index)] if index in map(str, range(len(parameters))) else None
        shape = () if parameter is None or short == "step" else parameter.shape
        if parameter is None or value.shape != shape or not value.is_floating_point():
            raise ValueError(f"{path} holds {name!r} {_kind(value)}, which is of no parameter; delete it, train again.")
        found.setdefault(parameter, {})[long.get(short, short)] = value
    for values in found.values():
        if values.keys() != KNOWN[type(optimiser)]:
            raise ValueError(
                f"{path} holds {', '.join(values)} of a parameter, and not just what"
                f" {type(optimiser).__name__} keeps ({', '.join(KNOWN[type(optimiser)])}); delete it, train again."
            )
    return found


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
