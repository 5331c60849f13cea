"""The demo tells the truth: it succeeds, and each sabotage of the module makes it fail at its own step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    "refused": "o = c.FailoverChain._order; c.FailoverChain._order = lambda self, m, n: o(self, m, n)[:1]",
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
