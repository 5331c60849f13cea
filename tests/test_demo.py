"""The demonstration succeeds, each of its steps checks itself, its picture shows a real run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from copilot_router import Event, FailoverChain, ProviderTier

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    return importlib.import_module("demo")


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


def test_help_says_what_the_demo_does(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    assert {"--svg", "matplotlib", "network"} <= set(
        capsys.readouterr().out.replace(".", " ").split())


def test_svg_without_matplotlib_says_how_to_get_it(demo: Any, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "timeline", raising=False)
    assert demo.main(["--svg", "unused.svg"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_pictures_have_their_text_as_text_and_a_background(demo: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "timeline.svg"
    assert demo.main(["--svg", str(drawn)]) == 0
    timeline = {"local", "cheap", "strong", "chain.chat()", "breaker opens: ServerError",
        "closed again"}
    expected = {drawn: timeline, ROOT / "docs" / "timeline.svg": timeline}
    expected[ROOT / "docs" / "benchmarks.svg"] = {"copilot_router", "bare requests", "10 ms"}
    for picture, words in expected.items():
        root = ElementTree.parse(picture).getroot()
        assert words <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
        first = next(root.iter("{http://www.w3.org/2000/svg}path"))
        assert "fill: #ffffff" in first.get("style", "")
        assert "dc:date" not in picture.read_text(encoding="utf-8")


def test_bars_of_the_picture_are_the_requests(demo: Any) -> None:
    pytest.importorskip("matplotlib")
    timeline = importlib.import_module("timeline")
    steps = [("attempt", "a", 0), ("failover", "a", 1), ("attempt", "b", 1), ("escalation", "b", 3)]
    steps += [("attempt", "c", 3), ("done", "c", 7)]
    events = [Event(kind, tier, "", {"outcome": "ok"}, time) for kind, tier, time in steps]
    requests = [("a", 0, 1, "failed"), ("b", 1, 3, "gave up"), ("c", 3, 7, "ok")]
    assert list(map(tuple, timeline.bars(events))) == [*requests, (timeline.CALLER, 0, 7, "ok")]
