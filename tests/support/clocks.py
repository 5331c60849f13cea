"""A clock moved by hand."""

from __future__ import annotations


class FakeClock:
    """``clock()`` is the time; ``sleep`` moves it and is recorded in ``slept``."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
