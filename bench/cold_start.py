"""From the start of a process to the first token, with every program in the compilation cache.

    python -m bench.cold_start [--model e2b] [--format q4k] [--json FILE] [--keep FOLDER]

Writes a converted checkpoint of random weights in the true shapes (`--keep` leaves it there for the next time), lets
one process fill an empty compilation cache, then starts `--samples` processes one after the other. Each loads the
checkpoint and generates one token. Their clocks begin when they are started, so Python and its imports count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.environment import environment
from bench.published import PUBLISHED, SMALL, published
from bench.random_weights import random_params
from convert.converter import CONFIG_FILE, TEXT_FILES
from convert.encode import PLAIN_PLANE
from convert.manifest import FILE_NAME, Manifest, TensorEntry
from convert.policy import FORMATS
from convert.storage import atomic_folder, write_group
from gemma_jax.checkpoints import resolve
from gemma_jax.config import Gemma4Config
from gemma_jax.model import param_shapes
from pallas_kernels.arrays import FORMATS as QUANTIZED

PROMPT = 16
_FIRST_TOKEN = """
import sys, time
import gemma_jax
imported = time.time()
lm = gemma_jax.load(sys.argv[1])
loaded = time.time()
next(lm.stream(list(range(300, 300 + int(sys.argv[2]))), max_new_tokens=8))
print(imported, loaded, time.time())
"""


def write_random_checkpoint(folder: Path, config: Gemma4Config, weight_format: str) -> None:
    """A converted checkpoint of random weights, with the tokenizer of a bundled model."""
    params = random_params(config, weight_format)
    entries: dict[str, TensorEntry] = {}
    groups: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for path, shape in param_shapes(config).items():
        leaf: Any = params
        for key in path.split("/"):
            leaf = leaf[key]
        kind = next((name for name, cls in QUANTIZED.items() if isinstance(leaf, cls)), None)
        planes = {PLAIN_PLANE: leaf} if kind is None else vars(leaf)
        entries[path] = TensorEntry(kind or leaf.dtype.name, shape.shape, leaf.nbytes, 0.0)
        arrays = {name: np.asarray(plane) for name, plane in planes.items()}
        groups.setdefault(path.split("/")[0], {})[path] = arrays
    with atomic_folder(folder) as temporary:
        source = Path(resolve("tiny-dense"))
        for name in TEXT_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        (temporary / CONFIG_FILE).write_text(json.dumps(config.to_hf()))
        for group, tree in groups.items():
            write_group(temporary, group, tree)
        manifest = Manifest(weight_format, "random weights", "", entries)
        (temporary / FILE_NAME).write_text(manifest.to_json())


def first_token(folder: Path, cache: Path) -> dict[str, float]:
    """Seconds until the package was imported, the checkpoint loaded, and the first token there."""
    begin = time.time()
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_TOKEN, folder, str(PROMPT)],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    imported, loaded, token = (float(t) - begin for t in done.stdout.split())
    return {"imported": imported, "loaded": loaded, "first_token": token}


def main(argv: list[str] | None = None) -> int:
    """Prints the medians; the JSON keeps every sample."""
    parser = argparse.ArgumentParser(prog="python -m bench.cold_start", description=__doc__)
    parser.add_argument("--model", choices=(*PUBLISHED, *SMALL), default="e2b")
    parser.add_argument("--format", choices=FORMATS, default="q4k")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / options.model
        if not folder.exists():
            print(f"writing {folder}", file=sys.stderr, flush=True)
            write_random_checkpoint(folder, published(options.model), options.format)
            jax.clear_caches()
        cache = Path(scratch) / "cache"
        cold = first_token(folder, cache)
        samples = [first_token(folder, cache) for _ in range(options.samples)]
    medians = {name: statistics.median(s[name] for s in samples) for name in cold}
    print(
        f"{options.model} {options.format}: first token {medians['first_token']:.2f} s after the start of the process "
        f"(imports {medians['imported']:.2f} s, loaded after {medians['loaded']:.2f} s); with nothing compiled "
        f"{cold['first_token']:.1f} s"
    )
    if options.json:
        report = {
            "benchmark": "cold_start",
            "model": options.model,
            "format": options.format,
            "prompt_tokens": PROMPT,
            "environment": environment(),
            "nothing_compiled": cold,
            "seconds": samples,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
