"""The breaker against a naive model: any sequence of steps, the same answers. Scenario 40."""

from __future__ import annotations

import math
from typing import Any

from clocks import FakeClock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from copilot_router import CircuitBreaker, CircuitOpen, Ticket

THRESHOLD, RECOVERY, LEASE = 3, 15.0, 40.0


class Model(RuleBasedStateMachine):
    """Written from the description, with an era number instead of anything clever."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock(0.0)
        self.breaker = self.made()
        self.state, self.until, self.failures, self.era, self.takeovers = "closed", 0.0, 0, 0, 0
        self.generation = 0

    def made(self, **settings: Any) -> CircuitBreaker:
        return CircuitBreaker(THRESHOLD, RECOVERY, trial_timeout=LEASE, clock=self.clock, **settings)

    def change(self, state: str, until: float = 0.0) -> None:
        self.state, self.until = state, until
        self.era += 1
        if state == "closed":
            self.failures = 0

    @rule(target=tickets)
    def admit(self) -> tuple[Ticket | None, int, bool]:
        due = self.state != "closed" and self.clock.now >= self.until
        try:
            ticket = self.breaker.admit()
        except CircuitOpen:
            assert self.state != "closed"
            assert not due
            return (None, -1, False)
        assert self.state == "closed" or due
        assert ticket.is_trial == due
        if due:
            self.takeovers = self.takeovers + 1 if self.state == "half_open" else self.takeovers
            self.change("half_open", self.clock.now + LEASE * min(2 ** max(0, self.takeovers - 1), 8))
        return (ticket, self.era, due)

    @rule(held=consumes(tickets), verdict=st.sampled_from(["success", "failure", "neutral", "park"]))
    def settle(self, held: tuple[Ticket | None, int, bool], verdict: str) -> None:
        ticket, era, trial = held
        if ticket is None:
            return
        assert ticket._breaker.state == self.state
        getattr(ticket, verdict)(*([30.0] if verdict == "park" else []))
        if verdict == "park":
            until = self.clock.now + 30
            if self.state != "open":
                self.takeovers = 0
                self.change("open", until)
            self.until = max(self.until, until)
        elif era == self.era:
            self.judge(verdict, trial)

    def judge(self, verdict: str, trial: bool) -> None:
        if verdict == "success":
            self.failures = 0
            if trial:
                self.takeovers = 0
                self.change("closed")
        elif verdict == "failure":
            self.failures += 1
            if trial or self.failures >= THRESHOLD:
                self.takeovers = 0
                self.change("open", self.clock.now + RECOVERY)
        elif trial:
            self.change("open", self.clock.now)

    @rule(seconds=st.sampled_from([0.5, 5.0, 15.0, 41.0, 400.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(seconds=st.sampled_from([None, 0.0, 20.0]))
    def open(self, seconds: float | None) -> None:
        self.breaker.open(seconds)
        self.takeovers = 0
        self.change("open", math.inf if seconds is None else self.clock.now + seconds)

    @rule()
    def reset(self) -> None:
        self.breaker.reset()
        self.takeovers = 0
        self.change("closed")

    @invariant()
    def same(self) -> None:
        assert self.breaker.state == self.state
        snapshot = self.breaker.snapshot()
        assert snapshot == self.breaker.snapshot()
        assert snapshot.state == self.state
        self.generation_is_right(snapshot.generation)
        if self.state == "closed":
            assert snapshot.failures == self.failures
            assert snapshot.retry_after is None
        elif self.until == math.inf:
            assert snapshot.retry_after is None
        else:
            left = max(0.0, self.until - self.clock.now)
            assert snapshot.retry_after == (min(left, 1.0) if self.state == "half_open" else left)

    def generation_is_right(self, generation: int) -> None:
        assert generation == self.era


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
