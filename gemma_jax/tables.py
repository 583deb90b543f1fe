"""Plain-text tables and sizes, as the command line prints them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(nbytes: float) -> str:
    """Bytes in the binary unit that keeps the number below 1024.

    >>> size(1000), size(3 * 2**29)
    ('1000 B', '1.50 GiB')
    """
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.2f} {_UNITS[unit]}" if unit else f"{nbytes:.0f} B"


def pairs(rows: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each name and value, values aligned."""
    rows = list(rows)
    width = max([16, *(len(name) for name, _ in rows)])
    return [f"  {name:<{width}} {value}" for name, value in rows]


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Columns of equal width, the first `left` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
