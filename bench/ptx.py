"""What the kernels of a compiled program issue, read from the PTX and the launches that XLA dumps.

PTX is what XLA hands to the assembler, so no tool of NVIDIA's is needed to read it. It is close to what runs: the
assembled products with Q4K and eQ8_0 weights have 2-10 % fewer instructions.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

_ENTRY = re.compile(r"\.entry (\w+)\(")
_LABEL = re.compile(r"^(\$\w+):")
_STATEMENT = re.compile(r"^\s+[^.\s/].*;")  # neither a directive nor a comment
_BRANCH = re.compile(r"@!?(%p\d+) bra(?:\.uni)?\s+(\$\w+);")
_LAUNCH = re.compile(r"(\d+): kCustomKernel .*\] (\w+) grid: \[(.*?)\] threads: \[(.*?)\]")
_NAME = re.compile(r'profile_annotation: "(.*?)"\s+thunk_id: (\d+)')


class Launch(NamedTuple):
    """The launch of one kernel: blocks, and instructions that all their warps issue."""

    blocks: int
    instructions: int


def dump_options(folder: Path) -> dict[str, str]:
    """Compiler options that make XLA write to `folder` what `launches` reads."""
    return {"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"}


def launches(folder: Path) -> dict[str, Launch]:
    """The launches of the only program dumped to `folder`, by the names of their HLO instructions.

    Copies and calls of libraries have no PTX and are not among them.
    """
    per_warp: dict[str, int] = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        if entry := _ENTRY.search(text):
            per_warp[entry[1]] = instructions(text)
    [sequence] = folder.glob("*.thunk_sequence.txt")
    [metadata] = folder.glob("*.thunk_metadata.txt")
    by_id = {}
    for number, kernel, *sizes in _LAUNCH.findall(sequence.read_text()):
        blocks, threads = (math.prod(map(int, dims.split(","))) for dims in sizes)
        warps = blocks * -(-threads // 32)
        by_id[int(number)] = Launch(blocks, warps * per_warp[kernel])
    names = _NAME.findall(metadata.read_text())
    return {name: by_id[int(number)] for name, number in names if int(number) in by_id}


def instructions(ptx: str) -> int:
    """Instructions that a warp issues in the one kernel of `ptx`.

    Both sides of a branch count, because a warp whose threads disagree runs both. A loop counts as often as it runs
    if it counts by a constant from one constant to another, and once if not.
    """
    lines = ptx.splitlines()
    times = [1 if _STATEMENT.match(line) else 0 for line in lines]
    labels = {label[1]: at for at, line in enumerate(lines) if (label := _LABEL.match(line))}
    for end, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels[branch[2]] < end:
            begin = labels[branch[2]]
            runs = _runs("\n".join(lines[:begin]), "\n".join(lines[begin:end]), branch[1])
            times[begin : end + 1] = [runs * n for n in times[begin : end + 1]]
    return sum(times)


def _runs(before: str, body: str, predicate: str) -> int:
    """How often a loop runs that goes on while `predicate` holds."""
    test = re.search(rf"setp\.\S+\s+{predicate}, (%\w+), (-?\d+);", body)
    if not test:
        return 1
    counter, bound = test[1], int(test[2])
    if wide := re.search(rf"cvt\.u32\.u64\s+{counter}, (%\w+);", body):
        counter = wide[1]
    step = re.search(rf"add\.\w+\s+{counter}, {counter}, (-?\d+);", body)
    starts = re.findall(rf"mov\.\w+\s+{counter}, (-?\d+);", before)
    if not step or not starts:
        return 1
    return -(-(bound - int(starts[-1])) // int(step[1]))
