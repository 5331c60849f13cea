"""The breaker, scenario by scenario; the numbers are those of the scenario list that the breaker was designed against."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
from clocks import FakeClock

from copilot_router import (
    AuthenticationError,
    BadRequest,
    CircuitBreaker,
    CircuitOpen,
    ConfigError,
    ContextLengthExceeded,
    EmptyResponse,
    QuotaExceeded,
    RateLimited,
    ServerError,
    StreamInterrupted,
    _after_fork,
)


class Boom(Exception):
    """The guarded call's own failure."""


def boom() -> None:
    raise Boom("own error")


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(Boom):
            breaker.call(boom)


def made(clock: FakeClock, **settings: object) -> CircuitBreaker:
    return CircuitBreaker(clock=clock, **settings)  # type: ignore[arg-type]


def tripped(clock: FakeClock, **settings: object) -> CircuitBreaker:
    breaker = made(clock, **settings)
    fail(breaker, breaker.failure_threshold)
    assert breaker.is_open
    return breaker


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


# -- A: closed, counting


def test_02_the_threshold_opens_and_the_caller_sees_its_own_error(clock: FakeClock) -> None:
    """1, 2, 5: below the threshold closed; the tripping call raises its own exception object."""
    breaker = made(clock)
    fail(breaker, 2)
    assert breaker.is_closed
    error = Boom("this very object")

    def raise_it() -> None:
        raise error

    with pytest.raises(Boom) as caught:
        breaker.call(raise_it)
    assert caught.value is error
    assert breaker.is_open
    assert not breaker.is_closed


def test_03_a_success_resets_the_count(clock: FakeClock) -> None:
    """F F S F F stays closed, one more opens."""
    breaker = made(clock)
    fail(breaker, 2)
    assert breaker.call(lambda: "fine") == "fine"
    fail(breaker, 2)
    assert breaker.is_closed
    fail(breaker)
    assert breaker.is_open


def test_04_neutral_neither_counts_nor_resets(clock: FakeClock) -> None:
    """F F neutral F opens."""
    breaker = made(clock)
    fail(breaker, 2)
    breaker.admit().neutral()
    assert breaker.snapshot().failures == 2
    fail(breaker)
    assert breaker.is_open


def test_06_a_result_may_be_classified_by_ticket(clock: FakeClock) -> None:
    """Without an exception: the ticket's failure counts."""
    breaker = made(clock, failure_threshold=1)
    breaker.admit().failure("wrong answer")
    assert breaker.snapshot().reason == "wrong answer"


@pytest.mark.parametrize("value", [0, -1, math.nan, True, "3", 2.5, None])
def test_08_a_bad_threshold_is_refused(value: object) -> None:
    """The message names the setting and the value."""
    with pytest.raises(ConfigError, match="failure_threshold="):
        CircuitBreaker(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["recovery_timeout", "trial_timeout", "max_recovery_timeout"])
@pytest.mark.parametrize("value", [-1, math.nan, True, "3"])
def test_08_bad_times_are_refused(name: str, value: object) -> None:
    """Negative, NaN, booleans and text; a ConfigError is a ValueError."""
    with pytest.raises(ValueError, match=name):
        CircuitBreaker(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        CircuitBreaker(recovery_timeout=math.inf)


def test_08_zero_means_zero(clock: FakeClock) -> None:
    """recovery_timeout=0: the next call is the trial, no default takes its place."""
    breaker = tripped(clock, recovery_timeout=0)
    assert breaker.call(lambda: 1) == 1
    assert breaker.is_closed


def test_10_one_trip_however_many_fail_at_once(clock: FakeClock) -> None:
    """Thirty-two tickets fail; one opening, one event; the rest are stale."""
    changes: list[tuple[str, ...]] = []
    breaker = made(clock, on_change=lambda *change: changes.append(change), name="x")
    for ticket in [breaker.admit() for _ in range(32)]:
        ticket.failure("down")
    assert changes == [("x", "closed", "open", "down")]
    assert (breaker.snapshot().opened, breaker.snapshot().stale) == (1, 29)


# -- B: open, time


def test_12_an_open_breaker_refuses_with_the_time_left(clock: FakeClock) -> None:
    """The function is not called; retry_after counts down and is never negative."""
    breaker = tripped(clock, name="db")
    called: list[int] = []
    clock.advance(5)
    with pytest.raises(CircuitOpen, match="db is open") as refused:
        breaker.call(called.append, 1)
    assert refused.value.retry_after == pytest.approx(10)
    assert not called
    clock.advance(100)
    assert breaker.retry_after == 0


@pytest.mark.parametrize("timeout", [15.0, 0.25, 1e9])
def test_13_the_trial_is_due_exactly_at_the_deadline(timeout: float) -> None:
    """13, 16, 17: not a moment before, no rounding, no overflow."""
    clock = FakeClock(0.0)
    breaker = tripped(clock, recovery_timeout=timeout)
    clock.now = math.nextafter(timeout, 0)
    with pytest.raises(CircuitOpen):
        breaker.admit()
    clock.now = timeout
    breaker.admit().success()
    assert breaker.is_closed


def test_15_reading_changes_nothing(clock: FakeClock) -> None:
    """State, snapshot and repr after the timeout: still open, and the trial is still there to be had."""
    breaker = tripped(clock)
    clock.advance(100)
    before = breaker.snapshot()
    for _ in range(10):
        assert (breaker.state, breaker.is_open, breaker.is_half_open) == ("open", True, False)
        assert "open" in repr(breaker)
    assert breaker.snapshot() == before
    assert breaker.call(lambda: 1) == 1


def test_18_refusals_are_new_objects_of_constant_size(clock: FakeClock) -> None:
    """No shared instance whose traceback grows."""
    breaker = tripped(clock)
    seen = set()
    for _ in range(1000):
        try:
            breaker.admit()
        except CircuitOpen as error:
            depth, trace = 0, error.__traceback__
            while trace is not None:
                depth, trace = depth + 1, trace.tb_next
            seen.add(depth)
    assert seen == {2}
    assert breaker.snapshot().rejected == 1000


# -- C: half-open


def test_21_a_good_trial_closes_with_zero_counters(clock: FakeClock) -> None:
    """Closed, no failures, no deadline."""
    breaker = tripped(clock)
    clock.advance(15)
    ticket = breaker.admit()
    assert (ticket.is_trial, breaker.state, breaker.is_half_open) == (True, "half_open", True)
    ticket.success()
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.failures, snapshot.retry_after) == ("closed", 0, None)


def test_22_a_failed_trial_opens_from_the_moment_of_its_failure(clock: FakeClock) -> None:
    """22, 23: a fresh full window each time, one call per window."""
    breaker = tripped(clock)
    for _ in range(3):
        clock.advance(15)
        ticket = breaker.admit()
        clock.advance(4)
        ticket.failure()
        assert breaker.retry_after == pytest.approx(15)
        with pytest.raises(CircuitOpen):
            breaker.admit()


def test_24_a_refusal_during_a_trial_hints_at_a_second(clock: FakeClock) -> None:
    """The rest of the lease, or one second if that is longer."""
    breaker = tripped(clock, trial_timeout=2)
    clock.advance(15)
    breaker.admit()
    with pytest.raises(CircuitOpen, match="trying again") as refused:
        breaker.admit()
    assert refused.value.retry_after == 1.0
    clock.advance(1.5)
    assert breaker.retry_after == pytest.approx(0.5)


def test_25_a_hung_trial_is_taken_over_after_its_lease(clock: FakeClock) -> None:
    """25, 26: exactly one takes over; the late verdict is dropped and counted as stale."""
    breaker = tripped(clock)
    clock.advance(15)
    hung = breaker.admit()
    clock.advance(119.9)
    with pytest.raises(CircuitOpen):
        breaker.admit()
    clock.advance(0.2)
    successor = breaker.admit()
    with pytest.raises(CircuitOpen):
        breaker.admit()
    hung.success()
    assert breaker.is_half_open
    assert breaker.snapshot().stale == 1
    successor.success()
    assert breaker.is_closed


def test_27_a_late_trial_counts_until_somebody_takes_over(clock: FakeClock) -> None:
    """A slow provider still closes its breaker."""
    breaker = tripped(clock)
    clock.advance(15)
    slow = breaker.admit()
    clock.advance(500)
    slow.success()
    assert breaker.is_closed


def test_28_leases_grow_so_that_a_slow_provider_gets_through(clock: FakeClock) -> None:
    """Each takeover doubles the next lease, up to eight times."""
    breaker = tripped(clock, trial_timeout=10)
    clock.advance(15)
    breaker.admit()
    leases = []
    for _ in range(6):
        start = clock.now
        while True:
            clock.advance(1)
            try:
                breaker.admit()
                break
            except CircuitOpen:
                continue
        leases.append(clock.now - start)
    assert leases == [10, 10, 20, 40, 80, 80]


def test_29_a_neutral_trial_is_handed_on(clock: FakeClock) -> None:
    """29, 30: the next caller is the trial at once, a thousand times over, one at a time."""
    breaker = tripped(clock)
    clock.advance(15)
    for _ in range(1000):
        ticket = breaker.admit()
        with pytest.raises(CircuitOpen):
            breaker.admit()
        ticket.neutral()
    assert (breaker.state, breaker.retry_after, breaker.snapshot().opened) == ("open", 0, 1)


# -- D: late results


@pytest.mark.parametrize("verdict", ["success", "failure"])
def test_34_a_result_of_an_older_era_changes_nothing(clock: FakeClock, verdict: str) -> None:
    """34, 35, 36, 37: admitted closed; settles while open, during the trial, and after recovery."""
    breaker = made(clock)
    while_open, in_trial, after = breaker.admit(), breaker.admit(), breaker.admit()
    fail(breaker, 3)
    deadline = breaker.retry_after
    getattr(while_open, verdict)()
    assert (breaker.state, breaker.retry_after) == ("open", deadline)
    clock.advance(15)
    trial = breaker.admit()
    getattr(in_trial, verdict)()
    assert breaker.is_half_open
    trial.success()
    getattr(after, verdict)()
    assert (breaker.state, breaker.snapshot().failures) == ("closed", 0)


def test_38_a_reset_outruns_the_trial(clock: FakeClock) -> None:
    """38, 82: reset while a trial is in flight; its failure is ignored."""
    breaker = tripped(clock)
    clock.advance(15)
    trial = breaker.admit()
    breaker.reset()
    trial.failure()
    assert (breaker.state, breaker.snapshot().failures) == ("closed", 0)


def test_39_the_first_verdict_counts(clock: FakeClock) -> None:
    """Settled twice, in either order, and by leaving the block."""
    breaker = made(clock, failure_threshold=1)
    ticket = breaker.admit()
    ticket.success()
    ticket.failure()
    assert breaker.is_closed
    with breaker.admit() as ticket:
        ticket.failure()
    assert breaker.is_open


# -- E: exceptions


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException, MemoryError, AssertionError])
def test_41_an_interruption_is_itself_and_neutral(clock: FakeClock, kind: type[BaseException]) -> None:
    """41, 42, 43, 52: propagates, is not counted, keeps the streak; in a trial the slot is handed on."""

    def interrupt() -> None:
        raise kind

    breaker = made(clock)
    fail(breaker, 2)
    with pytest.raises(kind):
        breaker.call(interrupt)
    assert breaker.snapshot().failures == 2
    fail(breaker)
    clock.advance(15)
    with pytest.raises(kind):
        breaker.call(interrupt)
    assert breaker.is_open
    assert breaker.call(lambda: 1) == 1


SIGINT = """
import os, signal, sys
from copilot_router import CircuitBreaker
now = [0.0]
breaker = CircuitBreaker(1, clock=lambda: now[0])
breaker.admit().failure()
now[0] = 15
try:
    breaker.call(lambda: (os.kill(os.getpid(), signal.SIGINT), [None for _ in range(10**7)]))
except KeyboardInterrupt:
    breaker.admit()
    sys.exit(130)
"""


def test_44_a_real_interrupt_during_a_trial_reaches_the_top() -> None:
    """SIGINT: KeyboardInterrupt, exit status 130, and the trial was handed on."""
    assert subprocess.run([sys.executable, "-c", SIGINT], env=with_module(), timeout=60).returncode == 130


def with_module() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))}


@pytest.mark.parametrize("entry", ["call", "decorator", "with"])
@pytest.mark.parametrize(
    ("error", "state", "seconds"),
    [
        (ServerError("x"), "open", 15.0),
        (ValueError("x"), "open", 15.0),
        (BadRequest("x"), "closed", None),
        (ContextLengthExceeded("x"), "closed", None),
        (EmptyResponse("x", code="length"), "closed", None),
        (EmptyResponse("x"), "open", 15.0),
        (RateLimited("x"), "open", 15.0),
        (RateLimited("x", retry_after=40), "open", 40.0),
        (RateLimited("x", retry_after=1e6), "open", 3600.0),
        (QuotaExceeded("x"), "open", 600.0),
        (AuthenticationError("x", retry_after=700), "open", 700.0),
        (AssertionError("x"), "closed", None),
        (ConfigError("x"), "closed", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_55_every_entry_gives_the_verdict_of_the_class(
    clock: FakeClock, entry: str, error: Exception, state: str, seconds: float | None
) -> None:
    """46, 53, 55, 75: the error's class says failure, neutral or park; the object itself propagates."""
    breaker = made(clock, failure_threshold=1)

    def raise_it() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        if entry == "call":
            breaker.call(raise_it)
        elif entry == "decorator":
            breaker(raise_it)()
        else:
            with breaker.admit():
                raise_it()
    assert caught.value is error
    assert (breaker.state, breaker.retry_after) == (state, seconds)


def test_55_an_interrupted_stream_is_judged_by_its_cause(clock: FakeClock) -> None:
    """StreamInterrupted carries the class of what broke it."""
    breaker = made(clock, failure_threshold=1)
    error = StreamInterrupted("broke")
    error.__cause__ = BadRequest("x")
    breaker.admit()._settle_by(error)
    assert breaker.is_closed
    error.__cause__ = ServerError("x")
    breaker.admit()._settle_by(error)
    assert breaker.is_open


def test_48_exceptions_with_hostile_methods_are_harmless(clock: FakeClock) -> None:
    """__str__, __eq__ and __bool__ that raise."""

    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError

        __bool__ = __eq__ = __hash__ = __str__  # type: ignore[assignment]

    def raise_it() -> None:
        raise Hostile

    breaker = made(clock, failure_threshold=1)
    with pytest.raises(Hostile):
        breaker.call(raise_it)
    assert breaker.snapshot().reason == "Hostile"


def test_49_nothing_of_a_failed_call_is_kept_alive(clock: FakeClock) -> None:
    """The breaker keeps a text, not the exception with its frames."""

    class Prompt:
        pass

    seen: list[weakref.ref[Prompt]] = []

    def work() -> None:
        prompt = Prompt()
        seen.append(weakref.ref(prompt))
        raise Boom

    breaker = made(clock)
    try:
        breaker.call(work)
    except Boom:
        pass
    gc.collect()
    assert seen[0]() is None


# -- F: decorator, context manager, streams


def test_53_the_decorator_keeps_name_arguments_and_methods(clock: FakeClock) -> None:
    """Functions and methods, positional and keyword arguments."""
    breaker = made(clock)

    class Thing:
        @breaker
        def method(self, a: int, *, b: int = 2) -> int:
            """Doc."""
            return a + b

    assert (Thing().method(1, b=5), Thing.method.__name__, Thing.method.__doc__) == (6, "method", "Doc.")


def test_54_the_block_is_not_entered_while_open(clock: FakeClock) -> None:
    """admit() raises before the body runs."""
    breaker = tripped(clock)
    entered = False
    with pytest.raises(CircuitOpen), breaker.admit():
        entered = True
    assert not entered


def stream(count: int, error: BaseException | None = None) -> Generator[int, object, str]:
    for item in range(count):
        try:
            yield item
        except Boom:
            yield -1
    if error is not None:
        raise error
    return "result"


def test_56_a_guarded_stream_is_admitted_at_its_first_next(clock: FakeClock) -> None:
    """56, 57, 58, 61: never started holds nothing; a break counts once; early closing is a success."""
    breaker = made(clock, failure_threshold=2)
    guarded = breaker(stream)
    guarded(3)
    assert list(guarded(3)) == [0, 1, 2]
    with pytest.raises(ServerError):
        list(guarded(3, ServerError("cut")))
    assert breaker.snapshot().failures == 1
    for _ in range(100):
        early = guarded(3)
        next(early)
        early.close()
    assert breaker.snapshot().failures == 0
    thrown = guarded(1)
    next(thrown)
    assert thrown.throw(Boom()) == -1
    with pytest.raises(StopIteration) as end:
        thrown.send(None)
    assert end.value.value == "result"


def test_59_a_stream_settles_its_trial_at_the_first_item(clock: FakeClock) -> None:
    """Others run while it still streams; a later error is one ordinary failure."""
    breaker = tripped(clock)
    clock.advance(15)
    trial = breaker(stream)(2, ServerError("cut"))
    next(trial)
    assert breaker.is_closed
    assert breaker.call(lambda: 1) == 1
    with pytest.raises(ServerError):
        list(trial)
    assert (breaker.state, breaker.snapshot().failures) == ("closed", 1)


def test_60_a_trial_that_is_garbage_collected_is_handed_on(clock: FakeClock) -> None:
    """Dropped without close before its first item came."""
    breaker = tripped(clock)
    clock.advance(15)

    def inner() -> Generator[int, None, None]:
        raise GeneratorExit
        yield 1

    with pytest.raises(GeneratorExit):
        next(breaker(inner)())
    assert (breaker.state, breaker.retry_after) == ("open", 0)


# -- G: listeners


def test_63_a_listener_that_raises_is_logged_and_harmless(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """The transition is complete and the caller's result unchanged."""

    def listener(*_: str) -> None:
        raise RuntimeError("listener")

    breaker = made(clock, on_change=listener)
    fail(breaker, 3)
    assert breaker.is_open
    assert "a listener failed" in caplog.text


def test_64_a_listener_may_use_the_breaker(clock: FakeClock) -> None:
    """64, 67: no deadlock, and the stream of changes is a chain."""
    changes: list[tuple[str, str]] = []

    def listener(name: str, old: str, new: str, reason: str) -> None:
        changes.append((old, new))
        if new == "open":
            breaker.reset()

    breaker = made(clock, on_change=listener)
    fail(breaker, 3)
    assert changes == [("closed", "open"), ("open", "closed")]


def test_68_a_trial_may_not_nest(clock: FakeClock) -> None:
    """The inner call is refused, the outer outcome decides."""
    breaker = tripped(clock)
    clock.advance(15)

    def outer() -> str:
        with pytest.raises(CircuitOpen):
            breaker.call(lambda: 1)
        return "outer"

    assert breaker.call(outer) == "outer"
    assert breaker.is_closed


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
def test_70_a_signal_handler_may_read_the_breaker() -> None:
    """snapshot() takes no lock: not even a lock held by the interrupted thread can block it."""
    breaker = CircuitBreaker()
    seen = []
    with breaker._lock:
        reader = threading.Thread(target=lambda: seen.append(breaker.snapshot().state))
        reader.start()
        reader.join(5)
    assert seen == ["closed"]


# -- H: backoff, Retry-After


def test_72_the_open_time_doubles_up_to_its_maximum(clock: FakeClock) -> None:
    """72, 73, 78: failed trials double; a park does not; a success starts over."""
    breaker = tripped(clock, recovery_timeout=1, max_recovery_timeout=5)
    times = [breaker.retry_after]
    for _ in range(3):
        clock.advance(breaker.retry_after or 0)
        breaker.admit().failure()
        times.append(breaker.retry_after)
    assert times == [1, 2, 4, 5]
    clock.advance(5)
    breaker.admit().success()
    breaker.admit().park(3)
    assert breaker.retry_after == 3
    clock.advance(3)
    breaker.admit().failure()
    assert breaker.retry_after == 1


def test_77_a_park_only_moves_the_deadline_later(clock: FakeClock) -> None:
    """Also one of an older ticket; and a park by a trial opens again."""
    breaker = made(clock)
    first, second, third = breaker.admit(), breaker.admit(), breaker.admit()
    first.park(10, "asked to wait")
    second.park(60)
    third.park(5)
    assert breaker.retry_after == 60
    clock.advance(60)
    breaker.admit().park()
    assert breaker.retry_after == 15
    with pytest.raises(ConfigError):
        breaker.admit() if breaker.is_closed else third.park(-1)


# -- I: by hand


def test_80_open_by_hand_holds_until_reset(clock: FakeClock) -> None:
    """None: until reset, whatever the time; seconds: that long, also if shorter than before."""
    breaker = made(clock, name="x")
    breaker.open(reason="maintenance")
    clock.advance(1e9)
    assert breaker.retry_after is None
    with pytest.raises(CircuitOpen, match="until reset") as refused:
        breaker.admit()
    assert refused.value.retry_after is None
    breaker.open(30)
    breaker.open(10)
    assert breaker.retry_after == 10
    breaker.reset()
    assert breaker.is_closed
    with pytest.raises(ConfigError):
        breaker.open(-1)


def test_86_a_snapshot_is_plain_data(clock: FakeClock) -> None:
    """JSON-able and picklable."""
    snapshot = tripped(clock).snapshot()
    assert json.loads(json.dumps(snapshot._asdict()))["state"] == "open"
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_87_copying_is_refused(copier: object) -> None:
    """A copy would be a second truth."""
    with pytest.raises(TypeError, match="cannot be copied"):
        copier(CircuitBreaker())  # type: ignore[operator]


# -- threads


def together(count: int, work: object) -> float:
    barrier = threading.Barrier(count + 1)

    def run(at: int) -> None:
        barrier.wait(10)
        work(at)  # type: ignore[operator]

    threads = [threading.Thread(target=run, args=(at,)) for at in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait(10)
    start = time.monotonic()
    for thread in threads:
        thread.join(60)
    return time.monotonic() - start


def test_09_no_failure_is_lost_between_threads() -> None:
    """16 threads x 2,000 failures with the shortest switch interval."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    breaker = CircuitBreaker(10**6)
    try:
        together(16, lambda at: [breaker.admit().failure() for _ in range(2000)])
    finally:
        sys.setswitchinterval(interval)
    assert breaker.snapshot().failures == 32_000


def test_20_one_trial_among_32_threads() -> None:
    """31 are refused within 50 ms while the trial is still inside."""
    clock = FakeClock()
    breaker = tripped(clock)
    clock.advance(15)
    inside, leave = threading.Event(), threading.Event()
    entered: list[int] = []
    refused: list[float] = []

    def guarded() -> None:
        entered.append(1)
        inside.set()
        leave.wait(10)

    def work(at: int) -> None:
        start = time.monotonic()
        try:
            breaker.call(guarded)
        except CircuitOpen:
            refused.append(time.monotonic() - start)
            if len(refused) == 31:
                leave.set()

    together(32, work)
    assert inside.is_set()
    assert (len(entered), len(refused), breaker.snapshot().rejected) == (1, 31, 31)
    assert max(refused) < 0.05
    assert breaker.is_closed


def test_69_guarded_calls_run_side_by_side() -> None:
    """16 threads x 20 calls of 10 ms take less than 1.5 times the ideal 0.2 s."""
    breaker = CircuitBreaker()
    took = together(16, lambda at: [breaker.call(time.sleep, 0.01) for _ in range(20)])
    assert took < 0.2 * 1.5


def test_65_a_slow_listener_holds_nobody_up() -> None:
    """65, 66, 67: other threads go on; what they changed is delivered later, in order."""
    entered, leave = threading.Event(), threading.Event()
    changes: list[tuple[str, str]] = []

    def listener(name: str, old: str, new: str, reason: str) -> None:
        changes.append((old, new))
        entered.set()
        leave.wait(10)

    breaker = CircuitBreaker(on_change=listener)
    slow = threading.Thread(target=breaker.open)
    slow.start()
    entered.wait(10)
    start = time.monotonic()
    for _ in range(10):
        breaker.reset()
        breaker.open()
    assert time.monotonic() - start < 1
    leave.set()
    slow.join(10)
    assert changes[0] == ("closed", "open")
    assert all(new == old for (_, new), (old, _) in itertools.pairwise(changes))
    assert len(changes) == 21


FORK = """
import os, sys, threading
from copilot_router import CircuitBreaker
now = [0.0]
breaker = CircuitBreaker(1, clock=lambda: now[0])
where = sys.argv[1]
hold, held = threading.Event(), threading.Event()
def keep():
    with breaker._lock:
        held.set(); hold.wait(20)
if where == "trial":
    breaker.admit().failure(); now[0] = 15; mine = breaker.admit()
else:
    thread = threading.Thread(target=keep); thread.start(); held.wait(20)
child = os.fork()
if child == 0:
    now[0] += 1
    os._exit(0 if breaker.call(lambda: 7) == 7 and breaker.is_closed else 1)
_, status = os.waitpid(child, 0)
hold.set()
if where == "trial":
    mine.success()
    assert breaker.is_closed
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("where", ["lock", "trial"])
def test_88_a_forked_child_goes_on(where: str) -> None:
    """88, 89, 90: forked while another thread holds the lock, or during a trial."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, where], env=with_module(), timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_91_dropped_breakers_are_not_kept() -> None:
    """The registry for forks holds no strong references."""
    refs = [weakref.ref(CircuitBreaker()) for _ in range(1000)]
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_the_child_side_of_a_fork() -> None:
    """In this process: a trial under way becomes one that is due, and the lock is a new one."""
    clock = FakeClock()
    breaker = tripped(clock)
    clock.advance(15)
    breaker.admit()
    old = breaker._lock
    _after_fork()
    assert (breaker.state, breaker.retry_after) == ("open", 0)
    assert breaker._lock is not old


def test_a_race_for_the_trial_is_decided_under_the_lock(clock: FakeClock) -> None:
    """Whoever comes second finds it closed again, or the lease taken."""
    breaker = tripped(clock)
    clock.advance(15)
    assert breaker._begin_trial(clock.now) is not None
    assert breaker._begin_trial(clock.now) is None
    assert breaker.snapshot().rejected == 1
    breaker.reset()
    late = breaker._begin_trial(clock.now)
    assert late is not None
    assert not late.is_trial


def test_a_change_that_is_overtaken_starts_again(clock: FakeClock) -> None:
    """As when a finalizer settles a ticket in the middle of another change: neither is lost."""
    breaker = made(clock)
    seen: list[int] = []

    def step(old: object) -> object:
        seen.append(breaker._record.generation)
        if len(seen) == 1:
            breaker.reset()
        return breaker._record._replace(failures=2)

    breaker._swap(step)  # type: ignore[arg-type]
    assert seen == [0, 1]
    assert breaker.snapshot()[:3] == ("closed", 1, 2)


def test_a_stream_whose_trial_was_taken_over(clock: FakeClock) -> None:
    """Its first item comes too late to close anything."""
    breaker = tripped(clock, trial_timeout=1)
    clock.advance(15)

    def slow() -> Generator[int, None, None]:
        clock.advance(2)
        breaker.admit()
        yield 1

    assert list(breaker(slow)()) == [1]
    assert breaker.is_half_open


# -- the rest of the list


def test_11_breakers_of_one_name_are_independent(clock: FakeClock) -> None:
    """Without a store there is no registry by name."""
    first, second = tripped(clock, name="openai"), made(clock, name="openai")
    assert (first.is_open, second.is_closed) == (True, True)


def test_14_the_wall_clock_may_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour back or forth: the time left is measured by the monotonic clock."""
    breaker = CircuitBreaker(1)
    breaker.admit().failure()
    for jump in (-3600.0, 3600.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        assert 14 < (breaker.retry_after or 0) <= 15


def test_19_nothing_runs_while_nobody_calls(clock: FakeClock) -> None:
    """No timer thread; hours later the first caller is the trial."""
    before = threading.active_count()
    breaker = tripped(clock)
    assert threading.active_count() == before
    clock.advance(36_000)
    assert breaker.admit().is_trial


def test_31_a_trial_ended_from_outside_is_handed_on(clock: FakeClock) -> None:
    """SystemExit raised in its thread by another one."""
    breaker = tripped(clock)
    clock.advance(15)
    inside, out = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        while not out.wait(0.005):
            pass

    def trial() -> None:
        with contextlib.suppress(SystemExit):
            breaker.call(wait)

    thread = threading.Thread(target=trial)
    thread.start()
    inside.wait(10)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    thread.join(10)
    out.set()
    assert (breaker.state, breaker.retry_after) == ("open", 0)
    assert breaker.admit().is_trial


def test_33_a_ticket_that_is_not_used_is_given_back(clock: FakeClock) -> None:
    """The caller thinks better of it: the next one may try at once."""
    breaker = tripped(clock)
    clock.advance(15)
    breaker.admit().neutral()
    assert breaker.admit().is_trial


def test_47_the_nearest_class_decides(clock: FakeClock) -> None:
    """A subclass with a policy of its own is judged by that, one without by its parent's."""

    class Harmless(ServerError):
        breaker = "neutral"

    class Unlucky(ServerError):
        pass

    for kind, state in ((Harmless, "closed"), (Unlucky, "open")):
        breaker = made(clock, failure_threshold=1)
        with pytest.raises(kind), breaker.admit():
            raise kind("x")
        assert breaker.state == state


def test_50_an_exception_keeps_its_traceback_and_its_cause(clock: FakeClock) -> None:
    """The identical object; nothing is added but the frames that it passes."""
    cause = KeyError("cause")

    def work() -> None:
        raise Boom("own") from cause

    with pytest.raises(Boom) as caught:
        made(clock, failure_threshold=1).call(work)
    assert caught.value.__cause__ is cause
    assert [frame.name for frame in caught.traceback][-1] == "work"
    assert caught.value.__context__ is None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with 3.11")
def test_51_a_group_with_an_interruption_propagates(clock: FakeClock) -> None:
    """It is no Exception, so it is neutral; a group of plain failures counts once."""
    breaker = made(clock, failure_threshold=2)
    with pytest.raises(BaseExceptionGroup), breaker.admit():  # noqa: F821
        raise BaseExceptionGroup("both", [Boom(), KeyboardInterrupt()])  # noqa: F821
    assert breaker.snapshot().failures == 0
    with pytest.raises(ExceptionGroup), breaker.admit():  # noqa: F821
        raise ExceptionGroup("two", [Boom(), Boom()])  # noqa: F821
    assert breaker.snapshot().failures == 1


def test_62_the_outcome_is_what_the_body_let_out(clock: FakeClock) -> None:
    """An error suppressed inside the block is none; one suppressed around it was one."""
    breaker = made(clock, failure_threshold=1)
    with breaker.admit(), contextlib.suppress(Boom):
        boom()
    assert breaker.is_closed
    with contextlib.suppress(Boom), breaker.admit():
        boom()
    assert breaker.is_open


def test_84_an_operator_does_not_wait_for_a_call() -> None:
    """reset() and open() return at once while a guarded call hangs."""
    breaker = CircuitBreaker()
    inside, leave = threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        leave.wait(10)

    thread = threading.Thread(target=breaker.call, args=(hang,))
    thread.start()
    inside.wait(10)
    start = time.monotonic()
    breaker.open()
    breaker.reset()
    assert time.monotonic() - start < 1
    leave.set()
    thread.join(10)
    assert breaker.is_closed


def test_85_a_snapshot_is_never_torn() -> None:
    """Sixteen threads write while one reads: never closed with a deadline, never open without one."""
    breaker = CircuitBreaker(1, 60)
    done = threading.Event()
    odd: list[object] = []

    def read() -> None:
        while not done.is_set():
            seen = breaker.snapshot()
            if (seen.state == "closed") != (seen.retry_after is None):
                odd.append(seen)

    reader = threading.Thread(target=read)
    reader.start()
    together(16, lambda at: [breaker.open(60) if at % 2 else breaker.reset() for _ in range(200)])
    done.set()
    reader.join(10)
    assert odd == []


SPAWN = """
import multiprocessing, threading
import copilot_router
def child(queue):
    queue.put((threading.active_count(), copilot_router.CircuitBreaker().call(lambda: 7)))
if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        assert queue.get() == (1, 7), method
        process.join(30)
"""

GEVENT = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent
from copilot_router import CircuitBreaker, CircuitOpen
now = [0.0]
breaker = CircuitBreaker(1, clock=lambda: now[0])
breaker.admit().failure()
now[0] = 15.0
entered, refused = [], []
def work(at):
    try:
        breaker.call(lambda: (entered.append(at), gevent.sleep(0.05)))
    except CircuitOpen:
        refused.append(at)
gevent.joinall([gevent.spawn(work, at) for at in range(200)])
assert (len(entered), len(refused)) == (1, 199), (len(entered), len(refused))
"""

EXIT = """
import threading
from copilot_router import CircuitBreaker
now = [0.0]
breaker = CircuitBreaker(1, clock=lambda: now[0])
breaker.admit().failure()
now[0] = 15.0
inside = threading.Event()
def hang():
    inside.set()
    threading.Event().wait()
threading.Thread(target=breaker.call, args=(hang,), daemon=True).start()
inside.wait(10)
"""


@pytest.mark.parametrize(("number", "program"), [(93, SPAWN), (94, GEVENT), (95, EXIT)])
def test_93_other_ways_to_run(tmp_path: Path, number: int, program: str) -> None:
    """93: spawned processes; 94: 200 greenlets at half-open, one trial; 95: exit with a trial in flight in a daemon thread."""
    if number == 94:
        pytest.importorskip("gevent")
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, str(file)], env=with_module(), timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_async_function_cannot_be_guarded() -> None:
    """It would be over before it has begun; the breaker says so when it decorates."""

    async def one() -> None:
        pass

    async def many() -> AsyncGenerator[int, None]:
        yield 1

    for function in (one, many):
        with pytest.raises(TypeError, match="blocking"):
            CircuitBreaker()(function)
