"""A plugin of pytest for Pythons without sockets, threads and processes: what needs one skips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

#: What Python says there, by the class of the error and the beginning of its text.
MISSING = (
    (RuntimeError, "can't start new thread"),
    (OSError, "[Errno 138]"),  # no sockets
    (OSError, "[Errno 52]"),  # no processes
    (ModuleNotFoundError, "No module named"),
)


def lacks(error: BaseException | None) -> bool:
    while error is not None:
        if any(isinstance(error, kind) and str(error).startswith(text) for kind, text in MISSING):
            return True
        error = error.__cause__ or error.__context__
    return False


class Plugin:
    """Counts, and turns into a skip what failed for want of a socket, a thread or a process."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        report: Any = yield
        if report.failed and call.excinfo is not None and lacks(call.excinfo.value):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: {call.excinfo.value}")
        self.skipped += report.skipped
        self.passed += report.passed and report.when == "call"
        return report
