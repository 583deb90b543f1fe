"""Reads optimised HLO: which kernels a program launches and what each of them reads and writes.

The accounting is of the compiled program, not of the source: a fusion that only slices an operand is charged the slice,
one that updates an operand in place the update, anything else its whole operands and results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(_BITS) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
# Instructions that launch nothing: bookkeeping, and control flow whose bodies are counted instead.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id opt-barrier".split()
)
_READS_A_PART = frozenset(["dynamic-slice", "slice", "gather"])
_WRITES_A_PART = {"dynamic-update-slice": 1, "scatter": 2}  # index of the operand with the update
_VIEWS = frozenset(["bitcast", "reshape"])


class Instruction(NamedTuple):
    """One instruction of optimised HLO; `shape` is its type as written."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Kernel(NamedTuple):
    """One launch: what XLA calls it, and the bytes it reads and writes in device memory."""

    name: str
    op: str
    shape: str
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """All traffic of the launch."""
        return self.read + self.written


Module = dict[str, list[Instruction]]


def parse(text: str) -> tuple[Module, str]:
    """The computations of an HLO module's text, and the name of the entry."""
    module: Module = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = module.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            operands, attributes = _split_operands(found[5])
            # A parameter's operand is its number; others are named.
            pattern = r"(\d+)" if found[4] == "parameter" else r"%([\w.-]+)"
            names = tuple(re.findall(pattern, operands))
            current.append(
                Instruction(found[2], found[3], found[4], names, attributes, bool(found[1]))
            )
    return module, entry


def size(shape: str) -> int:
    """Bytes of a type as HLO writes it, tuples summed."""
    total = 0
    for element, dims in _SHAPE.findall(shape):
        count = math.prod(int(d) for d in dims.split(",") if d)
        total += (count * _BITS[element] + 7) // 8
    return total


def while_bodies(module: Module, computation: str) -> list[tuple[str, str]]:
    """(body, condition) of each loop of a computation, in order."""
    loops = []
    for instruction in module[computation]:
        if instruction.op == "while":
            loops.append((_called(instruction, "body"), _called(instruction, "condition")))
    return loops


def kernels(module: Module, computation: str) -> Iterator[Kernel]:
    """The launches of one run of a computation: loops once, conditionals by their cheapest branch."""
    types = {i.name: i.shape for i in module[computation]}
    for i in module[computation]:
        if i.op in _FREE or i.op.endswith("-done"):
            continue
        if i.op == "while":
            yield from kernels(module, _called(i, "body"))
        elif i.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
            names = re.findall(r"%([\w.-]+)", branches[1]) if branches else []
            names = names or [_called(i, "true_computation"), _called(i, "false_computation")]
            yield from min((list(kernels(module, n)) for n in names), key=len)
        elif i.op in ("call", "async-start"):
            target = re.search(r"(?:to_apply|calls)=%?([\w.-]+)", i.attributes)
            if target:
                yield from kernels(module, target[1])
        else:
            read, written = _traffic(module, i, types)
            yield Kernel(i.name, i.op, i.shape, read, written)


def _split_operands(rest: str) -> tuple[str, str]:
    """Splits ``a, b), attributes`` at the parenthesis that closes the operand list."""
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:at], rest[at + 1 :]
    return rest, ""


def _called(instruction: Instruction, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.-]+)", instruction.attributes)
    if not found:
        raise ValueError(f"{instruction.op} {instruction.name} has no {attribute}")
    return found[1]


def _traffic(module: Module, i: Instruction, types: dict[str, str]) -> tuple[int, int]:
    operand_sizes = [size(types.get(name, "")) for name in i.operands]
    if i.op == "fusion":
        inner = module[_called(i, "calls")]
        read = sum(
            _read_of(inner, p.name, operand_sizes[int(p.operands[0])])
            for p in inner
            if p.op == "parameter"
        )
        root = next(r for r in inner if r.is_root)
        return read, _written_by(inner, root)
    if i.op in _READS_A_PART:
        return size(i.shape), size(i.shape)
    if i.op in _WRITES_A_PART:
        update = operand_sizes[_WRITES_A_PART[i.op]]
        return update, update
    return sum(operand_sizes), size(i.shape)


def _read_of(inner: list[Instruction], name: str, whole: int) -> int:
    """Bytes that a fusion reads of one operand."""
    total = 0
    for user in (u for u in inner if name in u.operands):
        if user.op in _VIEWS:
            total += _read_of(inner, user.name, whole)
        elif user.op in _READS_A_PART and user.operands[0] == name:
            total += size(user.shape)
        elif user.op in _WRITES_A_PART and user.operands[0] == name:
            continue
        else:
            return whole
    return min(total, whole)


def _written_by(inner: list[Instruction], root: Instruction) -> int:
    by_name = {i.name: i for i in inner}
    if root.op == "tuple":
        return sum(_written_by(inner, by_name[name]) for name in root.operands)
    if root.op in _VIEWS:
        return _written_by(inner, by_name[root.operands[0]])
    if root.op in _WRITES_A_PART:
        return size(by_name[root.operands[_WRITES_A_PART[root.op]]].shape)
    return size(root.shape)
