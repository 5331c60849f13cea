"""The README's Python runs, and what it says of the errors is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import copilot_router
from copilot_router import RouterError

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_quickstart_runs_offline_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The first block stands within the first twenty lines' reach and prints its own comments."""
    assert README.split("```python")[0].count("\n") < 20
    exec(BLOCKS[0], {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Hello from the cloud."
    assert re.sub(r"\d+ ms", "0 ms", printed[1]) == "local: ProviderUnavailable: refused 0 ms -> cloud: ok 0 ms"


def test_every_block_runs() -> None:
    """All blocks in order, in one namespace; none of them sends anything."""
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["chain"].chat("x").text == "forty-two"  # type: ignore[attr-defined]


def test_the_error_tree_is_the_one_in_the_module() -> None:
    """Names and nesting of the drawn tree equal the classes and their bases."""
    tree = README.split("RouterError   ", 1)[1].split("```", 1)[0]
    found: list[tuple[str, str]] = []
    parents = ["RouterError"]
    for line in tree.splitlines()[1:]:
        match = re.match(r"([│├└─ ]+)(\w+)", line)
        assert match, line
        depth = len(match.group(1)) // 3
        found.append((match.group(2), parents[depth - 1]))
        parents[depth:] = [match.group(2)]
    public = {
        name: kind
        for name, kind in vars(copilot_router).items()
        if isinstance(kind, type) and issubclass(kind, RouterError) and kind is not RouterError
    }
    assert dict(found) == {name: kind.__bases__[0].__name__ for name, kind in public.items()}
