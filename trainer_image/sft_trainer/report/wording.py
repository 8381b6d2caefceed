"""Figures as a person reads them: counts, bytes, durations, rates. The same in the terminal and in the report."""

from __future__ import annotations

from datetime import UTC, datetime


def count(number: float) -> str:
    """12,345"""
    return f"{number:,.0f}"


def short_count(number: float) -> str:
    """12.3k, 4.56M: three digits that count."""
    for limit, divisor, unit in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if number < limit:
            return f"{number / divisor:.3g}{unit}" if unit else f"{number:,.0f}"
    return f"{number / 1e12:.3g}T"


def size(num_bytes: float) -> str:
    """1.4 GB"""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """0.42 s, 12.3 s, 4:05, 2:03:04"""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def percent(share: float) -> str:
    """98.7%"""
    return f"{share:.1%}"


def rate(learning_rate: float) -> str:
    """2e-05, 1.25e-05"""
    return "0" if learning_rate == 0 else f"{learning_rate:.3g}"


def number(value: float) -> str:
    """A loss or a norm in four digits that count; 'not a number' is said."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"


def moment(unix_time: float) -> str:
    """2026-01-31 09:05:07 UTC"""
    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def dropped(reasons: dict[str, int]) -> str:
    """12 dropped (10 NoLossTokens, 2 TooLong)"""
    if not reasons:
        return "none dropped"
    listed = ", ".join(f"{count(num)} {reason}" for reason, num in reasons.items())
    return f"{count(sum(reasons.values()))} dropped ({listed})"


def visible(text: str) -> str:
    """Text of unknown origin, its control characters (a terminal's commands) as pictures; lines and tabs stay."""
    return "".join(
        char
        if char in "\n\t"
        else chr(0x2400 + ord(char))
        if ord(char) < 0x20
        else "�"
        if 0x7F <= ord(char) < 0xA0
        else char
        for char in text
    )
