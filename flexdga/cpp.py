"""C++ for CPUs, compiled on first use by Inductor's own builder, into its cache.

FLEXDGA_STOCK_CPU_KERNEL=1 switches it off. Then, on Windows, and where it does not compile, whoever
asks does the same in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdga.cpu_kernel import switched_off
from flexdga.saying import warn_once

FOLDER = Path(__file__).parent
"""Where the sources are."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available(name: str) -> bool:
    """Whether `library` is to be had. A compiler that traces this runs it."""
    return library(name) is not None


@functools.cache
def library(name: str) -> Any:
    """What was compiled of NAME.cpp if it is `flexdga_ready`; None where it is not to be had."""
    if switched_off() or sys.platform == "win32":
        return None
    from torch._inductor.codecache import CppCodeCache

    try:
        made = CppCodeCache.load(source(name))
    except Exception as error:  # of whatever compiler there is
        warn_once(f"flexdga: {name}.cpp did not compile, so planning is slower: {error}")
        return None
    return made if made.flexdga_ready() else None


def source(name: str) -> str:
    """NAME.cpp, with what it includes of this folder in its place."""
    text = (FOLDER / f"{name}.cpp").read_text()
    return re.sub(r'#include "(.*)"', lambda found: (FOLDER / found[1]).read_text(), text)


def call(name: str, function: str, *arguments: Any) -> None:
    """Call a function of a `library`.

    Tensors go as the addresses of their numbers, floats and bools as C's, and sizes as an array
    with the number of threads behind them.
    """
    getattr(library(name), function)(*map(_in_c, arguments))


def _in_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, bool):
        return int(argument)
    numbers = *argument, torch.get_num_threads()
    return (ctypes.c_int64 * len(numbers))(*numbers)
