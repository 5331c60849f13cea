"""The demonstration succeeds, and its picture shows a real run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    return importlib.import_module("demo")


def test_the_timeline_is_drawn(demo: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert demo.main(["--svg", str(tmp_path / "timeline.svg")]) == 0
    drawn = (tmp_path / "timeline.svg").read_text(encoding="utf-8")
    assert all(text in drawn for text in ("chain.chat()", "breaker opens: ServerError", "strong"))


def test_demo_succeeds_as_a_program_without_colour_in_a_pipe() -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py")]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout.count(" ok  "), "\033" in done.stdout) == (9, False)
