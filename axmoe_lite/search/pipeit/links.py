"""Values from one process to another, through memory that both see.

    sender, receiver = link(size=700_000, slots=3)      each goes to a process of its own
    sender.send((x, y))                                 waits for a free slot, copies, sends a note
    slot, (x, y) = receiver.receive()                   x and y lie in the slot: no second copy
    receiver.free(slot)                                 and may now be overwritten

A note says where in the slot each tensor lies, of which type, shape and strides; it travels through a pipe, and so
does the number of a slot that is free again. When one side ends, however it ends, its pipes close, and the other
side is told by :class:`Gone` instead of waiting for ever. The memory has no name in the file system that could be
left behind.

Chapter: 19, "Which core for which layer?"
"""

import contextlib
import multiprocessing
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

ALIGNED = 64  # bytes, as torch aligns its own memory: some kernels add up in another order elsewhere


class Gone(Exception):
    """The process on the other side has ended."""


class Sender:
    """The side that writes into slots."""

    def __init__(self, memory: Tensor, notes: Connection, freed: Connection) -> None:
        self.memory, self.notes, self.freed = memory, notes, freed
        self.slots = deque(range(len(memory)))

    def send(self, values: tuple) -> None:
        """Hand values on; waits while all slots are taken.

        Raises:
            Gone: when nobody is there to take them.
            ValueError: when they need more memory than a slot has.
        """
        try:
            slot = self.slots.popleft() if self.slots else int.from_bytes(self.freed.recv_bytes(), "little")
            note, _ = pack(values, self.memory[slot])
            self.notes.send((slot, note))
        except (EOFError, OSError) as error:
            raise Gone from error

    def close(self) -> None:
        """Close this process's ends of the pipes."""
        self.notes.close()
        self.freed.close()


class Receiver:
    """The side that computes on slots."""

    def __init__(self, memory: Tensor, notes: Connection, freed: Connection) -> None:
        self.memory, self.notes, self.freed = memory, notes, freed

    def receive(self) -> tuple[int, tuple]:
        """Wait for values: the slot's number, to be given to :meth:`free`, and the values, which lie in it.

        Raises:
            Gone: when nobody is there to send any.
        """
        try:
            slot, note = self.notes.recv()
        except (EOFError, OSError) as error:
            raise Gone from error
        return slot, _unpack(note, self.memory[slot], [])

    def free(self, slot: int) -> None:
        """Give a slot back. The sender may have sent its last and be gone."""
        with contextlib.suppress(OSError):
            self.freed.send_bytes(slot.to_bytes(4, "little"))

    def close(self) -> None:
        """Close this process's ends of the pipes."""
        self.notes.close()
        self.freed.close()


def link(*, size: int, slots: int) -> tuple[Sender, Receiver]:
    """The two sides of a queue of ``slots`` slots of ``size`` bytes each; both can be sent to a new process.

    >>> sender, receiver = link(size=100, slots=2)
    >>> sender.send((torch.tensor([1.0, 2.0]), 7))
    >>> receiver.receive()
    (0, (tensor([1., 2.]), 7))
    """
    size = _aligned(size)
    memory = torch.empty(slots, size, dtype=torch.uint8).share_memory_()
    notes, freed = multiprocessing.Pipe(duplex=False), multiprocessing.Pipe(duplex=False)
    return Sender(memory, notes[1], freed[0]), Receiver(memory, notes[0], freed[1])


def pack(value: Any, memory: Tensor | None = None, at: int = 0, placed: dict | None = None) -> tuple[Any, int]:
    """Write a tensor, a number or a tuple or list of such into memory: a note for the reader, and the bytes used.

    A tensor keeps its strides, also where they leave gaps or repeat; one that comes twice is written once.

    Args:
        value: what is to be written; what is no tensor travels in the note.
        memory: uint8 [bytes]; None: only say how many are needed.
        at, placed: where to begin, and what is there already.

    Raises:
        ValueError: if the memory is too small.
    """
    placed = {} if placed is None else placed
    if type(value) in (tuple, list):
        notes = []
        for one in value:
            note, at = pack(one, memory, at, placed)
            notes.append(note)
        return (type(value).__name__, notes), at
    if not isinstance(value, Tensor):
        return ("plain", value), at
    value = value.detach()
    if _overlaps(value):
        value = value.contiguous()
    key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
    if key in placed:
        return ("same", placed[key]), at
    placed[key] = len(placed)
    at = _aligned(at)
    end = at + _extent(value.shape, value.stride()) * value.element_size()
    note = ("tensor", at, value.dtype, tuple(value.shape), value.stride())
    if memory is not None:
        if end > len(memory):
            raise ValueError(
                f"A value of shape {list(value.shape)} ends at byte {end}; there is room for {len(memory)}, as the"
                " first batch needed. Shapes must not depend on what the images show."
            )
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
        _lying(memory, *note[1:])[once].copy_(value[once])
    return note, end


def _unpack(note: tuple, memory: Tensor, placed: list[Tensor]) -> Any:
    kind, *content = note
    if kind == "tensor":
        placed.append(_lying(memory, *content))
        return placed[-1]
    if kind == "same":
        return placed[content[0]]
    if kind == "plain":
        return content[0]
    parts = [_unpack(one, memory, placed) for one in content[0]]
    return tuple(parts) if kind == "tuple" else parts


def _lying(memory: Tensor, at: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    room = memory[at : at + _extent(shape, stride) * dtype.itemsize]
    return room.view(dtype).as_strided(shape, stride)


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _overlaps(value: Tensor) -> bool:
    """Whether two places of a tensor are one in memory, other than by a stride of 0."""
    reach = 0
    for step, n in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if s and n > 1):
        if step <= reach:
            return True
        reach += (n - 1) * step
    return False


def _aligned(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED
