"""Speed of conversion by the size of the pieces that matrices are cut into: ``python -m bench.convert``.

Prints, for each format and piece size, MB of bfloat16 source per second with a thread per core, and per second of
processor time (which a busy machine changes less). `convert.encode` takes its piece size from here.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np

from convert import encode
from pallas_kernels.arrays import FORMATS

_ELEMENTS = 2**23
_K = 2560  # E4B's hidden size; super-blocks of 256


def measure(format: str, piece: int) -> tuple[float, float]:
    """MB/s of wall-clock time and of processor time for encoding `_ELEMENTS` in pieces of `piece` elements."""
    width = encode.unit_width(format, _K)
    rows = piece // width
    numbers = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    source = numbers.astype(jnp.bfloat16)
    compiled = encode.compiled(format, (rows, width), source.dtype)
    compiled(source)
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        wall, processor = time.perf_counter(), time.process_time()
        list(pool.map(lambda _: np.asarray(compiled(source)[1]), range(_ELEMENTS // piece)))
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    megabytes = 2 * _ELEMENTS / 1e6
    return megabytes / wall, megabytes / processor


def main() -> None:
    """Prints the table."""
    print(f"{'format':8}{'piece':>10}{'MB/s':>8}{'MB/cpu-s':>10}   ({os.cpu_count()} cores)")
    for format in FORMATS:
        for power in (14, 16, 18, 20, 22):
            wall, processor = measure(format, 2**power)
            print(f"{format:8}{2**power:>10}{wall:>8.1f}{processor:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
