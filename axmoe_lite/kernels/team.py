"""Compiled loops on torch's own threads: work in tasks, shared among the team that torch's operations use.

A second set of threads beside torch's would cost more than it brings: after a parallel operation the threads
of each set stay awake for a while, on the same cores, in each other's way. So compiled loops are plain C
functions, void f(long *arguments), and torch's OpenMP runtime is asked to run them on its team. Where torch
has none that can be asked (macOS, Windows), the calling thread does all.

Imports numba, so it is imported only when needed. Chapter: 06, "Faster than float32?"
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

REFUSED = (
    "does not fit approximate layers: their loops are given addresses of numbers in memory. Trace, export or measure"
    " the exact network, before approximate() or after restore()."
)

# Every loop's first two arguments are the next task and the number of tasks.


@intrinsic
def next_task(context: Any, arguments: Any) -> tuple:
    """The next task nobody has taken: arguments[0], which grows by one for all threads."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.bitcast(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), generate


@intrinsic
def pointer(context: Any, address: Any) -> tuple:
    """An address as a pointer, for numba.carray."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def float_of(context: Any, bits: Any) -> tuple:
    """The float32 whose bits are the lower half of an integer."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.trunc(values[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic
def bits_of(context: Any, value: Any) -> tuple:
    """The 32 bits of a float32, as an integer."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(32))

    return types.int32(types.float32), generate


def loop(function: Callable) -> Any:
    """A C function void f(void *arguments), compiled now, or read from the disk where a cache can be written."""
    try:
        return numba.cfunc("void(voidptr)", cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache
        return numba.cfunc("void(voidptr)")(function)


def run(function: Any, tasks: int, *arguments: "int | np.float32 | np.ndarray | torch.Tensor") -> None:
    """Do all tasks of a loop; arrays are handed over as addresses, floats as the bits of a float32."""
    if torch.jit.is_tracing():  # then sizes are tensors, and their addresses would pass for them
        raise RuntimeError(f"torch.jit.trace (so ONNX, too) {REFUSED}")
    words = (ctypes.c_int64 * (2 + len(arguments)))(0, tasks, *map(_word, arguments))
    threads = min(torch.get_num_threads(), tasks)
    parallel = _openmp() if threads > 1 else None
    if parallel is None:
        _c_function(function)(words)
    else:
        parallel(function.address, words, threads, 0)


def _word(argument: "int | np.float32 | np.ndarray | torch.Tensor") -> int:
    kind = type(argument)  # this runs at every product, some fifteen times
    if kind is int:
        return argument
    if kind is np.float32:
        return int(argument.view(np.int32))
    if not isinstance(argument, torch.Tensor):
        return argument.__array_interface__["data"][0]
    if argument.is_meta:
        raise RuntimeError(f"A meta tensor {REFUSED}")
    return argument.data_ptr()


@functools.cache
def _c_function(function: Any) -> Callable:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)


@functools.cache
def _openmp() -> Callable | None:
    """GOMP_parallel of the very library that torch's operations call, or None."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            call = ctypes.CDLL(str(path)).GOMP_parallel  # loaded already: torch was imported
        except (OSError, AttributeError):
            continue
        call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        call.restype = None
        return call
    return None
