"""What stands on the README and in the guides, and what the module has for their tables."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
PAPERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]


def text_of(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str | Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def without_code(page: str | Path) -> str:
    return re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)


def section(page: str, title: str) -> str:
    """What stands below a heading, up to the next one."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text_of(page))
    assert found, title
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of the rows of all tables, without the headings and the quotes of code."""
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and before.startswith("|"):
            cells = line.strip("|").split("|")
            yield [re.sub("^`([^`]*)`$", r"\1", cell.strip()) for cell in cells]


def names_in(cell: str) -> list[str]:
    return re.findall(r"\w+", cell)


def told(block: str) -> list[str]:
    """What a block says that it prints: the comment behind a print, and comments at its end."""
    code = re.sub(r"(\n# .*)+\n$", "\n", block)
    prints = (re.search(r"print\(.*\)\s+# (.*)$", line) for line in code.splitlines())
    return [found[1] for found in prints if found] + re.findall("(?m)^# (.*)$", block[len(code) :])


def run_blocks(page: str | Path, skip: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs the Python blocks of a page, one after the other, in one namespace."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python")[skip:]:
        if "from flask" in block:
            pytest.importorskip("flask")
        exec(compile(block, str(page), "exec"), names)
        yield block, names


SHOWN = {inspect.Parameter.empty: "required"}
SHOWN |= {getattr(time, name): f"time.{name}" for name in ("monotonic", "sleep")}


def parameters(*functions: Any) -> dict[str, str]:
    """Names and defaults of all arguments, also of those that a class hands on to its base."""
    return {name: SHOWN.get(item.default) or repr(item.default) for function in functions
        for name, item in inspect.signature(function).parameters.items() if name != "self"
        and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)}


def public(kind: type) -> set[str]:
    """Attributes, without those of tuples and those that are no part of the guide."""
    names = {*dir(kind), *getattr(kind, "__dataclass_fields__", ())}
    names -= {"has_tool_calls", "carry", "count", "index"}
    return {name for name in names if name[0] != "_"}
