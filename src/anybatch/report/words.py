"""Numbers and lists as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float, digits: int = 1) -> str:
    """With so many decimals, and a true minus sign.

    >>> number(-0.04), number(-2.5)
    ('0.0', '−2.5')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def percent(value: float, interval: float | None = None) -> str:
    """An error in percent with the decimals that its interval leaves room for.

    >>> percent(3.94), percent(0.03), percent(3.94, 0.62)
    ('3.9', '0.03', '3.9 ± 0.6')
    """
    smallest = min(abs(value) or 1, 1 if interval is None else interval)
    digits = 2 if smallest < 0.095 else 1
    return number(value, digits) if interval is None else f"{number(value, digits)} ± {number(interval, digits)}"


def points(value: float, interval: float) -> str:
    """A difference with its half-width, rounded so that it still shows whether 0 is inside.

    >>> points(2.41, 1.06), points(0.52, 0.47), points(0.03, 0.02)
    ('2.4 ± 1.1', '0.52 ± 0.47', '0.03 ± 0.02')
    """
    for digits in (1, 2, 3):
        value_, interval_ = round(abs(value), digits), round(interval, digits)
        if interval_ > 0 and (value_ > interval_) == (abs(value) > interval):
            return f"{number(value, digits)} ± {number(interval, digits)}"
    return f"{number(value, 4)} ± {number(interval, 4)}"


def listed(items: Sequence[str]) -> str:
    """
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits and no exponent, thousands apart.

    >>> significant(12345.6), significant(0.0031250), significant(88.0)
    ('12,346', '0.00313', '88')
    """
    if not value or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
