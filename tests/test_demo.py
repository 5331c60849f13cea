"""The demonstration succeeds, each of its steps checks itself, its picture shows a real run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from copilot_router import FailoverChain, ProviderTier

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


@pytest.mark.parametrize(("step", "settings", "moods"), [
    ("healthy", {}, {"healthy": "weak"}), ("refused", {"tiers": 1}, {}),
    ("breaker", {"failure_threshold": 99}, {}), ("rate limit", {}, {"busy": "broken"}),
    ("deadline", {}, {"dripping": "healthy"}), ("recovery", {"recovery_timeout": 1e6}, {}),
    ("escalation", {"escalation_marker": "[OTHER]"}, {}),
    ("marker", {"escalation_marker": "[OTHER]"}, {}), ("all down", {"tiers": 1}, {})])
def test_each_step_fails_when_something_else_happens(
        demo: Any, step: str, settings: dict[str, Any], moods: dict[str, str],
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def chain(tiers: list[ProviderTier], **given: Any) -> FailoverChain:
        changed = {**given, **settings}
        return FailoverChain(tiers[: changed.pop("tiers", None)], **changed)
    monkeypatch.setattr(demo, "FailoverChain", chain)
    for mood, other in moods.items():
        monkeypatch.setattr(demo.Handler, mood, getattr(demo.Handler, other))
    monkeypatch.setattr(demo, "STEPS", [one for one in demo.STEPS if one[0] == step])
    assert demo.main([]) == 1
    assert "unexpected" not in capsys.readouterr().out
