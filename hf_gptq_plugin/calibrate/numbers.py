"""How a report writes numbers."""

from __future__ import annotations


def percent(value: float | None) -> str:
    """A fraction as a percentage of three digits."""
    if value is None:
        return "–"
    return f"{100 * value:,.0f}%" if value >= 0.9995 else f"{100 * value:#.3g}%"


def round_percent(value: float | None) -> str:
    """The same without zeros at the end, for values that are round."""
    return "–" if value is None else f"{100 * value:.6g}%"


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def size(count: float) -> str:
    """Bytes, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}" if count < 10 * factor else f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def amount(count: float) -> str:
    """A large number with a suffix."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return str(count)


def counted(number: int, what: str) -> str:
    """A count and its noun."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def span(low: int, high: int) -> str:
    """From the least to the most."""
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def general(value: float | None) -> str:
    """A number of four digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1e4 <= value < 1e9 else f"{value:.4g}"


def share(part: float, whole: float) -> str:
    """A part as a whole percentage."""
    fraction = part / whole if whole else 0.0
    return "<1%" if 0 < fraction < 0.005 else f"{fraction:.0%}"
