"""What every probe returns: numbers, a table of them, and what they mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

Cell = str | int | float | None


@dataclass(frozen=True)
class Finding:
    """One thing that a probe found."""

    level: Literal["fault", "warning", "good", "note"]
    text: str
    """What was found and what it means."""
    fix: str = ""
    """What to do about it, in a line; empty where there is nothing to do."""

    def __str__(self) -> str:
        return f"[{self.level}] {self.text}" + (f" Fix: {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first column names."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a probe found; printing it shows findings first, then the table."""

    title: ClassVar[str]

    findings: tuple[Finding, ...]

    def table(self) -> Table:
        """The numbers by layer or block."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Numbers, lists and texts alone, as JSON takes them: None in place of what is not finite."""
        return _plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return _finite([getattr(self, f.name) for f in dataclasses.fields(self)])

    def __str__(self) -> str:
        table = self.table()
        cells = [table.head, *([shown(cell) for cell in row] for row in table.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(table.head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        found = [str(finding) for finding in self.findings]
        return "\n".join([self.title, *found, *(line.rstrip() for line in (lines if table.rows else []))])


def shown(cell: Cell) -> str:
    """A cell as people read it.

    >>> shown(0.123456), shown(None), shown(1e-17), shown(True)
    ('0.123', '', '1e-17', 'yes')
    """
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def few(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence, cut short.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def many(count: int, what: str, several: str = "") -> str:
    """
    >>> many(1, "layer"), many(3, "layer"), many(2, "branch", "branches")
    ('1 layer', '3 layers', '2 branches')
    """
    return f"{count} {what if count == 1 else several or f'{what}s'}"


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_finite(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
