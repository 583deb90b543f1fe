"""What lane programs are made of: the lanes of a warpgroup, and what each of them holds."""

from __future__ import annotations

from typing import Any

WARPS, LANES = 4, 32
Register = Any
Registers = list[Register]
