"""The console on stdout: as wide as the terminal, and where there is none, as wide as the widest table."""

from __future__ import annotations

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 200


def stdout_console() -> Console:
    """Texts are printed as they are: nothing in them is markup, an emoji or a number to colour."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    return console
