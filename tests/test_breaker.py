"""The circuit breaker: its states, tickets and trials, and what happens around a change."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any, ClassVar

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule,
    run_state_machine_as_test)
from support.fakes import Watched, in_threads
from support.stores import (KINDS, FakeClock, Interrupted, PlainStore, Stage, Wrapped, at_each_line,
    done, end, error_of, fail, in_a_thread, needs_fork, python, seconds_of)

from copilot_router import (AuthenticationError, BadRequest, CircuitBreaker, CircuitOpen,
    ConfigError, ContextLengthExceeded, EmptyResponse, FailoverChain, MemoryStore, ModelNotFound,
    ProviderError, ProviderTier, QuotaExceeded, RateLimited, ServerError, StreamInterrupted, Ticket)


class Boom(Exception):
    pass


def boom() -> None:
    raise Boom("own error")


@pytest.fixture(params=["alone", *KINDS])
def new(request, clock, make_store):
    """Makes breakers that keep their state alone or in a store: nobody may see a difference."""
    def make(threshold=3, recovery=15.0, **more):
        more = {"clock": clock, **more}
        if request.param != "alone":
            more.setdefault("name", "x")
            more["store"] = Wrapped(make_store(request.param), more["clock"])
        return CircuitBreaker(threshold, recovery, **more)
    return make


def tripped(breaker: CircuitBreaker) -> CircuitBreaker:
    fail(breaker, breaker.failure_threshold)
    assert breaker.is_open
    return breaker


def refused(breaker: CircuitBreaker) -> CircuitOpen:
    return error_of(CircuitOpen, breaker.admit)


# -- settings
@pytest.mark.parametrize(("name", "values"), [
    ("failure_threshold", [0, -1, math.nan, True, "3", 2.5, None]),
    ("recovery_timeout", [-1, math.nan, math.inf, True, "3"]),
    ("max_recovery_timeout", [-1, 1, math.nan, True, "3"]),
    ("trial_timeout", [0, 0.0, -1, math.nan, True, "3"]),
    ("jitter", [-0.1, math.nan, math.inf, True, "3", None]),
    ("name", [5, None]), ("clock", [None, 5.0]), ("on_change", ["print"])])
def test_a_setting_out_of_range_is_refused_by_its_name(name, values):
    for value in values:
        caught = error_of(ConfigError, CircuitBreaker, **{name: value}, match=f"^{name}=")
        assert isinstance(caught, ValueError)


# -- one breaker, step by step
#: What the words mean stands at ``Stage``.
STORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "it opens at the threshold": ("F F closed failures=2 F open opened=1", {}),
    "a success starts the count over": ("F F S failures=0 F F closed F open", {}),
    "a neutral verdict changes nothing": ("F F N failures=2 F open", {}),
    "only the first of many failures opens it": (
        "hold hold hold hold hold F F F open F F opened=1 stale=2", {}),
    "it refuses until its deadline": (
        "F F F left=15 10 refused left=5 4.9 refused 1 left=0 trial", {}),
    "reading changes nothing": ("F F F 100 open left=0 open left=0 trial half_open", {}),
    "a recovery timeout of zero means zero": ("F F F open trial S closed", {"recovery": 0.0}),
    "a good trial closes": (
        "F F F stale=0 15 trial half_open refused S closed failures=0 left=None F F closed", {}),
    "a failed trial opens from its end": (
        "F F F 15 trial 4 F open left=15 14 refused 1 trial 4 F left=15 refused", {}),
    "a refusal during a trial hints at a second": (
        "F F F 15 trial refused left=1 1.5 left=0.5", {"trial_timeout": 2.0}),
    "one caller takes over a hung trial": (
        "F F F 15 trial 119 refused 1 trial refused s half_open stale=1 S closed", {}),
    "a late trial counts until then": ("F F F 15 trial 500 half_open S closed", {}),
    "a neutral trial is handed on": (
        "F F F 15 trial N open left=0 trial refused N trial N trial refused S opened=1", {}),
    "older results change nothing while open": (
        "hold hold hold F 3 open s f open left=12 stale=2", {"threshold": 1}),
    "a success of an older era does not close": (
        "hold hold hold F F 15 trial s half_open stale=1 S closed", {"threshold": 2}),
    "an era never comes back": (
        "hold hold hold F 15 trial s half_open f half_open stale=2 S closed", {"threshold": 1}),
    "a failure of an older era does not count": (
        "hold hold hold F F 15 trial f half_open S closed failures=0", {"threshold": 2}),
    "a reset outruns the trial": ("F F F 15 trial reset F closed failures=0", {}),
    "a park moves the deadline only later": (
        "hold hold hold hold P=10 left=10 P=60 left=60 P=5 left=60 p=70 left=70", {}),
    "a park lasts for the recovery timeout": ("P left=15 15 trial P left=15", {}),
    "the open time doubles up to its maximum": (
        "F F F left=1 1 F left=2 2 F left=4 4 F left=5 5 F left=5 5 S P=3 left=3 3 F left=1",
        {"recovery": 1.0, "max_recovery_timeout": 5.0}),
    "leases grow so that a slow provider gets through, up to eight times": (
        "F F F 15 trial 9 refused 1 trial 9 refused 1 trial 19 refused 1 trial 39 refused 1 trial "
        "79 refused 1 trial 79 refused 1 trial S closed", {"trial_timeout": 10}),
    "by hand it opens until reset": (
        "open! left=None 1e9 refused open=30 left=30 open=10 left=10 reset closed", {})}


@pytest.mark.parametrize("story", STORIES)
def test_step_by_step(new, clock, story):
    words, settings = STORIES[story]
    Stage(clock, lambda who: new(**settings)).play(words)


def test_a_success_that_a_failure_overtook_resets_the_count(new):
    breaker = new()
    assert breaker.snapshot().reason == ""
    assert breaker.call(fail, breaker, 1) is None and breaker.snapshot().failures == 0


def test_refusals_are_new_objects_of_constant_size():
    breaker, seen = tripped(CircuitBreaker()), set()
    for _ in range(1000):
        trace, depth = refused(breaker).__traceback__, 0
        while trace is not None:
            trace, depth = trace.tb_next, depth + 1
        seen.add(depth)
    assert len(seen) == 1 and breaker.snapshot().rejected == 1000


def test_the_first_verdict_counts(new):
    breaker = new(1)
    ticket = breaker.admit()
    ticket.success()
    ticket.failure()
    assert breaker.is_closed
    with breaker.admit() as ticket:
        ticket.failure()
    assert breaker.is_open
    breaker.reset()
    assert breaker.snapshot().reason == "reset"
    with contextlib.suppress(Boom), breaker.admit() as ticket:
        ticket.success()
        boom()
    with breaker.admit(), contextlib.suppress(Boom):  # it is what the block lets out
        boom()
    assert breaker.is_closed


def test_of_two_verdicts_at_one_moment_the_first_counts():
    clock, meanwhile = FakeClock(), []
    breaker = CircuitBreaker(1, clock=lambda: (meanwhile and meanwhile.pop()(), clock())[1])
    ticket = breaker.admit()
    meanwhile.append(ticket.failure)
    ticket.park(60)
    assert breaker.retry_after == 15


def test_a_verdict_given_again_after_an_interrupt_counts_once():
    held: list[Ticket] = []
    def make():
        breaker = CircuitBreaker(store=PlainStore(), name="x")
        held.append(breaker.admit())
        return breaker
    def interrupt(_):
        raise Interrupted
    work = lambda _: held[-1].failure("down")  # noqa: E731
    for point, breaker in at_each_line(make, work, interrupt, event="call"):
        held[-1].failure("down")
        assert breaker.snapshot().failures == 1, point


def test_a_stream_whose_trial_is_overtaken_decides_nothing(clock):
    breaker = tripped(CircuitBreaker(1, clock=clock))
    clock.advance(15)
    tier = ProviderTier("x", Watched("fine", ServerError("no")), breaker=breaker)
    overtake = lambda event: event.kind == "attempt" and breaker.open()  # noqa: E731
    stream = FailoverChain([tier], on_event=overtake, clock=clock).stream("hi")
    assert next(stream) == "fine" and breaker.is_open
    error_of(StreamInterrupted, list, stream)
    assert breaker.is_open and breaker.retry_after is None


# -- verdicts
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException,
    MemoryError, RecursionError, AssertionError])
def test_an_interruption_is_itself_and_neutral(new, clock, kind):
    def interrupt():
        raise kind
    breaker = new()
    fail(breaker, 2)
    error_of(kind, breaker.call, interrupt)
    assert breaker.snapshot().failures == 2
    fail(breaker, 1)
    clock.advance(15)
    error_of(kind, breaker.call, interrupt)
    assert breaker.is_open and breaker.call(lambda: 1) == 1


def broken_stream(cause: Exception) -> StreamInterrupted:
    error = StreamInterrupted("broke")
    error.__cause__ = cause
    return error


VERDICTS: list[tuple[Exception, float | None]] = [
    (ServerError("x"), 15.0), (ValueError("x"), 15.0), (EmptyResponse("x"), 15.0),
    (StreamInterrupted("x"), 15.0), (broken_stream(ServerError("x")), 15.0),
    (BadRequest("x"), None), (ModelNotFound("x"), None), (ContextLengthExceeded("x"), None),
    (EmptyResponse("x", code="length"), None), (AssertionError("x"), None),
    (type("Harmless", (ServerError,), {"breaker": "neutral"})("x"), None), (ConfigError("x"), None),
    (broken_stream(BadRequest("x")), None), (RateLimited("x"), 15.0),
    (RateLimited("x", retry_after=0.5), 0.5), (RateLimited("x", retry_after=-1), 0.0),
    (RateLimited("x", retry_after=40), 40.0), (RateLimited("x", retry_after=1e6), 3600.0),
    (broken_stream(RateLimited("x", retry_after=40)), 40.0),
    (ServerError("x", retry_after=40), 15.0), (QuotaExceeded("x"), 60.0),
    (QuotaExceeded("x", retry_after=3), 60.0), (AuthenticationError("x"), 15.0),
    (AuthenticationError("x", retry_after=700), 700.0)]


@pytest.mark.parametrize("entry", ["call", "decorator", "with", "generator"])
@pytest.mark.parametrize(
    ("error", "seconds"), VERDICTS, ids=[type(error).__name__ for error, _ in VERDICTS])
def test_every_entry_gives_the_verdict_of_the_class(clock, entry, error, seconds):
    breaker = CircuitBreaker(1, clock=clock)
    def raise_it():
        raise error
    def generate():
        yield 1
        raise error
    def block():
        with breaker.admit():
            raise error
    ways = {"call": lambda: breaker.call(raise_it), "decorator": breaker(raise_it), "with": block,
            "generator": lambda: list(breaker(generate)())}
    assert error_of(type(error), ways[entry]) is error
    assert (breaker.is_closed, breaker.retry_after) == (seconds is None, seconds)


@pytest.mark.parametrize("kind", [AuthenticationError, "own class"])
def test_long_parks_grow_while_they_follow_each_other(new, clock, kind):
    """From the recovery timeout, four times as long each, 600 s at most; a success starts over."""
    if kind == "own class":
        kind = type("Banned", (ProviderError,), {"breaker": "park long"})
    breaker = new(recovery=20.0)
    def parks(count, kind=kind, **settings):
        times = []
        for _ in range(count):
            clock.advance(breaker.retry_after or 0)
            end(breaker.admit(), kind("x", **settings))
            times.append(breaker.retry_after)
        return times
    for _ in range(4):  # neither a rate limit nor a neutral verdict makes them longer
        assert parks(1, RateLimited) == [20] and parks(1, BadRequest) == [0]
    assert parks(5) == [20, 80, 320, 600, 600]
    clock.advance(600)
    breaker.admit().success()
    assert parks(2) == [20, 80] and parks(1, retry_after=1000) == [1000]
    assert parks(1, retry_after=1e6) == [3600]


def test_a_reason_may_be_an_exception(new):
    """Its class is told, and the message only of the router's own errors: others hold anything."""
    for reason, shown, hidden in [("down", "down", ""), (ServerError("on fire"), "on fire", ""),
        (ValueError("the prompt"), "ValueError", "the prompt"),
        (KeyboardInterrupt("the prompt"), "KeyboardInterrupt", "the prompt"),
        (Hostile(), "Hostile", "")]:
        breaker = new(1)
        breaker.reset()
        breaker.admit().failure(reason)
        snapshot = breaker.snapshot()
        assert breaker.is_open and shown in snapshot.reason
        assert not hidden or hidden not in snapshot.reason
        json.dumps(snapshot._asdict())


class Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError

    __bool__ = __eq__ = __hash__ = __str__


def test_nothing_of_a_failed_call_or_of_a_breaker_is_kept_alive():
    class Prompt:
        pass
    seen: list[weakref.ref[Any]] = [weakref.ref(CircuitBreaker()) for _ in range(1000)]
    def work():
        prompt = Prompt()
        seen.append(weakref.ref(prompt))
        raise Boom
    breaker = CircuitBreaker(1)
    for _ in range(2):
        with contextlib.suppress(Boom, CircuitOpen):
            breaker.call(work)
    gc.collect()
    assert [ref() for ref in seen] == [None] * 1001


def test_an_exception_keeps_its_traceback_and_its_cause():
    cause = KeyError("cause")
    def work():
        raise Boom("own") from cause
    with pytest.raises(Boom) as caught:
        CircuitBreaker(1).call(work)
    assert caught.value.__cause__ is cause
    assert [frame.name for frame in caught.traceback][-1] == "work"
    assert caught.value.__context__ is None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with 3.11")
def test_a_group_counts_once_and_not_if_it_holds_an_interruption():
    breaker = CircuitBreaker(2)
    interrupted = BaseExceptionGroup("both", [Boom(), KeyboardInterrupt()])  # noqa: F821
    end(breaker.admit(), interrupted)
    assert breaker.snapshot().failures == 0
    end(breaker.admit(), ExceptionGroup("two", [Boom(), Boom()]))  # noqa: F821
    assert breaker.snapshot().failures == 1


# -- the decorator
def test_the_decorator_keeps_name_arguments_and_methods_and_takes_no_async_function():
    class Thing:
        @CircuitBreaker()
        def method(self, a, *, b=2):
            """Doc."""
            return a + b
    assert Thing().method(1, b=5) == 6
    assert (Thing.method.__name__, Thing.method.__doc__) == ("method", "Doc.")
    async def one(): ...
    async def many():
        yield 1
    for function in (one, many):
        error_of(TypeError, CircuitBreaker(), function, match="blocking")


def stream(count: int, error: BaseException | None = None) -> Generator[Any, Any, str]:
    """Numbers; what is sent comes back, a Boom thrown in becomes -1."""
    for item in range(count):
        try:
            sent = yield item
            while sent is not None:
                sent = yield sent
        except Boom:
            yield -1
    if error is not None:
        raise error
    return "result"


def test_a_guarded_generator_behaves_like_the_generator(new):
    breaker = new(1)
    guarded = breaker(stream)
    never_started = guarded(3)
    assert list(guarded(3)) == [0, 1, 2]
    running = guarded(1)
    assert [next(running), running.send("a"), running.throw(Boom())] == [0, "a", -1]
    stopped = error_of(StopIteration, next, running)
    assert stopped.value == "result" and breaker.is_closed
    tripped(breaker)
    error_of(CircuitOpen, next, never_started)


def test_a_guarded_generator_settles_once_at_its_end(new, clock):
    breaker = new(2)
    error_of(ServerError, list, breaker(stream)(3, ServerError("cut")))
    assert breaker.snapshot().failures == 1
    for _ in range(10):
        early = breaker(stream)(3)
        next(early)
        early.close()  # says nothing about the other side
    assert breaker.snapshot().failures == 1
    list(breaker(stream)(3))
    assert breaker.snapshot().failures == 0


@pytest.mark.parametrize(("finish", "state"), [
    (list, "closed"), (lambda running: running.close(), "open"),
    (lambda running: running.throw(ServerError("x")), "open"),
    (lambda running: running.throw(BadRequest("x")), "open")])
def test_the_trial_of_a_guarded_generator_lasts_until_its_end(new, clock, finish, state):
    breaker = tripped(new())
    clock.advance(15)
    running = breaker(stream)(3)
    next(running)
    assert breaker.is_half_open and "trying again with one call" in str(refused(breaker))
    with contextlib.suppress(ProviderError):
        finish(running)
    assert breaker.state == state


# -- listeners
def test_a_listener_may_use_the_breaker_and_fail(new, caplog):
    changes: list[tuple[str, str]] = []
    def listener(name, old, new, reason):
        changes.append((old, new))
        if new == "open":
            breaker.reset()
            raise RuntimeError("listener")
    breaker = new(on_change=listener)
    fail(breaker, 3)
    assert changes == [("closed", "open"), ("open", "closed")]
    assert any(record.exc_info for record in caplog.records)


def test_a_slow_listener_holds_nobody_up():
    """Other threads go on; what they change is delivered later, in order."""
    entered, leave = threading.Event(), threading.Event()
    changes: list[tuple[str, str]] = []
    def listener(name, old, new, reason):
        changes.append((old, new))
        entered.set()
        leave.wait(10)
    breaker = CircuitBreaker(on_change=listener)
    (slow,) = in_threads(1, breaker.open)
    entered.wait(10)
    assert seconds_of(lambda: [(breaker.reset(), breaker.open()) for _ in range(10)]) < 1
    leave.set()
    slow.join(10)
    assert changes[0] == ("closed", "open")
    assert all(new == old for (_, new), (old, _) in itertools.pairwise(changes))
    assert len(changes) == 21


# -- open times: backoff, parks, jitter, by hand
def test_seconds_given_by_hand_are_checked():
    breaker = CircuitBreaker()
    for seconds in (-1, math.nan, "3", True):
        error_of(ConfigError, breaker.open, seconds)
        error_of(ConfigError, breaker.admit().park, seconds)
    assert breaker.is_closed


def test_the_reason_is_that_of_the_change(new):
    """It is told in the refusal, with the name; of two parks the later end keeps its own."""
    breaker = new(name="db")
    tickets = [breaker.admit() for _ in range(3)]
    for ticket, seconds, reason, told in zip(
            tickets, (10, 10, 60), ("one", "two", "three"), ("one", "one", "three"), strict=True):
        ticket.park(seconds, reason)
        assert breaker.snapshot().reason == told
        assert {told, "db"} <= set(re.findall(r"\w+", str(refused(breaker))))
    breaker.open(reason="maintenance")
    assert "maintenance" in str(refused(breaker))


def open_times(breaker: CircuitBreaker, clock: FakeClock, count: int) -> list[float]:
    times = []
    for _ in range(count):
        breaker.admit().failure()
        times.append(breaker.retry_after or 0)
        clock.advance(times[-1])
    return times


def test_with_jitter_the_open_time_is_drawn(new, clock):
    times = open_times(new(1, 16.0, jitter=0.25), clock, 200)
    assert 16 - 1e-6 <= min(times) < 16.5 and 19.5 < max(times) <= 20 + 1e-6
    assert len(set(times)) > 150


def test_jitter_is_on_top_of_backoff_and_never_shortens_a_wait(new, clock):
    breaker = new(1, 1.0, max_recovery_timeout=4.0, jitter=0.5)
    for base, drawn in zip([1, 2, 4, 4], open_times(breaker, clock, 4), strict=True):
        assert base - 1e-6 <= drawn <= 1.5 * base + 1e-6
    assert breaker.snapshot().reason == "failed"
    breaker.reset()
    breaker.admit().park(40)
    assert breaker.snapshot().reason == "parked" and 40 - 1e-6 <= (breaker.retry_after or 0) <= 60
    breaker.open(7)
    assert breaker.retry_after == 7


# -- snapshots and copies
def test_a_snapshot_is_plain_data_and_a_breaker_is_not_copied(new, clock):
    breaker = new()
    for change in (breaker.reset, lambda: tripped(breaker), breaker.open):
        change()
        snapshot = breaker.snapshot()
        assert pickle.loads(pickle.dumps(snapshot)) == snapshot
        data = json.loads(json.dumps(snapshot.to_dict(), allow_nan=False))
        assert data == {name: getattr(snapshot, name) for name in snapshot._fields}
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        error_of(TypeError, copier, breaker)


# -- threads
def together(count: int, work: Callable[[], object]) -> None:
    barrier = threading.Barrier(count)
    for thread in in_threads(count, lambda: (barrier.wait(30), work())):
        thread.join(60)


def test_no_failure_is_lost_between_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    breaker = CircuitBreaker(10**6)
    try:
        together(16, lambda: [breaker.admit().failure() for _ in range(500)])
    finally:
        sys.setswitchinterval(interval)
    assert breaker.snapshot().failures == 8_000


def test_one_trial_among_32_threads(clock):
    breaker = tripped(CircuitBreaker(clock=clock))
    clock.advance(15)
    leave = threading.Event()
    done: list[str] = []
    def work():
        try:
            breaker.call(leave.wait, 10)
            done.append("trial")
        except CircuitOpen:
            done.append("refused")
            if len(done) == 31:
                leave.set()
    together(32, work)
    assert done == ["refused"] * 31 + ["trial"]
    assert (breaker.state, breaker.snapshot().rejected) == ("closed", 31)


# -- in the middle of a change
def all_steps(breaker: CircuitBreaker) -> None:
    """Every kind of change, of a breaker whose trial is due at once."""
    with contextlib.suppress(Boom):
        breaker.call(boom)  # opens
    breaker.call(int)  # the trial
    breaker.call(int)
    breaker.admit().failure("down")
    breaker.admit().neutral()
    breaker.open()
    with contextlib.suppress(CircuitOpen):
        breaker.admit()
    breaker.reset()


def test_a_snapshot_can_be_taken_at_each_line_of_a_change():
    """Whole, and by another thread: signal handlers do that, and may hit a line with a lock."""
    good: list[bool] = []
    def look(breaker):
        snapshot = breaker.snapshot()
        good.append((snapshot.state == "closed" or snapshot.reason == "opened by hand")
                    == (snapshot.retry_after is None))
    look_in_a_thread = lambda breaker: in_a_thread(lambda: look(breaker))  # noqa: E731
    new = lambda: CircuitBreaker(1, 0.0)  # noqa: E731
    for point, breaker in at_each_line(new, all_steps, look_in_a_thread):
        assert good, point
        assert good.pop(), point
        assert breaker.is_closed


@pytest.mark.parametrize("store", [False, True])
def test_a_finalizer_may_settle_wherever_a_change_calls_a_function(store):
    """In the middle of it, in the same thread; neither verdict is lost."""
    held: dict[int, Ticket] = {}
    def make():
        settings = {"store": PlainStore(), "name": "x"} if store else {}
        breaker = CircuitBreaker(10, **settings)
        held[id(breaker)] = breaker.admit()
        return breaker
    def work(breaker):
        breaker.admit().failure("one")
        end(breaker.admit(), Boom())
    def finalize(breaker):
        held[id(breaker)].failure("of a finalizer")
    def run():
        for point, breaker in at_each_line(make, work, finalize, event="call"):
            breaker.admit().failure("later")  # at the latest the next change takes it in
            assert breaker.snapshot().failures == 4, point
    assert in_a_thread(run, 60), "a lock is waited for that its own thread holds"


@pytest.mark.parametrize("first", ["reset", "admit"])
def test_a_race_for_the_trial_has_one_winner(first):
    clock, meanwhile = FakeClock(), []
    breaker = CircuitBreaker(clock=lambda: (meanwhile and meanwhile.pop()(), clock())[1])
    tripped(breaker)
    clock.advance(15)
    meanwhile.append(getattr(breaker, first))
    if first == "reset":
        assert not breaker.admit().is_trial
    else:
        refused(breaker)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_at_each_line_of_a_change_leaves_the_child_no_lock():
    """Another thread is in the middle of a change, which in the child nobody will ever finish."""
    ended: list[int] = []
    def fork(breaker):
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            breaker.reset()
            all_steps(breaker)
            os._exit(0 if breaker.is_closed else 1)
        ended.append(os.waitpid(child, 0)[1])
    new = lambda: CircuitBreaker(1, 0.0, store=MemoryStore(), name="x")  # noqa: E731
    fork_in_a_thread = lambda breaker: in_a_thread(lambda: fork(breaker), 30)  # noqa: E731
    for point, _ in at_each_line(new, all_steps, fork_in_a_thread, callers=False):
        assert ended[-1] == 0, point


GEVENT = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, gevent.event
from copilot_router import CircuitBreaker, CircuitOpen
breaker = CircuitBreaker(1, 0.0)
breaker.admit().failure()
entered, refused, leave = [], [], gevent.event.Event()
def work(at):
    try:
        breaker.call(lambda: (entered.append(at), leave.wait(10)))
    except CircuitOpen:
        refused.append(at)
        if len(refused) == 199:
            leave.set()
gevent.joinall([gevent.spawn(work, at) for at in range(200)])
assert (len(entered), len(refused)) == (1, 199), (len(entered), len(refused))
"""

def test_of_200_greenlets_one_has_the_trial():
    pytest.importorskip("gevent")
    assert done(python(GEVENT)) == ""


# -- any sequence of steps, against a naive model
THRESHOLD, RECOVERY, LEASE = 3, 15.0, 40.0
_runs = itertools.count()


class Model(RuleBasedStateMachine):
    """Written from the manual, with the number of the era instead of anything clever."""

    tickets = Bundle("tickets")
    store: ClassVar[Any] = None  #: shared by two breakers that take turns; None: one breaker alone

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock(0.0)
        settings: dict[str, Any] = {"name": f"run {next(_runs)}", "trial_timeout": LEASE}
        if self.store is not None:
            settings["store"] = Wrapped(self.store, self.clock)
        new = lambda: CircuitBreaker(THRESHOLD, RECOVERY, clock=self.clock, **settings)  # noqa: E731
        self.breaker = new()
        self.other = self.breaker if self.store is None else new()
        self.state, self.until, self.failures, self.era, self.takeovers = "closed", 0.0, 0, 0, 0
        self.generation = 0

    def change(self, state: str, until: float = 0.0, takeovers: int = 0) -> None:
        self.state, self.until, self.takeovers = state, until, takeovers
        self.era += 1
        if state == "closed":
            self.failures = 0

    @rule(target=tickets)
    def admit(self) -> Any:
        now, due = self.clock.now, self.state != "closed" and self.clock.now >= self.until
        if self.state != "closed" and not due:
            refused(self.breaker)
            return multiple()
        ticket = self.breaker.admit()
        assert ticket.is_trial == due
        if due:
            takeovers = self.takeovers + (self.state == "half_open")
            self.change("half_open", now + LEASE * min(2 ** max(0, takeovers - 1), 8), takeovers)
        return ticket, self.era

    @rule(
        held=consumes(tickets), verdict=st.sampled_from(["success", "failure", "neutral", "park"]))
    def settle(self, held: tuple[Ticket, int], verdict: str) -> None:
        ticket, era = held
        now, trial = self.clock.now, ticket.is_trial
        assert self.breaker.state == self.state
        getattr(ticket, verdict)(*([30.0] if verdict == "park" else []))
        if verdict == "park":
            if self.state != "open":
                self.change("open", now + 30)
            self.until = max(self.until, now + 30)
        elif era != self.era:
            return
        elif verdict == "success":
            self.failures = 0
            if trial:
                self.change("closed")
        elif verdict == "failure":
            self.failures += 1
            if trial or self.failures >= THRESHOLD:
                self.change("open", now + RECOVERY)
        elif trial:
            self.change("open", now, self.takeovers)

    @rule(seconds=st.sampled_from([0.5, 5.0, 15.0, 41.0, 400.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(seconds=st.sampled_from([None, 0.0, 20.0]))
    def open(self, seconds: float | None) -> None:
        self.breaker.open(seconds)
        self.change("open", math.inf if seconds is None else self.clock.now + seconds)

    @rule()
    def reset(self) -> None:
        self.breaker.reset()
        self.change("closed")

    @rule()
    def switch(self) -> None:
        self.breaker, self.other = self.other, self.breaker

    @invariant()
    def same(self) -> None:
        assert self.breaker.state == self.other.state == self.state
        snapshot = self.breaker.snapshot()
        assert (snapshot.state, snapshot) == (self.state, self.breaker.snapshot())
        record = self.store and self.store.load(self.breaker.name)[0]
        if record or self.store is None:  # what was never written has no generation to keep
            assert snapshot.generation >= self.generation
            self.generation = snapshot.generation
        left: float | None = max(0.0, self.until - self.clock.now)
        if self.state == "closed":
            assert snapshot.failures == self.failures
            left = None
        elif self.state == "half_open":
            left = min(left or 0.0, 1.0)
        assert snapshot.retry_after == (None if left == math.inf else left)


@pytest.mark.parametrize("kind", ["alone", *KINDS])
def test_any_steps_give_the_answers_of_the_model(kind, make_store):
    """One breaker alone; or two that share a store and take turns: together they are one."""
    store = None if kind == "alone" else make_store(kind, refresh=0)
    examples = {"alone": 100, "memory": 80, "sqlite": 30, "redis": 20}[kind]
    run_state_machine_as_test(type("Model", (Model,), {"store": store}),
        settings=hypothesis_settings(max_examples=examples, stateful_step_count=40, deadline=None))
