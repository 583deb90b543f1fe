"""Files as arrays that are never read as a whole: the system fetches a page when something first touches it.

By hand and not through `mmap.mmap` or `numpy.memmap`, which before Python 3.13 keep a descriptor for each mapping: a
checkpoint has more planes than a process may have open files.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only array of what `path` holds, row by row and nothing else.

    It begins at a page, so that JAX on a CPU takes it without a copy. The mapping lasts as long as something refers to
    the array, without a descriptor. Whoever shortens the file meanwhile ends the process that touches what is gone.

    Raises:
        ValueError: the file has not the bytes that the array takes; the message names it.
        OSError: it cannot be opened or mapped.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size != nbytes:
            raise ValueError(
                f"{path} has {size} bytes, but {dtype.name}{list(shape)} takes {nbytes}"
            )
        address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(descriptor)
    buffer = (ctypes.c_ubyte * nbytes).from_address(address)
    # Not when the interpreter exits: threads of JAX may still be reading.
    weakref.finalize(buffer, _libc.munmap, address, nbytes).atexit = False
    array = np.frombuffer(buffer, dtype).reshape(shape)
    array.flags.writeable = False
    return array
