"""The scenarios of a breaker once more, on every store: a single breaker must not tell the difference.

The clock of each test is the store's time, too, so that the figures stay exact.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import test_breaker
from clocks import FakeClock
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import rule, run_state_machine_as_test
from stores import KINDS, Wrapped
from test_breaker_model import Model

from copilot_router import CircuitBreaker

#: Not here: what forks, interrupts and races do with a store has tests of its own, and settings are checked without one.
#: With a store, breakers of one name are one; and what hammers a breaker from many threads would only time the store.
_OWN = (
    "test_08_a_bad", "test_08_bad", "test_09", "test_11", "test_85", "test_29", "test_44", "test_69", "test_88", "test_91",
    "test_92", "test_93", "test_94", "test_95", "test_the_child_side", "test_a_race", "test_a_change",
)  # fmt: skip
globals().update({n: t for n, t in vars(test_breaker).items() if n.startswith("test_") and not n.startswith(_OWN)})

_runs = itertools.count()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=KINDS, autouse=True)
def kind(request: pytest.FixtureRequest, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Every breaker that a test makes keeps its state in a store of this kind, under a name of its own."""
    numbers = itertools.count()
    settings = {"memory": {}, "sqlite": {"timeout": 5.0}, "redis": {"timeout": 5.0, "shared_counts": True}}[request.param]

    def made(*args: Any, **kwargs: Any) -> CircuitBreaker:
        kwargs.setdefault("name", f"breaker {next(numbers)}")
        store = Wrapped(make_store(request.param, **settings), kwargs.get("clock", time.monotonic))
        return CircuitBreaker(*args, store=store, **kwargs)

    monkeypatch.setattr(test_breaker, "CircuitBreaker", made)
    return str(request.param)


class TwoProcesses(Model):
    """The same model, of two breakers that share a store and take turns: together they are one."""

    store: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__()
        names = f"run {next(_runs)}"
        self.both = [self.made(name=names, store=Wrapped(self.store, self.clock)) for _ in range(2)]
        self.breaker, self.highest = self.both[0], 0

    @rule()
    def switch(self) -> None:
        self.both.reverse()
        self.breaker = self.both[0]

    def generation_is_right(self, generation: int) -> None:
        """It never goes back in the store, and both breakers have the same record."""
        other = self.both[1]
        assert other.state == self.breaker.state
        changed = {} if self.store.load(self.breaker.name)[0] else {"generation": 0}
        if not changed:
            assert generation >= self.highest
            self.highest = generation
        assert other._record._replace(deadline=0, **changed) == self.breaker._record._replace(deadline=0, **changed)


def test_40_two_processes_behave_as_one(kind: str, make_store: Callable[..., Any]) -> None:
    """40: any sequence of steps in two breakers on one store gives the answers of one breaker without."""
    settings = {} if kind == "memory" else {"timeout": 5.0, "refresh": 0}
    TwoProcesses.store = make_store(kind, **settings, **({"shared_counts": True} if kind == "redis" else {}))
    steps = hypothesis_settings(
        max_examples={"memory": 80, "sqlite": 30, "redis": 20}[kind], stateful_step_count=40, deadline=None
    )
    run_state_machine_as_test(TwoProcesses, settings=steps)
