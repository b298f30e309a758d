"""Names in a line, and errors that name what was wrong and what would do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


def unknown(what: str, got: str, known: Iterable[str], *, where: str = "") -> ValueError:
    """A `ValueError` for a name that is not in a table: the nearest names first, then all of them.

    >>> print(unknown("scheme part", "gm", ["bn", "gn"]))
    unknown scheme part 'gm'; did you mean gn? Known: bn, gn
    >>> print(unknown("model", "resnext50", ["resnet50", "resnext50_32x4d"]))
    unknown model 'resnext50'; did you mean resnext50_32x4d or resnet50? Known: resnet50, resnext50_32x4d
    """
    names = sorted(known)
    text = str(got).lower()  # a scheme's option may be a number
    begun = [name for name in names if text and name.startswith(text)]
    near = list(dict.fromkeys(begun + difflib.get_close_matches(text, names, n=3, cutoff=0.5)))[:3]
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    shown = names if len(names) <= 40 else [*names[:40], f"and {len(names) - 40} more"]
    return ValueError(f"unknown {what} {got!r}{where}{hint} Known: {', '.join(shown) or 'none'}")


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names in a line: at most so many, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def one_line(error: object, most: int | None = None) -> str:
    """What an error says, without line breaks, at most so many characters of it; its type where it says nothing.

    >>> one_line(ValueError("a   long story"), 8), one_line(KeyError())
    ('a long s', 'KeyError')
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def listed_in(text: str) -> list[str]:
    """The values that commas separate; commas inside parentheses do not.

    >>> listed_in("gn, kn(p=0,eps=0.1),")
    ['gn', 'kn(p=0,eps=0.1)']
    """
    return [part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip()]
