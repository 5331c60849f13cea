"""The demo tells the truth: it succeeds, and each sabotage of the module makes it fail at its own step."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from clocks import FakeClock

from copilot_router import FailoverChain, ProviderTier, RateLimited, ScriptedProvider

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.py"

SABOTAGE = {
    "breaker": "c.CircuitBreaker._try_admit = lambda self: c.Ticket(self, self._record.generation, False)",
    "recovery-never": "t = c.CircuitBreaker._begin_trial; c.CircuitBreaker._begin_trial = lambda self, now: None",
    "recovery-all": (
        "t = c.CircuitBreaker._try_admit\n"
        "c.CircuitBreaker._try_admit = lambda self: c.Ticket(self, self._record.generation, True)"
        " if self._clock() > 1 and self._record.state != 'closed' and self._clock() < 100 else t(self)"
    ),
    "deadline": "c._Limits.left = lambda self: 1e6",
    "rate limit": "c._retry_hint = lambda *_: None",
    "escalation": "c._after_marker = lambda text, marker: None",
    "marker": (
        "f = c.FailoverChain._finished\n"
        "def finished(self, state, tier, response):\n"
        "    answer = f(self, state, tier, response)\n"
        "    shown = response.content\n"
        "    class Shown(type(answer)):\n"
        "        content = property(lambda self: shown, lambda self, value: None)\n"
        "    if shown and 'ESC' in shown: answer.__class__ = Shown\n"
        "    return answer\n"
        "c.FailoverChain._finished = finished"
    ),
    "refused": (
        "b = c.FailoverChain._begin\n"
        "def begin(self, *arguments):\n"
        "    state = b(self, *arguments)\n"
        "    state.order = state.order[:1]\n"
        "    return state\n"
        "c.FailoverChain._begin = begin"
    ),
}


def run_demo(before: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import copilot_router as c, runpy\n{before}\nrunpy.run_path({str(DEMO)!r}, run_name='__main__')"
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_demo_succeeds_in_under_ten_seconds_without_colour_in_a_pipe() -> None:
    """Exit status 0, a line for each step, no escape codes."""
    start = time.monotonic()
    done = run_demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 10
    assert done.stdout.count(" ok ") >= 9
    assert "\033" not in done.stdout


@pytest.mark.parametrize("name", SABOTAGE)
def test_each_sabotage_fails_at_its_own_step(name: str) -> None:
    """The demo would notice if the module stopped doing what the step is about."""
    done = run_demo(SABOTAGE[name])
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line.split("  ")[0].strip() for line in failed] == [name.split("-")[0]], done.stdout


def test_the_picture_is_drawn_from_a_real_run(tmp_path: Path) -> None:
    """``--svg FILE`` draws what happened, without a date or a path in the file; the one in docs/ is such a picture."""
    pytest.importorskip("matplotlib")
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    drawn = tmp_path / "timeline.svg"
    done = subprocess.run(
        [sys.executable, str(DEMO), "--svg", str(drawn)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{drawn} is drawn\n"), done.stderr
    for picture in (drawn, ROOT / "docs" / "timeline.svg"):
        text = picture.read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "dc:date" not in text
        for said in ("local", "cheap", "strong", "chain.chat()", "breaker opens: ServerError", "closed again", "gave up"):
            assert f"<!-- {said}" in text, said  # matplotlib names each text it draws


def test_the_bars_of_the_picture_are_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """One failure, one answer that gave up, one answer, and the call that they were for, at their times."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(DEMO.parent))
    timeline = importlib.import_module("timeline")
    clock, events = FakeClock(0.0), []

    def after(seconds: float, text: str | Exception) -> Callable[..., str | Exception]:
        def answer(*_: object, **__: object) -> str | Exception:
            clock.advance(seconds)
            return text

        return answer

    tiers = [
        ProviderTier("a", ScriptedProvider([after(1, RateLimited("slow down"))]), ["a"]),
        ProviderTier("b", ScriptedProvider([after(2, "[ESCALATE] too hard")]), ["b"]),
        ProviderTier("c", ScriptedProvider([after(4, "done")]), ["c"]),
    ]
    chain = FailoverChain(tiers, escalation_model="c", on_event=events.append, clock=clock, sleep=clock.sleep)
    chain.chat("hi")
    expected = [("a", 0, 1, "failed"), ("b", 1, 3, "gave up"), ("c", 3, 7, "ok"), (timeline.CALLER, 0, 7, "ok")]
    assert [tuple(bar) for bar in timeline.bars(events)] == expected
