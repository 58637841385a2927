"""Formats for percentage points, bytes and durations."""

from __future__ import annotations


def points(value: float, digits: int = 1) -> str:
    """Return an accuracy in [0, 1] in percent, without the percent sign, such as `"83.1"`."""
    return f"{100 * value:.{digits}f}"


def significant(value: float, like: float | None = None) -> str:
    """Return a number with four significant digits (`"54.30"`), or with the decimal places that `like` would have.

    Digits before the decimal point are never rounded, except in very large numbers, which are written with an exponent.
    """
    exponent = int(f"{value if like is None else like:.3e}".partition("e")[2])
    return f"{value:.{max(3 - exponent, 0)}f}" if -5 < exponent < 9 else f"{value:.3e}"


def size(n_bytes: float) -> str:
    """Return a number of bytes in decimal units, such as `"950 B"` or `"12.3 MB"`."""
    names = ("B", "kB", "MB", "GB", "TB")
    value, place = float(n_bytes), 0
    while value >= 999.5 and place < len(names) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {names[place]}" if value < 1000 else f"{value:.0f} {names[place]}"


def duration(seconds: float) -> str:
    """Return a duration in seconds as text, such as `"4.2s"`, `"42s"`, `"3m10s"` or `"2h05m"`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m"
