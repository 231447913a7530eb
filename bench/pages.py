"""Markdown pages with generated parts."""

import sys
from collections.abc import Callable
from pathlib import Path


def short(value: float) -> str:
    """Three significant digits, never with an exponent."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if "e" in text else text


def columns(names: str) -> tuple[str, ...]:
    """The cells of a table's header, from their names with ``" | "`` between them."""
    return tuple(names.split(" | "))


def page_with(text: str, block: str) -> str:
    """The page with the part from the block's first line to its last replaced."""
    first, last = block.partition("\n")[0], block.rpartition("\n")[2]
    before, _, rest = text.partition(first)
    _, _, after = rest.partition(last)
    return before + block + after


def update(page: Path, made: Callable[[str], str], module: str, arguments: list[str]) -> int:
    """Regenerate a page from its text, or with ``--check`` compare it; returns the exit code."""
    text = page.read_text(encoding="utf-8")
    new = made(text)
    if arguments == ["--check"]:
        if new != text:
            print(f"{page} is stale: run python -m {module}", file=sys.stderr)
            return 1
        return 0
    page.write_text(new, encoding="utf-8")
    return 0
